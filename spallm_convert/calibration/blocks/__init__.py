"""Go through a dense model block by block."""
