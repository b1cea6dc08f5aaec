"""A page of a run and its evaluations: files to figures, tables and one HTML file."""
