"""From question vectors to passages, wherever the search runs."""
