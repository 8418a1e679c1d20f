"""PrunePath in other libraries."""
