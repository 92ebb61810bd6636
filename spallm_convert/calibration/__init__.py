"""Calibrated conversion: fit each sketch to a text, so that its errors matter little there."""
