"""Read the weights of checkpoints that are stored in 8 and 4 bits as if they were dense."""
