"""Benchmarks, each run as a module from the root of the checkout: `python -m benchmarks.gpu`."""
