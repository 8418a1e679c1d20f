"""FFNs whose weights stay in the host's memory, where a GPU's kernels read active experts' rows over the bus."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from prunepath.errors import PrunePathError
from prunepath.nn import SparseFFN
from prunepath.nn.model import for_inference, require_sparse_ffns
from prunepath.nn.sparse_ffn import KERNEL_TOKENS
from prunepath.ops.reference import ACTIVATIONS


@dataclasses.dataclass(frozen=True)
class Offloading:
    """Where a model's FFNs are.

    Attributes:
        gpu_bytes: of FFN weights on the GPU.
        host_bytes: of FFN weights in the host's memory.
    """

    gpu_bytes: int
    host_bytes: int


def offload_experts(model: nn.Module, limit: int, device: torch.device | str = "cuda") -> Offloading:
    """Moves a sparse model to a GPU, all but the FFN weights beyond a limit, which stay in pinned host memory.

    FFNs are kept on the GPU from the first on, each as a whole, while they fit. Of the others a call on few tokens
    reads the active experts alone, in place and over the bus, without a cache or a wait; a longer one copies the FFN to
    the GPU first. Outputs are those of the whole model on the GPU. CUDA graphs and training work too. Casting the model
    or moving it off the GPU ends the offloading.

    Args:
        model: a sparse model.
        limit: bytes of the GPU's memory for FFN weights.
        device: the GPU.

    Raises:
        PrunePathError: a dense model, FFNs whose projections are more than plain linears, or a device that is no GPU.
    """
    ffns = list(require_sparse_ffns(model).values())
    device = torch.device(device)
    if device.type != "cuda":
        raise PrunePathError(f"Expected a GPU to run a model on whose experts stay in memory, got the device {device}.")
    if not all(ffn.is_plain() for ffn in ffns):
        raise PrunePathError("Expected FFNs of plain linears to offload, got others: merge adapters first.")
    for_inference(model)
    gpu_bytes, hosted = 0, []
    for ffn in ffns:
        size = sum(weight.numel() * weight.element_size() for weight in _weights(ffn))
        if gpu_bytes + size <= limit:
            gpu_bytes += size
        else:
            hosted.append(ffn)
    pinned = {weight: weight.data.cpu().pin_memory() for ffn in hosted for weight in _weights(ffn)}
    host_bytes = sum(tensor.numel() * tensor.element_size() for tensor in pinned.values())
    try:
        for weight, tensor in pinned.items():
            weight.data = tensor.new_empty(0)
        model.to(device)
        pinned = {weight: _seen_by(device, tensor) for weight, tensor in pinned.items()}
    finally:
        for weight, tensor in pinned.items():
            weight.data = tensor
    for ffn in hosted:
        ffn.executor = _run
    return Offloading(gpu_bytes, host_bytes)


def _weights(ffn: SparseFFN) -> list[nn.Parameter]:
    return [ffn.projection(name).weight for name in ffn.layout.projections]


class _ArrayInterface:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor  # what this makes lives as long
        storage = tensor.untyped_storage()
        self.__cuda_array_interface__ = {
            "shape": (storage.nbytes(),),
            "typestr": "|u1",
            "data": (storage.data_ptr(), False),
            "strides": None,
            "version": 2,
        }


def _seen_by(device: torch.device, pinned: torch.Tensor) -> torch.Tensor:
    """The GPU's view of pinned memory, which has one address on both sides (CUDA's unified addressing)."""
    seen = torch.as_tensor(_ArrayInterface(pinned), device=device).view(pinned.dtype)
    return seen.as_strided(pinned.shape, pinned.stride())


def _run(ffn: SparseFFN, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An executor: (y [T, H], counts int32 [T]) of x [T, H], with weights in the host's memory."""
    if len(x) <= KERNEL_TOKENS:
        return ffn.run_kernels(x)
    # A product with many tokens reads a matrix several times, so it crosses the bus once before.
    *gate, up, down_t = (table.clone() for table in ffn.tables())
    *gate_bias, up_bias, down_bias = ffn.biases()
    mask, counts = ffn.select(x)
    act, linear, x = ACTIVATIONS[ffn.layout.activation], nn.functional.linear, x.to(up.dtype)
    hidden = linear(x, up, up_bias)
    hidden = act(linear(x, gate[0], gate_bias[0])) * hidden if gate else act(hidden)
    return linear(ffn.skip(hidden, mask), down_t.t(), down_bias), counts
