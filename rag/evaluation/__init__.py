"""Answers and retrieved passages, measured."""
