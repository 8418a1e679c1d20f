"""Methods that the quality benchmark compares PrunePath with, and PrunePath itself."""
