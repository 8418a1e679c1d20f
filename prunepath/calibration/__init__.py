"""Turning budgets into thresholds."""
