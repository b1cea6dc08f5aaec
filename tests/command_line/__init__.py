"""Tests of rag/command_line."""
