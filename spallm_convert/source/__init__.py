"""Find a model, here or on the Hub, and read what it holds."""
