"""Which neurons of an FFN form an expert: a partition of D neurons into E experts of n = D / E each."""

from __future__ import annotations

from collections.abc import Callable

import torch

from prunepath.config import PARTITIONS, nearest_divisors
from prunepath.errors import NativeLibraryError, PrunePathError

Progress = Callable[[int, int], None]


def partition_neurons(
    method: str,
    num_experts: int,
    *,
    intermediate_size: int,
    profiles: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Groups the neurons of one FFN into experts of equal width (MoEfication, arXiv 2110.01786, section 3.2).

    Args:
        method: `coactivation` puts neurons together whose activation magnitudes rise and fall on the same tokens:
            balanced k-means on |h| per calibration token, centred per neuron and scaled to unit length. `weights` does
            balanced k-means on the input-weight rows scaled to unit length. `contiguous` keeps the order of the
            checkpoint, `random` shuffles it.
        num_experts: E; must divide D.
        intermediate_size: D, the neurons.
        profiles: floating [P, D], the neurons' activations h on P calibration tokens; for `coactivation`. A neuron that
            never varies (a dead one) is the zero point, and goes where room is cheapest.
        weights: floating [D, F], the neurons' input weights; for `weights`.
        seed: of `random` and of the clustering. The same seed and input give the same partition, whatever the number
            of threads.
        progress: called as progress(done, total) while the clustering runs; what it raises stops the work.

    Returns:
        int64 [D] on the CPU: a permutation p, where neuron p[e * n + k] of the old order is neuron k of expert e.
        Within an expert neurons keep their old order.

    Raises:
        PrunePathError: unknown method, E that does not divide D, or profiles or weights that are missing, misshapen or
            not finite.
        NativeLibraryError: the compiled library `_host` is needed and does not load.
    """
    if method not in PARTITIONS:
        raise PrunePathError(f"Expected partition to be one of {', '.join(PARTITIONS)}, got {method!r}.")
    if num_experts < 1 or intermediate_size % num_experts:
        nearest = " and ".join(str(n) for n in sorted(set(nearest_divisors(intermediate_size, num_experts))))
        raise PrunePathError(
            f"Expected num_experts to divide intermediate_size {intermediate_size}, got {num_experts}; "
            f"nearest valid: {nearest}."
        )
    if method == "contiguous":
        return torch.arange(intermediate_size)
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        return _permutation(torch.randperm(intermediate_size, generator=generator) % num_experts)
    if method == "coactivation":
        points = _checked("profiles", profiles, 1, intermediate_size).abs().T.contiguous()
        points -= points.mean(dim=1, keepdim=True)
    else:
        points = _checked("weights", weights, 0, intermediate_size).contiguous()
    points = torch.nn.functional.normalize(points, dim=1)
    return _permutation(_balanced_kmeans(points, num_experts, seed, progress))


def _checked(name: str, values: torch.Tensor | None, neuron_dim: int, intermediate_size: int) -> torch.Tensor:
    shape = f"[P, {intermediate_size}]" if neuron_dim == 1 else f"[{intermediate_size}, F]"
    if values is None:
        raise PrunePathError(f"Expected {name} of shape {shape} for this partition, got None.")
    if values.dim() != 2 or values.shape[neuron_dim] != intermediate_size or values.numel() == 0:
        raise PrunePathError(f"Expected {name} of shape {shape}, got {list(values.shape)}.")
    values = values.detach().to("cpu", torch.float32)
    if not torch.isfinite(values).all():
        bad = torch.isfinite(values).logical_not().any(dim=1 - neuron_dim).sum().item()
        raise PrunePathError(f"Expected finite {name}, got NaN or infinity in {bad} of {intermediate_size} neurons.")
    return values


def _balanced_kmeans(points: torch.Tensor, num_experts: int, seed: int, progress: Progress | None) -> torch.Tensor:
    try:
        from prunepath import _host
    except ImportError as failure:
        raise NativeLibraryError(
            f"PrunePath's library _host, which clusters neurons, does not load ({failure}); `pip install .` builds and "
            "installs it, `python setup.py build_ext --inplace` builds it in a source tree."
        ) from failure
    labels = _host.balanced_kmeans(
        points.numpy(),
        num_experts,
        seed=seed % 2**64,
        num_threads=torch.get_num_threads(),
        progress=progress,
    )
    return torch.from_numpy(labels)


def _permutation(labels: torch.Tensor) -> torch.Tensor:
    return torch.argsort(labels, stable=True)
