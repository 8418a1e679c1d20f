"""Times routed_ffn and sparse_ffn at chosen active fractions beside dense and sparse FFNs in plain torch.

    python benchmarks/ffn.py --device cpu                        # four real shapes, bfloat16, one token
    python benchmarks/ffn.py --shapes llama-3-8b --active 10,25 --batch 1,8 --threads 1,2 --csv ffn.csv
    python benchmarks/ffn.py --expert-width 4 --router-rank 0                              # a router of full rank
    python benchmarks/ffn.py --device cuda --json ffn.json       # batches 1, 4, 8 and 32

Nothing is timed before it has been checked: every call's result, on the very tensors that are timed, is compared with
a float64 reference given the selection. `routed_ffn` gets its active fraction from a router and a threshold per
token, and its counts are checked too; `sparse_ffn` is given the same experts. The weights of several layers are
rotated, as many as it takes for a round to read several times the last-level cache, and a round of every candidate,
and of a probe of the read bandwidth, is taken in turn. Times are medians of those rounds, per call. On a GPU a round
is one CUDA graph, timed by events on the device; the bandwidth of a copy, counted in both directions, is measured
too.

The baselines are dense (F.linear, cuBLAS on a GPU; oneDNN with weights packed beforehand) or read the active experts
alone (F.grouped_mm over lists of tokens per expert that are made beforehand; index_select, which copies the weights,
and F.linear; with "(T)" the copy of the down projection is transposed too, which suits some of torch's half-precision
kernels; "pruned" is a dense FFN of as many neurons as a token runs, always the same ones; on a GPU, transformers'
kernels for mixtures of experts, which are told the experts). GB/s are the bytes of weights that a call needs, not
what it moves: those of the experts that any token of the batch chose, the router's where it runs, and everything for
a dense FFN; "of probe" is thus the floor's share of the time. "vs dense" is against the fastest dense baseline.
"""

import argparse
import csv
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from common import (
    available_memory_bytes,
    choices,
    graph_seconds,
    last_level_cache_bytes,
    machine,
    seconds,
    today,
    whole_numbers,
)
from torch import Tensor

from prunepath import native, ops
from prunepath.errors import BackendError, PrunePathError
from prunepath.eval.files import replacing, write_json
from prunepath.ops import reference

# Largest relative error of the operators. The baselines are allowed more: torch's own float32 linear can miss 1e-6,
# and a baseline must not drop out of the comparison for that.
TOLERANCES = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 5e-3}
BASELINE_TOLERANCE = 4
ONEDNN_ACTIVATIONS = {"relu": "relu", "silu": "swish"}
# What a round reads, in last-level caches, if the memory allows it.
CACHES_A_ROUND = 4
# A slow baseline's round is cut to about this; fewer layers can only make it look faster.
BASELINE_ROUND_SECONDS = 0.5
# Calls of more tokens are bound by arithmetic, so that few layers do; their reference takes long.
MEMORY_BOUND_TOKENS = 64
PREFILL_LAYERS = 2
# Kernels that loop over experts one by one are of no use to finer ones.
MIN_GROUPED_WIDTH = 8
COPY = "copy"


@dataclass(frozen=True)
class Shape:
    hidden_size: int
    intermediate_size: int
    gated: bool
    activation: str


SHAPES = {
    "llama-3-8b": Shape(4096, 14336, True, "silu"),
    "opt-6.7b": Shape(4096, 16384, False, "relu"),
    "qwen2.5-1.5b": Shape(1536, 8960, True, "silu"),
    "t5-large": Shape(1024, 4096, False, "relu"),
}


