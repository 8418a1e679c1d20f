"""Greedy decoding: its speed beside the dense model's, and a loop of our own whose step is one CUDA graph."""

from __future__ import annotations

import dataclasses
import inspect
import statistics
import time

import torch
from transformers import DynamicCache, StaticCache

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


def with_cache(model, cache=None) -> dict:
    """Arguments that give a causal language model its KV cache, a new and growing one by default.

    transformers named the argument `past_key_values`, and `cache` later.
    """
    if cache is None:
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: cache, "use_cache": True}


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
    cached = with_cache(model)
    with torch.inference_mode():
        output = model(input_ids=input_ids, **cached)
        _wait(input_ids.device)
        start = time.perf_counter()
        for step in range(new_tokens):
            last = output.logits[:, -1]
            logits.append(last[0])
            chosen.append(last.argmax(-1))
            if step + 1 < new_tokens:
                token = chosen[-1] if follow is None else follow[step : step + 1]
                output = model(input_ids=token.view(1, 1), **cached)
        _wait(input_ids.device)
        seconds = time.perf_counter() - start
    return torch.cat(chosen), torch.stack(logits).float(), seconds


class DecodeLoop:
    """Greedy decoding with a static KV cache; on a GPU a step is one replay of a CUDA graph.

    Thresholds are tensors that the graph reads: `set_budget`, `set_threshold`, and `set_request_budgets` for as many
    sequences as when the loop was made, act on the next step. What counts experts does not see the graph's steps.

    Args:
        model: a transformers causal language model, dense or sparse, in eval mode.
        batch_size: B, sequences that are decoded at once, all of one length.
        max_length: tokens of a sequence at most, its prompt included.
        compiled: put the step through `torch.compile`, which fuses small operations.
    """

    def __init__(self, model, batch_size: int, max_length: int, *, compiled: bool = False) -> None:
        if batch_size < 1 or max_length < 2:
            raise PrunePathError(
                f"Expected batch_size of at least 1 and max_length of at least 2, got {batch_size} and {max_length}."
            )
        self.device = next(model.parameters()).device
        self.max_length = max_length
        self._model = model
        self._forward = torch.compile(model.forward, fullgraph=True, dynamic=False) if compiled else model.forward
        self._cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=max_length)
        self._cached = with_cache(model, self._cache)
        self._tokens = torch.zeros(batch_size, 1, dtype=torch.int64, device=self.device)
        self._length = 0  # of the sequences, with the tokens that the next step reads
        self._graph: torch.cuda.CUDAGraph | None = None
        self.logits: torch.Tensor | None = None
        """[B, vocabulary] of the last step; the next one overwrites them."""
        self.start(self._tokens)
        self._capture()

    @torch.inference_mode()
    def start(self, input_ids: torch.Tensor) -> None:
        """Begins anew with prompts int64 [B, n], and chooses their first tokens."""
        expected = [len(self._tokens), f"1 to {self.max_length - 1}"]
        if input_ids.dim() != 2 or len(input_ids) != expected[0] or not 0 < input_ids.shape[1] < self.max_length:
            raise PrunePathError(
                f"Expected input_ids of shape [{expected[0]}, {expected[1]}], got {list(input_ids.shape)}."
            )
        self._cache.reset()
        output = self._model(input_ids=input_ids, **self._cached)
        self.logits = output.logits[:, -1]
        self._tokens.copy_(self.logits.argmax(-1, keepdim=True))
        self._length = input_ids.shape[1] + 1

    @torch.inference_mode()
    def step(self, feed: torch.Tensor | None = None) -> torch.Tensor:
        """Reads the tokens that the last step chose, and chooses the next ones, without waiting for the device.

        Args:
            feed: int64 [B, 1], read instead of the tokens chosen.

        Returns:
            int64 [B, 1], which the next step overwrites.
        """
        if self._length >= self.max_length:
            raise PrunePathError(f"Expected sequences of at most {self.max_length} tokens, which these have already.")
        if feed is not None:
            self._tokens.copy_(feed)
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()
            self.logits = self._graph_logits
        self._length += 1
        return self._tokens

    def generate(self, input_ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
        """Greedy continuations int64 [B, new_tokens] of prompts int64 [B, n]."""
        self.start(input_ids)
        chosen = [self._tokens.clone()]
        chosen += [self.step().clone() for _ in range(new_tokens - 1)]
        return torch.cat(chosen, 1)

    def _step(self) -> None:
        output = self._forward(input_ids=self._tokens, **self._cached)
        self.logits = output.logits[:, -1]
        self._tokens.copy_(self.logits.argmax(-1, keepdim=True))

    @torch.inference_mode()
    def _capture(self) -> None:
        if self.device.type != "cuda":
            self._step()  # compiles, if it does
            return
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._cache.reset()  # or these steps would write beyond a short cache
                self._step()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self._graph, self._graph_logits = graph, self.logits


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
