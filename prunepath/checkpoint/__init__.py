"""Sparse checkpoints: what they say of themselves, their files and folders, and how transformers loads them."""
