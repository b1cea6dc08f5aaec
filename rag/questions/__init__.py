"""Data sets of questions and answers by name: from the hub, or from local files with columns."""
