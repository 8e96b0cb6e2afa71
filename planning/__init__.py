"""Ahead-of-time compilation for machines that are not here, and reading the compiled programs."""
