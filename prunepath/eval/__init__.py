"""Measuring sparse models: perplexity, decoding speed, trade-off curves, plots."""
