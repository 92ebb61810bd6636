"""Convert a model into a sketched checkpoint, describe it and check it."""
