"""Measurements behind what the documentation says; their results lie in `results/`."""
