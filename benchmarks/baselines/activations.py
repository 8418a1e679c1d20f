"""What reaches the FFNs of a model: the tokens that methods are fitted on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from baselines.base import Batch
from prunepath.nn import SparseFFN
from prunepath.nn.observers import observing_inputs

FITTING_TOKENS = 131072
"""At most so many tokens of each FFN are kept for fitting: what PrunePath's routers train on."""


def valid_tokens(ffn: SparseFFN, num_tokens: int) -> torch.Tensor | None:
    """Which of the FFN's current tokens are no padding: bool [T], or None if all are or nobody knows."""
    valid = ffn.valid
    return valid if valid is not None and len(valid) == num_tokens else None


@torch.no_grad()
def ffn_inputs(
    model: nn.Module, ffns: Sequence[SparseFFN], batches: Iterable[Batch], num_tokens: int = FITTING_TOKENS
) -> list[torch.Tensor]:
    """Inputs x [N, H] of each FFN on the batches' first `num_tokens` or so valid tokens."""
    kept: dict[SparseFFN, list[torch.Tensor]] = {ffn: [] for ffn in ffns}

    def observe(ffn: SparseFFN, x: torch.Tensor) -> None:
        valid = valid_tokens(ffn, len(x))
        kept[ffn].append(x if valid is None else x[valid])

    with observing_inputs(dict.fromkeys(ffns, observe)):
        for batch in batches:
            model(**batch)
            if min(sum(map(len, inputs)) for inputs in kept.values()) >= num_tokens:
                break
    return [torch.cat(inputs)[:num_tokens] for inputs in kept.values()]


def observe_padding(model: nn.Module) -> None:
    """Makes each forward pass of `model` tell its sparse FFNs which tokens are padding, as `ffn.valid`."""
    encoders, decoders = [], []
    two_stacks = bool(getattr(model.config, "is_encoder_decoder", False))
    for path, module in model.named_modules():
        if isinstance(module, SparseFFN):
            module.valid = None
            (decoders if two_stacks and "decoder" in path.split(".") else encoders).append(module)

    def before_forward(_, args: tuple, kwargs: dict) -> None:
        attention, labels = kwargs.get("attention_mask"), kwargs.get("labels")
        decoder = kwargs.get("decoder_attention_mask")
        if decoder is None and labels is not None:
            decoder = labels != -100
        for ffns, mask in ((encoders, attention), (decoders, decoder)):
            for ffn in ffns:
                ffn.valid = None if mask is None else mask.flatten().bool()

    model.register_forward_pre_hook(before_forward, with_kwargs=True)
