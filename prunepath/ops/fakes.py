"""Shapes and dtypes of the operators' outputs, so that torch.compile and meta tensors know them without a kernel.

They read shapes and ints alone, never a tensor's values. Also here: what the dispatcher has to know from Python.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prunepath import native
from prunepath.ops import reference

_OPS = ("route", "route.tensor", "pack_experts", "unpack_experts", "sparse_ffn", "routed_ffn")
_OUT_OPS = (
    "route.out",
    "route.tensor_out",
    "pack_experts.out",
    "unpack_experts.out",
    "sparse_ffn.out",
    "routed_ffn.out",
)
_OUTPUTS = {
    "route": ("expert_ids", "probs", "counts"),
    "pack_experts": ("w_in", "w_out"),
    "unpack_experts": ("gate", "up", "down"),
    "sparse_ffn": ("y",),
    "routed_ffn": ("y", "counts"),
}
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
    for name in _OUT_OPS:
        _complete(_library, name, lambda *args, **kwargs: None)
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


def _pack_experts(gate, up, down, num_experts):
    intermediate_size, hidden_size = up.shape
    torch._check(
        intermediate_size % num_experts == 0,
        lambda: f"prunepath::pack_experts: expected num_experts to divide {intermediate_size}, got {num_experts}.",
    )
    width = intermediate_size // num_experts
    per_neuron = 1 if gate is None else 2
    return (
        up.new_empty((num_experts, width, per_neuron, hidden_size)),
        up.new_empty((num_experts, width, hidden_size)),
    )


def _unpack_experts(w_in, w_out):
    num_experts, width, per_neuron, hidden_size = w_in.shape
    inputs = [w_in.new_empty((num_experts * width, hidden_size)) for _ in range(per_neuron)]
    return [*inputs, w_in.new_empty((hidden_size, num_experts * width))]


def _sparse_ffn(x, w_in, w_out, expert_ids, counts, activation, *, b_in=None, b_out=None, center=None):
    return x.new_empty(x.shape)


def _routed_ffn(x, router_weight, router_bias, threshold, w_in, w_out, activation, **options):
    return x.new_empty(x.shape), x.new_empty((x.shape[0],), dtype=torch.int32)


def _register_cuda_references() -> None:
    for name in _OPS:
        function = torch.no_grad()(getattr(reference, name.split(".")[0]))
        _library.impl(name, function, "CUDA")
        out_name = "route.tensor_out" if name == "route.tensor" else f"{name}.out"
        _library.impl(out_name, _copying(function), "CUDA")
    _library.impl("ffn_workspace_size", lambda op, x, w_in: 0, "CUDA")


def _copying(function):
    """The `.out` overload of a reference: its results copied to the keyword tensors that the schema names."""
    names = _OUTPUTS[function.__name__]

    def out_function(*args, workspace: Tensor | None = None, **options):
        outputs = [options.pop(name) for name in names]
        results = function(*args, **options)
        results = [results] if isinstance(results, Tensor) else results
        outputs = [output for output in outputs if output is not None]  # an FFN without a gate
        for output, result in zip(outputs, results, strict=True):
            output.copy_(result)

    return out_function
