"""Models whose FFNs do not fit on a GPU."""
