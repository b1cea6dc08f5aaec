"""How weights come and go: checkpoints, tokenizers, encoders."""
