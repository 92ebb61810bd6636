"""Measure clustering, calibration, products and memory on the CPU."""