@dataclass(frozen=True)
class Layer:
    """An FFN's random weights as tables, and its router."""

    gate: Tensor | None  # [D, H], as up and down_t
    up: Tensor
    down_t: Tensor
    router_in: Tensor | None  # [r, H]
    router_out: Tensor  # [E, r], or [E, H] without router_in; F * E rows of a factored router
    router_floor: Tensor | None  # [F * E]
    router_log_scale: Tensor | None  # [E]

    @property
    def tables(self) -> tuple[Tensor | None, Tensor, Tensor]:
        return self.gate, self.up, self.down_t

    @property
    def num_experts(self) -> int:
        return len(self.router_out if self.router_log_scale is None else self.router_log_scale)

    @property
    def router(self) -> tuple[Tensor | None, Tensor, None]:
        return self.router_in, self.router_out, None

    @property
    def router_options(self) -> dict[str, Tensor | None]:
        return {"router_floor": self.router_floor, "router_log_scale": self.router_log_scale}

    @property
    def width(self) -> int:
        return len(self.up) // self.num_experts

    @property
    def nbytes(self) -> int:
        return sum(table.nbytes for table in self.tables if table is not None)

    @property
    def router_nbytes(self) -> int:
        parts = (self.router_in, self.router_out, self.router_floor, self.router_log_scale)
        return sum(part.nbytes for part in parts if part is not None)

    def logits(self, x: Tensor, activation: str) -> Tensor:
        """The router's, float64 [T, E]."""
        parts = (*self.router, self.router_floor, self.router_log_scale)
        wide = [None if part is None else part.double() for part in parts]
        return reference.router_logits(x.double(), *wide, activation)

    def neurons(self, experts: Tensor) -> Tensor:
        return (experts.long()[:, None] * self.width + torch.arange(self.width, device=experts.device)).flatten()

    def of(self, experts: Tensor) -> list[Tensor | None]:
        """Copies of the rows of the experts' neurons."""
        rows = self.neurons(experts)
        return [None if table is None else table.index_select(0, rows) for table in self.tables]

    @classmethod
    def random(
        cls, shape: Shape, width: int, rank: int, form: str, dtype: torch.dtype, device: torch.device, seed: int
    ) -> "Layer":
        generator = torch.Generator(device).manual_seed(seed)
        hidden_size, intermediate_size = shape.hidden_size, shape.intermediate_size

        def normal(*size: int, std: float) -> Tensor:
            return torch.empty(size, dtype=dtype, device=device).normal_(0, std, generator=generator)

        inputs = [normal(intermediate_size, hidden_size, std=hidden_size**-0.5) for _ in range(1 + shape.gated)]
        gate, up = inputs if shape.gated else (None, *inputs)
        down = normal(hidden_size, intermediate_size, std=intermediate_size**-0.5)
        tables = ops.pack_experts(gate, up, down) if device.type == "cpu" else reference.pack_experts(gate, up, down)
        router_in = normal(rank, hidden_size, std=hidden_size**-0.5) if rank else None
        columns, num_experts = rank or hidden_size, intermediate_size // width
        floor = log_scale = None
        if form == "linear":
            # Logits of standard deviation 2: peaked, and no tail so thin that float32 thresholds cannot cut it.
            router_out = normal(num_experts, columns, std=2 * columns**-0.5)
        else:
            rows = num_experts * (1 + shape.gated)
            router_out = normal(rows, columns, std=columns**-0.5)
            floor = torch.full((rows,), 0.1, dtype=dtype, device=device)
            log_scale = normal(num_experts, std=0.5)
        return cls(*(tables if shape.gated else (None, *tables)), router_in, router_out, floor, log_scale)


@dataclass(frozen=True)
class Inputs:
    """What a layer is called with, the selection that this makes, and the float64 result."""

    layer: Layer
    x: Tensor  # [T, H]
    threshold: Tensor  # [T]
    expert_ids: Tensor  # [T, E], as `route` gives them
    counts: Tensor  # [T]
    union: Tensor  # sorted experts that any token chose
    local_ids: Tensor  # [T, count], positions in `union`
    expected: Tensor  # [T, H] float64

    @property
    def nbytes(self) -> int:
        """Bytes of the active experts' weights."""
        return self.layer.nbytes * len(self.union) // self.layer.num_experts


@dataclass
class Candidate:
    name: str
    calls: list[Callable[[], object]]  # one a layer
    nbytes: float  # that a call needs, on average
    dense: bool = False
    required: bool = False  # nothing is timed if its check fails
    expected: list[Tensor] | None = None  # if it computes something else than `Inputs.expected`
    error: float | None = None  # the largest of its calls
    skipped: str | None = None


def make_inputs(layer: Layer, count: int, batch: int, correlation: float, activation: str, seed: int) -> Inputs:
    """Random tokens for which the layer's router, with a threshold for each token, selects `count` experts."""
    device = layer.up.device
    num_experts, hidden_size = layer.num_experts, layer.up.shape[1]
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    shared = normal(1, hidden_size)

    def tokens(number: int) -> Tensor:
        own = normal(number, hidden_size)
        return (correlation**0.5 * shared + (1 - correlation) ** 0.5 * own).to(layer.up.dtype)

    x = tokens(batch)
    if count == num_experts:
        threshold = torch.ones(batch, device=device)
    else:
        # Tokens whose last selected and first skipped expert have almost the same logit are drawn again: there the
        # order in which a router's dot product is summed could change the selection.
        while True:
            logits = layer.logits(x, activation)
            ranked = logits.sort(dim=1, descending=True).values
            close = ranked[:, count - 1] - ranked[:, count] < 2e-5
            if not close.any():
                break
            x[close] = tokens(int(close.sum()))
        before = reference.mass_before(logits).sort(dim=1).values
        threshold = before[:, count - 1 : count + 1].mean(1).float()
    expert_ids, _, counts = reference.route(layer.logits(x, activation), threshold)
    if not (counts == count).all():
        raise SystemExit(
            f"The thresholds select {counts.tolist()} experts where {count} were wanted: nothing is timed."
        )
    union, local_ids = expert_ids[:, :count].unique(return_inverse=True)
    expected = reference_ffn(layer, union, x, local_ids, counts, activation)
    return Inputs(layer, x, threshold, expert_ids, counts, union, local_ids, expected)


