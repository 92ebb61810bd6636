"""Plan a sketched checkpoint and sketch rows of weights."""
