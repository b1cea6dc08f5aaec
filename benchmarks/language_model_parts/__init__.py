"""What `language_model.py` measures beside a training step."""
