"""The joint training of question encoder and generator."""
