"""Shapes and dtypes of the operators' outputs, so that torch.compile and meta tensors know them without a kernel.

They read shapes and ints alone, never a tensor's values. Also here: what the dispatcher has to know from Python.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from prunepath import native
from prunepath.ops import reference

_OPS = ("route", "route.tensor", "select", "select.tensor", "pack_experts", "sparse_ffn", "routed_ffn")
_library: torch.library.Library | None = None
_twins: list[torch.library.Library] = []  # operators live as long as their library


def register() -> None:
    """Registers the fakes and the CUDA fallbacks, once. The schemas have to be there."""
    global _library
    if _library is not None:
        return
    _library = torch.library.Library("prunepath", "IMPL")
    for name in _OPS:
        _complete(_library, name, _fake_of(name))
    if torch.version.cuda is not None and native.cuda_error() is not None:
        _register_cuda_references()


def register_twins(namespace: str, functions: dict[str, Callable]) -> None:
    """Makes functions, by operators' names, operators of another namespace with the same schemas and fakes."""
    library = torch.library.Library(namespace, "DEF")
    _twins.append(library)
    for name, function in functions.items():
        packet, _, overload = name.partition(".")
        schema = getattr(getattr(torch.ops.prunepath, packet), overload or "default")._schema
        library.define(str(schema).removeprefix("prunepath::"))
        library.impl(name, function, "CompositeExplicitAutograd")
        _complete(library, name, _fake_of(name))


def _fake_of(name: str) -> Callable:
    return globals()[f"_{name.partition('.')[0]}"]


def _complete(library: torch.library.Library, name: str, fake: Callable) -> None:
    torch.library.register_fake(f"{library.ns}::{name}", fake, lib=library)
    # Inference only: outputs carry no gradient instead of a wrong one.
    library.impl(name, torch.library.fallthrough_kernel, "Autograd")


def _route(logits, threshold, *, min_experts=1, max_experts=0):
    num_tokens, num_experts = logits.shape
    columns = max_experts or num_experts
    return (
        logits.new_empty((num_tokens, columns), dtype=torch.int32),
        logits.new_empty((num_tokens, columns), dtype=torch.float32),
        logits.new_empty((num_tokens,), dtype=torch.int32),
    )


def _select(logits, threshold, *, min_experts=1, max_experts=0):
    return logits.new_empty(logits.shape, dtype=torch.bool), logits.new_empty((logits.shape[0],), dtype=torch.int32)


def _pack_experts(gate, up, down, order=None):
    return [up.new_empty(up.shape) for _ in range(2 if gate is None else 3)]


def _sparse_ffn(x, gate, up, down_t, expert_ids, counts, activation, *, num_experts, **biases):
    return x.new_empty(x.shape)


def _routed_ffn(x, router_in, router_out, router_bias, threshold, gate, up, down_t, activation, **options):
    return x.new_empty(x.shape), x.new_empty((x.shape[0],), dtype=torch.int32)


def _register_cuda_references() -> None:
    for name in _OPS:
        _library.impl(name, torch.no_grad()(getattr(reference, name.split(".")[0])), "CUDA")