def reference_ffn(
    layer: Layer, experts: Tensor, x: Tensor, local_ids: Tensor, counts: Tensor, activation: str
) -> Tensor:
    """The float64 result, where tokens choose among `experts` by their positions."""
    tables = [None if table is None else table.double() for table in layer.of(experts)]
    return reference.sparse_ffn(x.double(), *tables, local_ids, counts, activation, num_experts=len(experts))


def check(candidate: Candidate, inputs: list[Inputs], tolerance: float) -> None:
    """Notes the candidate's largest relative error, or the reason why it cannot be timed."""
    candidate.error, errors = None, []
    if not candidate.required:
        tolerance *= BASELINE_TOLERANCE
    try:
        for index, (call, given) in enumerate(zip(candidate.calls, inputs[: len(candidate.calls)], strict=True)):
            y = call()
            expected = candidate.expected[index] if candidate.expected else given.expected
            if isinstance(y, tuple):
                y, counts = y
                if not torch.equal(counts, given.counts):
                    raise RuntimeError(f"expected counts {given.counts.tolist()}, got {counts.tolist()}")
            errors.append(((y.double() - expected).norm() / expected.norm()).item())
        candidate.error = math.nan if any(map(math.isnan, errors)) else max(errors)
        if not candidate.error <= tolerance:
            raise RuntimeError(f"expected a relative error of at most {tolerance:.0e}, got {candidate.error:.1e}")
    except (RuntimeError, ValueError) as error:
        candidate.skipped = str(error).splitlines()[0]
    if candidate.skipped and candidate.required:
        raise SystemExit(f"{candidate.name}: {candidate.skipped}; nothing is timed.")


def linear_ffn(x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, activation: str) -> Tensor:
    act = reference.ACTIVATIONS[activation]
    h = act(F.linear(x, up)) if gate is None else act(F.linear(x, gate)) * F.linear(x, up)
    return F.linear(h, down)


def onednn_ffn(x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, activation: str) -> Tensor:
    """The weights are as `_reorder_linear_weight` gives them."""
    linear, act = torch.ops.mkldnn._linear_pointwise.default, ONEDNN_ACTIVATIONS[activation]
    if gate is None:
        h = linear(x, up, None, act, [], "")
    else:
        h = linear(x, gate, None, act, [], "") * linear(x, up, None, "none", [], "")
    return linear(h, down, None, "none", [], "")


def index_select_ffn(given: Inputs, mask: Tensor, activation: str, transpose: bool) -> Tensor:
    """Copies the experts that any token chose; `mask` [T, experts, 1] says which of them a token chose."""
    gate, up, down_t = given.layer.of(given.union)
    act, x = reference.ACTIVATIONS[activation], given.x
    h = act(F.linear(x, up)) if gate is None else act(F.linear(x, gate)) * F.linear(x, up)
    if len(h) > 1:
        h = (h.unflatten(1, (mask.shape[1], -1)) * mask).flatten(1)
    down = down_t.t()
    return F.linear(h, down.contiguous() if transpose else down)


def grouped_mm_ffn(given: Inputs, token_of: Tensor, ends: Tensor, activation: str) -> Tensor:
    """`token_of` lists the tokens of expert 0, then those of expert 1, …; `ends` [E] is where each list ends."""
    layer, x = given.layer, given.x[token_of]
    gate, up, down = (None if table is None else table.unflatten(0, (layer.num_experts, -1)) for table in layer.tables)
    act = reference.ACTIVATIONS[activation]

    def project(table: Tensor) -> Tensor:
        return F.grouped_mm(x, table.transpose(1, 2), offs=ends)

    h = act(project(up)) if gate is None else act(project(gate)) * project(up)
    width = h.shape[1]
    h = F.pad(h, (0, -width % 8))[:, :width]  # grouped_mm wants rows that are a multiple of 16 bytes apart
    y = F.grouped_mm(h, down, offs=ends)
    total = torch.zeros(given.x.shape, dtype=torch.float32, device=y.device)
    return total.index_add_(0, token_of, y.float()).to(y.dtype)


