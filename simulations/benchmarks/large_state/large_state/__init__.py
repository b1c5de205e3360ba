"""The app of `simulations/benchmarks/increments.py`."""
