"""Training and measuring retrieval-augmented generation, by subject; the scripts beside this package use it."""
