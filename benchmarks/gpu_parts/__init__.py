"""What `benchmarks/gpu.py` measures, a module a subject; each part runs in a process of its own."""
