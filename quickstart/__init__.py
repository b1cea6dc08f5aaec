"""Build, finetune and measure a small RAG model offline: `python -m quickstart`."""
