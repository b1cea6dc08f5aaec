"""From documents to passages, embeddings and an index."""
