"""A page that asks RAG models a question and shows which passages say the answer."""
