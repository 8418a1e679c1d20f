"""How much the loss minds an error of an FFN's output: the metric in which contributions may be measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from prunepath.errors import PrunePathError
from prunepath.nn import SparseFFN

_RIDGE = 1e-3


def measure_loss_metric(
    ffns: Sequence[SparseFFN], losses: Iterable[Callable[[], tuple[torch.Tensor | None, int]]]
) -> None:
    """Sets each FFN's `output_metric` to M^{1/2} [H, H], float32, with M = E[g·gᵀ] (empirical Fisher information).

    g is the gradient at the FFN's output for one token, of the loss summed over the batch's tokens. A thousandth of M's
    mean eigenvalue is added to each, so that no direction is free where tokens are fewer than H.

    Args:
        ffns: the FFNs, which run densely meanwhile.
        losses: for each batch a function that runs the model and gives its mean loss, or None, and how many tokens
            that is the mean of.

    Raises:
        PrunePathError: if the model gives no loss.
    """
    sums = [torch.zeros(f.hidden_size, f.hidden_size, device=f.router.weight.device) for f in ffns]
    tokens = [0] * len(ffns)
    outputs: dict[int, torch.Tensor] = {}

    def keeper(index: int) -> Callable:
        def keep(module, args, output: torch.Tensor) -> None:
            # Of a model whose parameters are all frozen nothing would ask for gradients.
            outputs[index] = output if output.requires_grad else output.requires_grad_()

        return keep

    projections = [ffn.projection(ffn.layout.down) for ffn in ffns]
    hooks = [projection.register_forward_hook(keeper(i)) for i, projection in enumerate(projections)]
    try:
        for run in losses:
            outputs.clear()
            with torch.enable_grad():
                loss, count = run()
                if loss is None:
                    raise PrunePathError("Expected a model and data with a loss for contributions in its metric.")
                # The input gradient alone: the parameters' would take as much memory as the model.
                gradients = torch.autograd.grad(loss * count, [outputs[i] for i in range(len(ffns))])
            for i, (ffn, gradient) in enumerate(zip(ffns, gradients, strict=True)):
                g = gradient.detach().reshape(-1, ffn.hidden_size).float()
                valid = ffn.valid_tokens(len(g))
                g = g if valid is None else g[valid]
                with torch.autocast(g.device.type, enabled=False):
                    sums[i] += g.t() @ g
                tokens[i] += len(g)
    finally:
        for hook in hooks:
            hook.remove()
    for ffn, total, count in zip(ffns, sums, tokens, strict=True):
        metric = (total / max(1, count)).double()
        metric.diagonal().add_(_RIDGE * metric.diagonal().mean().clamp(min=1e-30))
        values, vectors = torch.linalg.eigh(metric)
        ffn.output_metric = ((vectors * values.clamp(min=0).sqrt()) @ vectors.t()).float()
