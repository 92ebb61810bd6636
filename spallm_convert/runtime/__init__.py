"""Load, run and train sketched models."""
