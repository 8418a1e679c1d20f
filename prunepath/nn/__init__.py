"""The router and the sparse FFN as modules."""

from prunepath.nn.layout import FFNLayout
from prunepath.nn.model import for_inference, for_training, is_sparse, sparse_ffns
from prunepath.nn.router import Router
from prunepath.nn.sparse_ffn import SparseFFN
from prunepath.nn.split_ffn import SplitFFN

__all__ = [
    "FFNLayout",
    "Router",
    "SparseFFN",
    "SplitFFN",
    "for_inference",
    "for_training",
    "is_sparse",
    "sparse_ffns",
]
