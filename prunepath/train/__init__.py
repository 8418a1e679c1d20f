"""Training routers, and turning budgets into thresholds."""