def pruned_candidate(inputs: list[Inputs], activation: str) -> Candidate:
    """A dense FFN of the experts that the first token chose, the weights packed beforehand where oneDNN can."""
    pruned = Candidate("pruned", [], 0, expected=[])
    for given in inputs:
        chosen = given.expert_ids[0, : int(given.counts[0])]
        ids = torch.arange(len(chosen), device=chosen.device).expand(len(given.x), -1)
        pruned.expected.append(reference_ffn(given.layer, chosen, given.x, ids, given.counts, activation))
        gate, up, down_t = given.layer.of(chosen)
        weights = [gate, up, down_t.t().contiguous()]
        pruned.nbytes = sum(weight.nbytes for weight in weights if weight is not None)
        pruned.calls.append(fastest_dense(given.x, weights, activation))
    return pruned


def fastest_dense(x: Tensor, weights: list[Tensor | None], activation: str) -> Callable[[], Tensor]:
    if x.is_cuda or activation not in ONEDNN_ACTIVATIONS:
        return partial(linear_ffn, x, *weights, activation)
    try:
        return partial(onednn_ffn, x, *pack_onednn(weights, len(x)), activation)
    except (AttributeError, RuntimeError):  # no oneDNN in this torch; a dtype that this processor lacks
        return partial(linear_ffn, x, *weights, activation)


def pack_onednn(weights: list[Tensor | None], batch: int) -> list[Tensor | None]:
    reorder = torch.ops.mkldnn._reorder_linear_weight.default
    return [None if weight is None else reorder(weight, batch) for weight in weights]


def dense_candidates(inputs: list[Inputs], activation: str) -> list[Candidate]:
    """The dense FFNs; `inputs` select every expert."""
    nbytes = inputs[0].layer.nbytes
    linear = Candidate("F.linear", [], nbytes, dense=True)
    onednn = Candidate("oneDNN prepacked", [], nbytes, dense=True)
    for given in inputs:
        weights = [given.layer.gate, given.layer.up, given.layer.down_t.t().contiguous()]
        linear.calls.append(partial(linear_ffn, given.x, *weights, activation))
        if given.x.is_cuda:
            continue
        if activation not in ONEDNN_ACTIVATIONS:
            onednn.skipped = f"oneDNN fuses no {activation}"
        if onednn.skipped:
            continue
        try:
            packed = pack_onednn(weights, len(given.x))
        except (AttributeError, RuntimeError) as error:  # no oneDNN in this torch; a dtype that this processor lacks
            onednn.skipped = str(error).splitlines()[0]
        else:
            onednn.calls.append(partial(onednn_ffn, given.x, *packed, activation))
    return [linear] if inputs[0].x.is_cuda else [linear, onednn]


def operators(inputs: list[Inputs], activation: str, nbytes: float) -> list[Candidate]:
    """`routed_ffn` and `sparse_ffn` of every backend of the device. On a CPU they have to pass their check."""
    device = inputs[0].x.device
    candidates = []
    for name in ("cpu",) if device.type == "cpu" else ("cuda", "triton"):
        suffix = "" if device.type == "cpu" else f" {name}"
        routed = Candidate(f"routed_ffn{suffix}", [], nbytes + inputs[0].layer.router_nbytes)
        sparse = Candidate(f"sparse_ffn{suffix}", [], nbytes)
        candidates += [routed, sparse]
        try:
            backend = ops.resolve_backend(device, name)
        except BackendError as error:
            routed.skipped = sparse.skipped = f"not available: {error}"
            continue
        if backend.sparse_ffn is reference.sparse_ffn:
            routed.skipped = sparse.skipped = f"not available: {name} has no such kernel"
            continue
        routed.required = sparse.required = device.type == "cpu"
        for given in inputs:
            x, layer = given.x, given.layer
            arguments = (x, *layer.router, given.threshold, *layer.tables, activation)
            routed.calls.append(partial(backend.routed_ffn, *arguments, **layer.router_options))
            selection = (given.expert_ids, given.counts, activation)
            sparse.calls.append(
                partial(backend.sparse_ffn, x, *layer.tables, *selection, num_experts=layer.num_experts)
            )
    return candidates


class MixtureOfExperts:
    """What transformers' expert kernels read of a module of theirs, whose weights they want in another layout."""

    has_bias = is_transposed = has_post_expert_norm = False
    is_concatenated = True

    def __init__(self, layer: Layer, activation: str) -> None:
        self.num_experts = layer.num_experts
        self.has_gate = layer.gate is not None
        self.act_fn = reference.ACTIVATIONS[activation]
        tables = [None if table is None else table.unflatten(0, (self.num_experts, -1)) for table in layer.tables]
        # [E, 2·n, H], an expert's gates before its ups, or [E, n, H]
        self.gate_up_proj = self.up_proj = torch.cat([table for table in tables[:2] if table is not None], 1)
        self.down_proj = tables[2].transpose(1, 2).contiguous()

    def _apply_gate(self, pre: Tensor) -> Tensor:
        gate, up = pre.chunk(2, dim=-1)
        return self.act_fn(gate) * up


