"""Compare the perplexity of sketches with other quantizers'."""
