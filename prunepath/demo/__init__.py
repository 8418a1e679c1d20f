"""The demonstration: an embedded language model, its text, and the run that makes it sparse."""
