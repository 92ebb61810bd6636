"""Open any checkpoint and measure its perplexity or its accuracy on tasks."""
