"""Train the tables of calibrated blocks towards the dense model."""
