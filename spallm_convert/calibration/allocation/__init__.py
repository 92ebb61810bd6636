"""Choose bits and groups for every layer within a budget."""
