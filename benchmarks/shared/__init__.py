"""Describe machines, start processes, draw results and prepare dense models for all benchmarks."""
