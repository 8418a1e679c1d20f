"""Modules: the router, and the sparse FFN that it routes."""

from prunepath.nn.router import Router
from prunepath.nn.sparse_ffn import FFNLayout, SparseFFN
from prunepath.nn.split_ffn import SplitFFN

__all__ = ["FFNLayout", "Router", "SparseFFN", "SplitFFN"]
