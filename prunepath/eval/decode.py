"""Greedy decoding speed of a sparse model beside its dense model."""

from __future__ import annotations

import dataclasses
import statistics
import time

import torch

import prunepath
from prunepath.errors import PrunePathError

# How far apart, relative to the largest logit, two float results of one sum in different orders may be here.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}


@dataclasses.dataclass(frozen=True)
class DecodeSpeed:
    """Median greedy decoding speed, in tokens per second, of `repeats` runs of `new_tokens` tokens each."""

    tokens_per_second: float
    dense_tokens_per_second: float
    new_tokens: int
    repeats: int


def greedy(model, input_ids: torch.Tensor, new_tokens: int, *, follow: torch.Tensor | None = None):
    """Decodes greedily with a KV cache.

    Args:
        model: a transformers causal language model.
        input_ids: prompt, int64 [1, n].
        new_tokens: tokens to generate.
        follow: int64 [new_tokens]; if given, these tokens are fed back instead of the model's own choices.

    Returns:
        (tokens int64 [new_tokens], logits float32 [new_tokens, vocabulary], seconds of all but the prompt's
        step).
    """
    chosen, logits = [], []
    with torch.inference_mode():
        output = model(input_ids=input_ids, use_cache=True)
        _wait(input_ids.device)
        start = time.perf_counter()
        for step in range(new_tokens):
            last = output.logits[:, -1]
            logits.append(last[0])
            chosen.append(last.argmax(-1))
            if step + 1 < new_tokens:
                token = chosen[-1] if follow is None else follow[step : step + 1]
                output = model(input_ids=token.view(1, 1), past_key_values=output.past_key_values, use_cache=True)
        _wait(input_ids.device)
        seconds = time.perf_counter() - start
    return torch.cat(chosen), torch.stack(logits).float(), seconds


def check_equals_dense(dense, sparse, input_ids: torch.Tensor, new_tokens: int) -> None:
    """Raises PrunePathError unless `sparse` at threshold 1 decodes as `dense` does.

    In float32 the greedy text must be the same. In a half precision two tokens whose dense logits differ by
    rounding alone may change places. The logits must agree within rounding at every step in each. The
    thresholds are put back.
    """
    thresholds = prunepath.get_thresholds(sparse)
    try:
        prunepath.set_threshold(sparse, 1.0)
        tokens, expected, _ = greedy(dense, input_ids, new_tokens)
        others, got, _ = greedy(sparse, input_ids, new_tokens, follow=tokens)
    finally:
        prunepath.set_threshold(sparse, thresholds)
    scale = expected.abs().amax(-1).clamp_min(1e-6)
    dtype = next(dense.parameters()).dtype
    tolerance = _TOLERANCE.get(dtype, 1e-4)
    difference = ((got - expected).abs().amax(-1) / scale).max().item()
    # The negation also catches NaN.
    if not difference <= tolerance:
        raise PrunePathError(
            "Expected the sparse model at threshold 1.0 to give the dense model's logits within a relative "
            f"difference of {tolerance:g}, got {difference:g}: no speed is reported."
        )
    if dtype == torch.float32:
        moved = others != tokens
    else:
        gap = expected.gather(1, tokens[:, None]) - expected.gather(1, others[:, None])
        moved = gap.squeeze(1) > 2 * tolerance * scale
    if moved.any():
        step = int(moved.nonzero()[0])
        raise PrunePathError(
            "Expected the sparse model at threshold 1.0 to generate the dense model's text, but token "
            f"{step + 1} is {int(others[step])} instead of {int(tokens[step])}: no speed is reported."
        )


def decode_speed(dense, sparse, input_ids: torch.Tensor, *, new_tokens: int = 64, repeats: int = 5) -> DecodeSpeed:
    """Times greedy decoding at batch size 1, `dense` and `sparse` in turns, after a warm-up run of each.

    `sparse` runs at the thresholds it has. First `check_equals_dense` is called on the same prompt.

    Args:
        dense: the model before conversion.
        sparse: the converted model, on the same device in the same dtype.
        input_ids: prompt, int64 [1, n].
        new_tokens: tokens of one run, at least 2.
        repeats: timed runs of each model.

    Raises:
        PrunePathError: the sparse model at threshold 1 is not the dense model.
    """
    if new_tokens < 2 or repeats < 1:
        raise PrunePathError(
            f"Expected new_tokens of at least 2 and repeats of at least 1, got {new_tokens} and {repeats}."
        )
    check_equals_dense(dense, sparse, input_ids, new_tokens)
    times = {"dense": [], "sparse": []}
    for repeat in range(repeats + 1):
        for name, model in (("dense", dense), ("sparse", sparse)):
            seconds = greedy(model, input_ids, new_tokens)[2]
            if repeat > 0:
                times[name].append(seconds)
    # The prompt's step gives the first token and is not timed.
    steps = new_tokens - 1
    return DecodeSpeed(
        tokens_per_second=steps / statistics.median(times["sparse"]),
        dense_tokens_per_second=steps / statistics.median(times["dense"]),
        new_tokens=new_tokens,
        repeats=repeats,
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
