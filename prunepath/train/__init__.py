"""Training routers, fine-tuning at any budget, and turning budgets into thresholds."""
