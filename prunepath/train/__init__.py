"""Training routers, and fine-tuning at any budget."""