def transformers_candidates(inputs: list[Inputs], activation: str, nbytes: float) -> list[Candidate]:
    """transformers' kernels, which scale every expert's output by a weight: 1 here."""
    batched = Candidate("transformers batched", [], nbytes)
    grouped = Candidate("transformers grouped", [], nbytes)
    try:
        from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward
    except ImportError:
        batched.skipped = grouped.skipped = "not available: this transformers has none, or is not installed"
        return [batched, grouped]
    if inputs[0].layer.width < MIN_GROUPED_WIDTH:
        batched.skipped = grouped.skipped = f"for experts of at least {MIN_GROUPED_WIDTH} neurons"
        return [batched, grouped]
    for given in inputs:
        experts = MixtureOfExperts(given.layer, activation)
        chosen = given.expert_ids[:, : int(given.counts[0])].long()
        weights = torch.ones_like(chosen, dtype=given.x.dtype)
        batched.calls.append(partial(batched_mm_experts_forward, experts, given.x, chosen, weights))
        grouped.calls.append(partial(grouped_mm_experts_forward, experts, given.x, chosen, weights))
    return [batched, grouped]


def sparse_candidates(inputs: list[Inputs], activation: str) -> list[Candidate]:
    """The operators, which have to pass their check, and what one would write without them."""
    nbytes = statistics.mean(given.nbytes for given in inputs)
    grouped = Candidate("F.grouped_mm", [], nbytes)
    selected = Candidate("index_select", [], nbytes)
    transposed = Candidate("index_select (T)", [], nbytes)
    if not hasattr(F, "grouped_mm"):
        grouped.skipped = "this torch has no F.grouped_mm"
    elif inputs[0].layer.width < MIN_GROUPED_WIDTH:
        grouped.skipped = f"for experts of at least {MIN_GROUPED_WIDTH} neurons"
    for given in inputs:
        x, layer = given.x, given.layer
        chosen = torch.zeros(len(x), len(given.union), dtype=torch.bool, device=x.device)
        chosen.scatter_(1, given.local_ids, True)
        mask = chosen.to(x.dtype)[:, :, None]
        selected.calls.append(partial(index_select_ffn, given, mask, activation, False))
        transposed.calls.append(partial(index_select_ffn, given, mask, activation, True))
        experts, token_of = chosen.t().nonzero(as_tuple=True)
        sizes = given.union[experts].bincount(minlength=layer.num_experts)
        grouped.calls.append(partial(grouped_mm_ffn, given, token_of, sizes.cumsum(0).int(), activation))
    pruned = pruned_candidate(inputs, activation)
    candidates = [*operators(inputs, activation, nbytes), pruned, grouped, selected, transposed]
    if inputs[0].x.is_cuda:
        candidates += transformers_candidates(inputs[:2], activation, nbytes)
    return candidates


