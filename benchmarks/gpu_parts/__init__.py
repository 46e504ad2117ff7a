"""The parts of `benchmarks/gpu.py`: its rows, what it measures of each, its checks and tables."""
