"""Measure how much smaller large published models would become, from made-up headers."""