def make_probe(nbytes: int, device: torch.device) -> list[Candidate]:
    """Calls that read `nbytes` once and do next to nothing else, the fastest at the read bandwidth; and a copy."""
    columns = 4096
    buffer = torch.rand(nbytes // (4 * columns), columns, device=device)
    vector = torch.rand(columns, device=device)
    half = buffer.view(2, -1)
    return [
        Candidate("sum", [buffer.sum], buffer.nbytes),
        Candidate("matrix-vector product", [partial(torch.mv, buffer, vector)], buffer.nbytes),
        Candidate("largest", [buffer.amax], buffer.nbytes),
        Candidate(COPY, [partial(half[0].copy_, half[1])], buffer.nbytes),
    ]


def prepare(candidate: Candidate, device: torch.device) -> Callable[[], float] | None:
    """What runs a round of the candidate and returns the seconds of a call; None, the reason noted, if it cannot."""
    calls = candidate.calls
    if device.type == "cuda":
        try:
            return graph_seconds(calls)
        except RuntimeError as error:
            candidate.skipped = f"no CUDA graph: {str(error).splitlines()[0]}"
            return None
    if not candidate.required:
        calls = calls[: max(1, int(BASELINE_ROUND_SECONDS / seconds(calls[0])))]
    return lambda: seconds(lambda: [call() for call in calls]) / len(calls)


def medians(candidates: list[Candidate], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds a call; the candidates take turns, so that a busy machine slows all of them alike."""
    rounds = {c.name: prepare(c, device) for c in candidates if not c.skipped}
    times = {name: [] for name, run in rounds.items() if run is not None}
    for _ in range(repeats):
        for name, samples in times.items():
            samples.append(rounds[name]())
    return {name: statistics.median(samples) for name, samples in times.items()}


def measure(candidates: list[Candidate], probe: list[Candidate], repeats: int, facts: dict) -> list[dict]:
    """A row for each candidate: `facts`, then what was measured, None where it was not."""
    taken = medians(candidates + probe, repeats, torch.device(facts["device"]))
    rates = {c.name: c.nbytes / taken[c.name] for c in probe if c.name in taken}
    copy = rates.pop(COPY)
    bandwidth = max(rates.values())
    best_dense = min((taken[c.name] for c in candidates if c.dense and c.name in taken), default=None)
    rows = []
    for candidate in candidates:
        time = taken.get(candidate.name)
        rate = None if time is None else candidate.nbytes / time
        rows.append(
            {
                **facts,
                "probe_gb_per_s": bandwidth / 1e9,
                "copy_gb_per_s": copy / 1e9,
                "candidate": candidate.name,
                "dense": candidate.dense,
                "mb": candidate.nbytes / 1e6,
                "us": time and 1e6 * time,
                "gb_per_s": rate and rate / 1e9,
                "share_of_probe": rate and rate / bandwidth,
                "speedup_over_best_dense": time and best_dense and best_dense / time,
                "relative_error": candidate.error,
                "skipped": candidate.skipped,
            }
        )
    return rows


def print_rows(rows: list[dict]) -> None:
    fact = rows[0]
    print(
        f"\n$ {fact['command']}\n"
        f"{fact['shape']}, {fact['dtype']}, batch {fact['batch']}, "
        f"{'' if fact['threads'] is None else 'threads ' + str(fact['threads']) + ': '}"
        f"{fact['count']} of {fact['experts']} experts a token, {fact['union_percent']:.1f} % of the weights a call, "
        f"{fact['layers']} layers, {fact['caches_a_round']:.1f} caches a round, "
        f"probe {fact['probe_gb_per_s']:.1f} GB/s, copy {fact['copy_gb_per_s']:.1f} GB/s\n"
        "  candidate                   µs     GB/s  of probe  vs dense    error"
    )
    for row in rows:
        if row["skipped"]:
            print(f"  {row['candidate']:<20} skipped: {row['skipped']}")
            continue
        ratio = row["speedup_over_best_dense"]
        print(
            f"  {row['candidate']:<20} {row['us']:9.1f} {row['gb_per_s']:8.1f} {row['share_of_probe']:8.0%} "
            f"{'-' if ratio is None else f'{ratio:.2f}x':>10} {row['relative_error']:9.1e}",
            flush=True,
        )


def count_layers(layer_bytes: int, read_bytes: float, memory_bytes: float, device: str) -> int:
    """Layers that make a round read enough, or as many as the memory holds."""
    enough = math.ceil(CACHES_A_ROUND * last_level_cache_bytes(device) / read_bytes)
    return max(1, min(enough, int(memory_bytes // layer_bytes)))


def count_experts(active: int, num_experts: int) -> int:
    return max(1, round(active / 100 * num_experts))


def plan(name: str, dtype: torch.dtype, args: argparse.Namespace) -> tuple[int, int, int]:
    """Bytes of a layer, the number of layers, and how many of them are held as dense ones too."""
    shape = SHAPES[name]
    if shape.intermediate_size % args.expert_width:
        raise SystemExit(
            f"{name}: expected --expert-width to divide {shape.intermediate_size}, got {args.expert_width}."
        )
    num_experts = shape.intermediate_size // args.expert_width
    layer_bytes = shape.intermediate_size * (2 + shape.gated) * shape.hidden_size * dtype.itemsize
    # The probe's buffer and the float64 reference of a layer come off first.
    reserved = CACHES_A_ROUND * last_level_cache_bytes(args.device) + layer_bytes * 8 // dtype.itemsize
    memory = 1e9 * args.memory - reserved
    if memory < 3 * layer_bytes:
        needed = (reserved + 3 * layer_bytes) / 1e9
        raise SystemExit(f"{name} in {dtype}: expected --memory of at least {needed:.1f} (GB), got {args.memory:g}.")
    # Dense layers are held twice, as they are and packed for oneDNN.
    num_dense = count_layers(2 * layer_bytes, layer_bytes, memory / 3, args.device)
    smallest = layer_bytes * min(count_experts(active, num_experts) for active in args.active) / num_experts
    num_layers = count_layers(layer_bytes, smallest, memory - 2 * num_dense * layer_bytes, args.device)
    return layer_bytes, max(num_layers, num_dense), num_dense


def bench_shape(name: str, dtype_name: str, args: argparse.Namespace) -> list[dict]:
    shape, dtype, device = SHAPES[name], getattr(torch, dtype_name), torch.device(args.device)
    tolerance = TOLERANCES[dtype_name]
    num_experts = shape.intermediate_size // args.expert_width
    counts = {active: count_experts(active, num_experts) for active in args.active}
    layer_bytes, num_layers, num_dense = plan(name, dtype, args)
    layers = [
        Layer.random(shape, args.expert_width, args.router_rank, args.router_form, dtype, device, args.seed + index)
        for index in range(num_layers)
    ]
    probe = make_probe(max(2**30, CACHES_A_ROUND * last_level_cache_bytes(args.device)), device)

    rows = []
    for batch in args.batch:

        def inputs_of(number: int, count: int, batch: int = batch) -> list[Inputs]:
            return [
                make_inputs(layer, count, batch, args.correlation, shape.activation, args.seed + 1000 + index)
                for index, layer in enumerate(layers[:number])
            ]

        prefill = PREFILL_LAYERS if batch > MEMORY_BOUND_TOKENS else num_layers
        dense_inputs = inputs_of(min(num_dense, prefill), num_experts)
        dense = dense_candidates(dense_inputs, shape.activation)
        sparse = {}
        for active, count in counts.items():
            held = num_layers * layer_bytes
            number = count_layers(layer_bytes, layer_bytes * count / num_experts, held, args.device)
            inputs = inputs_of(min(number, prefill), count)
            sparse[active] = inputs, sparse_candidates(inputs, shape.activation)
        for threads in args.threads:
            if threads is not None:
                torch.set_num_threads(threads)
            # Checked again with every number of threads, which divides the work in another way.
            for candidate in dense:
                if not candidate.skipped:
                    check(candidate, dense_inputs, tolerance)
            for active, (inputs, candidates) in sparse.items():
                for candidate in candidates:
                    if not candidate.skipped:
                        check(candidate, inputs, tolerance)
                read = sum(given.nbytes for given in inputs)
                facts = {
                    "command": f"python benchmarks/ffn.py --device {args.device} --shapes {name} --active {active} "
                    f"--batch {batch} --dtype {dtype_name} {f'--threads {threads} ' if threads else ''}"
                    f"--expert-width {args.expert_width} --router-rank {args.router_rank} "
                    f"--router-form {args.router_form} "
                    f"--correlation {args.correlation:g} --memory {args.memory:g} --repeats {args.repeats} "
                    f"--seed {args.seed}",
                    "device": args.device,
                    "shape": name,
                    "hidden_size": shape.hidden_size,
                    "intermediate_size": shape.intermediate_size,
                    "gated": shape.gated,
                    "activation": shape.activation,
                    "dtype": dtype_name,
                    "batch": batch,
                    "threads": threads,
                    "experts": num_experts,
                    "expert_width": args.expert_width,
                    "router_rank": args.router_rank,
                    "router_form": args.router_form,
                    "count": counts[active],
                    "active_percent": 100 * counts[active] / num_experts,
                    "union_percent": 100 * read / (len(inputs) * layer_bytes),
                    "layers": len(inputs),
                    "caches_a_round": read / last_level_cache_bytes(args.device),
                }
                rows.extend(measure(candidates + dense, probe, args.repeats, facts))
                print_rows(rows[-len(candidates + dense) :])
        del dense  # the packed weights, before the next batch's are made
    return rows


def overhead() -> float:
    """Microseconds of a `routed_ffn` call whose FFN is too small to matter, on one thread."""
    torch.set_num_threads(1)
    layer = Layer.random(Shape(32, 64, True, "silu"), 8, 4, "linear", torch.bfloat16, torch.device("cpu"), 0)
    x = torch.randn(1, 32).bfloat16()
    op = torch.ops.prunepath.routed_ffn.default
    call = partial(op, x, *layer.router, torch.ones(()), *layer.tables, "silu")
    return 1e6 * statistics.median(seconds(call, 2000) for _ in range(11))


def write_csv(path: str, rows: list[dict]) -> None:
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def plot(path: str, rows: list[dict]) -> None:
    """Time over active fraction, a panel for each shape, dtype, batch and number of threads."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PrunePathError("Plots need matplotlib, which is not installed (pip install matplotlib).") from error

    panels: dict[tuple, list[dict]] = {}
    for row in rows:
        if not row["skipped"]:
            panels.setdefault((row["shape"], row["dtype"], row["batch"], row["threads"] or "-"), []).append(row)
    columns = min(4, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4 * columns, 3.2 * lines + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False).flat
    names = list(dict.fromkeys(row["candidate"] for row in rows))
    drawn = {}
    for axis, ((shape, dtype, batch, threads), panel) in zip(axes, panels.items(), strict=False):
        for index, name in enumerate(names):
            points = sorted((row["active_percent"], row["us"]) for row in panel if row["candidate"] == name)
            if points:
                style = "s--" if any(row["dense"] for row in panel if row["candidate"] == name) else "o-"
                drawn[name] = axis.plot(*zip(*points, strict=True), style, color=f"C{index}", markersize=4)[0]
        floor = sorted(
            (row["active_percent"], row["us"] * row["share_of_probe"])
            for row in panel
            if row["candidate"] == next(r["candidate"] for r in panel if r["candidate"].startswith("sparse_ffn"))
        )
        drawn["bytes / probe"] = axis.plot(*zip(*floor, strict=True), ".:", color="black")[0]
        axis.set_title(f"{shape}, {dtype}, batch {batch}, threads {threads}", fontsize=9)
        axis.set_xlabel("active experts of a token (%)")
        axis.set_xlim(0, 103)
        axis.set_ylabel("µs a call")
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    for axis in list(axes)[len(panels) :]:
        axis.set_visible(False)
    figure.legend(list(drawn.values()), list(drawn), loc="outside lower center", ncols=min(len(drawn), 2 * columns))
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=144)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--shapes", type=choices(SHAPES), default=list(SHAPES), help=f"comma-separated: {', '.join(SHAPES)}"
    )
    parser.add_argument(
        "--active", type=whole_numbers, default=[10, 25, 50, 100], help="percent of the experts, comma-separated"
    )
    parser.add_argument(
        "--batch",
        type=whole_numbers,
        help="tokens in a call, comma-separated; unless given 1 on a CPU, and 1,4,8,32 on a GPU",
    )
    parser.add_argument(
        "--dtype", type=choices(TOLERANCES), default=["bfloat16"], help=f"comma-separated: {', '.join(TOLERANCES)}"
    )
    parser.add_argument("--threads", type=whole_numbers, help="of a CPU, comma-separated")
    parser.add_argument("--expert-width", type=int, default=1, help="neurons of an expert")
    parser.add_argument("--router-rank", type=int, default=256, help="0: full rank")
    parser.add_argument(
        "--router-form",
        choices=("linear", "factored"),
        help="what conversion makes unless given: factored for experts of one neuron",
    )
    parser.add_argument(
        "--correlation",
        type=float,
        default=0.0,
        help="of the inputs of a batch, 0 to 1: at 0 its tokens choose experts independently, at 1 the same ones",
    )
    parser.add_argument(
        "--memory",
        type=float,
        help="GB that may be used; half of what is available unless given",
    )
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--csv", help="write the rows here")
    parser.add_argument("--plot", help="draw the rows here; the suffix picks the format")
    parser.add_argument("--quick", action="store_true", help="one small shape, two rounds: to see that it runs")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch sees no GPU")
    if args.quick:
        args.shapes, args.repeats, args.active = ["t5-large"], 2, args.active[:2]
    args.batch = args.batch or {"cpu": [1], "cuda": [1, 4, 8, 32]}[args.device]
    args.threads = [None] if args.device == "cuda" else args.threads or [torch.get_num_threads()]
    args.router_form = args.router_form or ("factored" if args.expert_width == 1 else "linear")
    args.memory = args.memory or round(available_memory_bytes(args.device) / 2e9, 1)
    if not all(1 <= active <= 100 for active in args.active):
        parser.error(f"argument --active: expected percentages from 1 to 100, got {args.active}")
    if not 0 <= args.correlation <= 1:
        parser.error(f"argument --correlation: expected a number from 0 to 1, got {args.correlation}")
    if (
        min(*args.batch, *[threads or 1 for threads in args.threads], args.expert_width, args.repeats) < 1
        or args.router_rank < 0
    ):
        parser.error(
            "expected batches, threads, expert width and repeats of at least 1, and a router rank of at least 0"
        )
    for path in (args.json, args.csv, args.plot):
        if path and not Path(path).absolute().parent.is_dir():
            parser.error(f"the folder of {path} does not exist")
    native.require()

    runs = [(name, dtype_name) for name in args.shapes for dtype_name in args.dtype]
    for name, dtype_name in runs:
        plan(name, getattr(torch, dtype_name), args)  # so that what cannot run is said before any work

    print(machine(args.device))
    rows = []
    for name, dtype_name in runs:
        rows.extend(bench_shape(name, dtype_name, args))
    tiny = {"routed_ffn": overhead()} if args.device == "cpu" else {}
    for name, us in tiny.items():
        print(f"\nOverhead of a {name} call on a tiny FFN: {us:.1f} µs")
    if args.json:
        write_json(args.json, {"machine": machine(args.device), "date": today(), "rows": rows, "overhead": tiny})
    if args.csv:
        write_csv(args.csv, rows)
    if args.plot:
        plot(args.plot, rows)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
