"""Convert a model into a sketched checkpoint, then describe, check and upload it."""
