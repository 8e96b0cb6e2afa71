"""One command that measures this library on a GPU: python -m benchmarks.accelerator --help"""
