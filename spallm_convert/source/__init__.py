"""Find a model on this machine or on the Hub, and read its config, headers and text."""
