"""What reaches the FFNs of a model: the tokens that methods are fitted on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from baselines.base import Batch
from prunepath.nn import SparseFFN
from prunepath.nn.observers import observing_inputs, padding_masks

FITTING_TOKENS = 131072
"""At most so many tokens of each FFN are kept for fitting: what PrunePath's routers train on."""


@torch.no_grad()
def ffn_inputs(
    model: nn.Module, ffns: Sequence[SparseFFN], batches: Iterable[Batch], num_tokens: int = FITTING_TOKENS
) -> list[torch.Tensor]:
    """Inputs x [N, H] of each FFN on the batches' first `num_tokens` or so valid tokens."""
    kept: dict[SparseFFN, list[torch.Tensor]] = {ffn: [] for ffn in ffns}

    def observe(ffn: SparseFFN, x: torch.Tensor) -> None:
        kept[ffn].append(x)

    with padding_masks(model), observing_inputs(dict.fromkeys(ffns, observe)):
        for batch in batches:
            model(**batch)
            if min(sum(map(len, inputs)) for inputs in kept.values()) >= num_tokens:
                break
    return [torch.cat(inputs)[:num_tokens] for inputs in kept.values()]
