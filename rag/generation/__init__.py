"""From contexts to hidden states, and from contexts to answers."""
