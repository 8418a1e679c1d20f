"""Tuned configurations, as `benchmarks/tune_triton.py` writes them: see `configs.py` for what they mean.

(architecture, H, D, G, dtype, most tokens) -> Fused, or (Hidden, Output) for more than 4 tokens.
"""

TABLE = {}
