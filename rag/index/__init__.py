"""Passages on disk and what searches them: FAISS, BM25, Wikipedia's index, DPR's legacy files."""
