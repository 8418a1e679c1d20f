"""Experts that need not all be in memory, or on the GPU."""
