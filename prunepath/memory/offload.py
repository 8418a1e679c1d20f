"""Expert offloading: all experts in pinned host memory, the hot ones in a cache on the GPU."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from prunepath import ops
from prunepath.errors import PrunePathError
from prunepath.nn import SparseFFN, sparse_ffns

_PER_EXPERT = ("b_in", "center")  # the options of `ops.sparse_ffn` that have a row for each expert


@dataclasses.dataclass
class CacheStatistics:
    """What a cache did.

    Attributes:
        hits, misses: experts that a call needed and that were in the cache, or were not and had to be waited for.
        prefetched: experts that were fetched early, because the router of the FFN guessed them.
        prefetched_used: of those, how many were needed before they left again; they count as hits.
        moved_bytes: all that was fetched.
    """

    hits: int = 0
    misses: int = 0
    prefetched: int = 0
    prefetched_used: int = 0
    moved_bytes: int = 0

    @property
    def hit_rate(self) -> float:
        """hits / (hits + misses), NaN before the first call."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else math.nan


@dataclasses.dataclass(frozen=True)
class Call:
    """What one call of an FFN asks of a cache.

    Attributes:
        ffn: which FFN of the model.
        needed: the experts that its tokens run, in ascending order.
        guessed: the experts that its tokens might run in the next FFN, in ascending order.
    """

    ffn: int
    needed: Sequence[int]
    guessed: Sequence[int] = ()


class SlotTable:
    """Which expert is in which slot of a cache. The one that was used longest ago leaves first.

    It holds no weights, so that a cache of any size can be simulated from the calls that a model made.

    Args:
        slots: how many experts fit; at least as many as any call needs.
        expert_bytes: what fetching one moves.
    """

    def __init__(self, slots: int, expert_bytes: int) -> None:
        self.expert_bytes = expert_bytes
        self.statistics = CacheStatistics()
        self._free = list(range(slots))[::-1]
        self._slots: collections.OrderedDict[tuple[int, int], int] = collections.OrderedDict()  # oldest use first
        self._unused: set[tuple[int, int]] = set()  # prefetched, and not needed yet

    def use(self, ffn: int, experts: Sequence[int]) -> list[tuple[int, int]]:
        """Makes `experts` the last used ones.

        Returns:
            (expert, slot) of those that have to be fetched.
        """
        missing = [expert for expert in experts if not self._touch((ffn, expert))]
        used = [(ffn, expert) for expert in experts if (ffn, expert) in self._unused]
        self._unused.difference_update(used)
        self.statistics.prefetched_used += len(used)
        self.statistics.hits += len(experts) - len(missing)
        self.statistics.misses += len(missing)
        fetched = [(expert, self._take((ffn, expert))) for expert in missing]
        for expert in experts:  # those of one call leave in their own order, whichever were there
            self._slots.move_to_end((ffn, expert))
        return fetched

    def prefetch(self, ffn: int, experts: Sequence[int], keep: int) -> list[tuple[int, int]]:
        """Makes room for `experts`, as many as fit beside the `keep` that were used last.

        Returns:
            As `use`.
        """
        missing = [expert for expert in experts if not self._touch((ffn, expert))]
        room = len(self._slots) + len(self._free) - keep - (len(experts) - len(missing))
        missing = missing[: max(0, room)]
        self._unused.update((ffn, expert) for expert in missing)
        self.statistics.prefetched += len(missing)
        return [(expert, self._take((ffn, expert))) for expert in missing]

    def slot(self, ffn: int, expert: int) -> int:
        """Where an expert is that is in the cache."""
        return self._slots[ffn, expert]

    def _touch(self, key: tuple[int, int]) -> bool:
        if key not in self._slots:
            return False
        self._slots.move_to_end(key)
        return True

    def _take(self, key: tuple[int, int]) -> int:
        if self._free:
            slot = self._free.pop()
        else:
            former, slot = self._slots.popitem(last=False)
            self._unused.discard(former)
        self._slots[key] = slot
        self.statistics.moved_bytes += self.expert_bytes
        return slot


def simulate(calls: Iterable[Call], slots: int, expert_bytes: int = 0) -> CacheStatistics:
    """What a cache of `slots` experts, of `expert_bytes` each, would do in these calls of a model without one."""
    table = SlotTable(slots, expert_bytes)
    for call in calls:
        table.use(call.ffn, call.needed)
        table.prefetch(call.ffn + 1, call.guessed, keep=len(call.needed))
    return table.statistics


class ExpertCache:
    """The hot experts of a model in a device's memory, as the `run` hook of its FFNs.

    The router says which experts a call needs. Those that are missing are copied from host memory on a stream of their
    own; and behind them, while this FFN computes, those that the next FFN's router would choose for this one's input.
    To know what is missing, every call waits for the device once.

    Args:
        ffns: in the order in which the model calls them, packed, their experts of one shape.
        slots: how many experts to hold; at least as many as an FFN has.
        device: where they are computed.
        prefetch: whether to guess.

    Attributes:
        slots: how many experts fit.
        calls: None, or a list that every call is added to.
    """

    def __init__(self, ffns: Sequence[SparseFFN], slots: int, device: torch.device, *, prefetch: bool = True) -> None:
        self.slots = slots
        self.calls: list[Call] | None = None
        self._index = {ffn: index for index, ffn in enumerate(ffns)}
        self._next = dict(itertools.pairwise(ffns)) if prefetch else {}
        self._experts = [_parts(ffn, *ffn.operands()) for ffn in ffns]
        self._table = SlotTable(slots, expert_bytes(ffns[0]))
        self._sparse_ffn = ops.resolve_backend(ffns[0].backend, device).sparse_ffn
        self._b_out = [ffn.operands()[2].get("b_out") for ffn in ffns]

        def hold(tensor: torch.Tensor) -> torch.Tensor:
            return torch.empty((slots, *tensor.shape[1:]), dtype=tensor.dtype, device=device)

        w_in, w_out, options = ffns[0].operands()
        if ffns[0].layout.is_fused:  # gates and ups apart, as in the matrix of both
            shape = (2, slots, w_in.shape[1], w_in.shape[3])
            self._w_in = torch.empty(shape, dtype=w_in.dtype, device=device).permute(1, 2, 0, 3)
        else:
            self._w_in = hold(w_in)
        self._w_out = hold(w_out)
        self._options = {name: hold(options[name]) for name in _PER_EXPERT if name in options}
        self._slots = _parts(ffns[0], self._w_in, self._w_out, self._options)
        # For each FFN the slots where its experts were when last used, and -1 at the end, where the id -1 finds it.
        self._slot_ids = [[-1] * (ffn.num_experts + 1) for ffn in ffns]
        self._device_slot_ids = [torch.tensor(ids, dtype=torch.int32, device=device) for ids in self._slot_ids]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def statistics(self) -> CacheStatistics:
        """What the cache did so far."""
        return self._table.statistics

    def __call__(self, ffn: SparseFFN, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(y [T, H], counts int32 [T]) of x [T, H], as of `ops.routed_ffn`."""
        index = self._index[ffn]
        expert_ids, _, counts = ffn.route(x)
        call = self._read_call(index, ffn, expert_ids, x)
        if self.calls is not None:
            self.calls.append(call)
        missing = self._table.use(index, call.needed)
        slots = [self._table.slot(index, expert) for expert in call.needed]
        ahead = self._table.prefetch(index + 1, call.guessed, keep=len(call.needed))
        if self._stream is None:
            self._fetch(index, missing)
            self._fetch(index + 1, ahead)
        else:
            computing = torch.cuda.current_stream(self._stream.device)
            self._stream.wait_stream(computing)  # nothing is overwritten that it still reads
            with torch.cuda.stream(self._stream):
                self._fetch(index, missing)
                arrived = self._stream.record_event()  # what was fetched ahead for this call came before
                self._fetch(index + 1, ahead)
            computing.wait_event(arrived)
        slot_ids = self._find(index, call.needed, slots)[expert_ids.long()]
        y = self._sparse_ffn(
            x,
            self._w_in,
            self._w_out,
            slot_ids,
            counts,
            ffn.layout.activation,
            b_out=self._b_out[index],
            **self._options,
        )
        return y, counts

    def _read_call(self, index: int, ffn: SparseFFN, expert_ids: torch.Tensor, x: torch.Tensor) -> Call:
        masks = [_chosen(expert_ids, ffn.num_experts)]
        following = self._next.get(ffn)
        if following is not None:
            masks.append(_chosen(following.route(x)[0], following.num_experts))
        experts = [mask.nonzero().flatten().tolist() for mask in torch.cat(masks).cpu().split([len(m) for m in masks])]
        return Call(index, *experts)

    def _fetch(self, index: int, experts: Sequence[tuple[int, int]]) -> None:
        for expert, slot in experts:
            for source, target in zip(self._experts[index], self._slots, strict=True):
                target[slot].copy_(source[expert], non_blocking=True)

    def _find(self, index: int, experts: Sequence[int], slots: Sequence[int]) -> torch.Tensor:
        """Expert id -> slot on the device, int32 [E + 1], right for these experts."""
        known = self._slot_ids[index]
        if any(known[expert] != slot for expert, slot in zip(experts, slots, strict=True)):
            for expert, slot in zip(experts, slots, strict=True):
                known[expert] = slot
            self._device_slot_ids[index].copy_(torch.tensor(known, dtype=torch.int32), non_blocking=True)
        return self._device_slot_ids[index]


def offload_experts(
    model: nn.Module, limit: int, device: torch.device | str = "cuda", *, prefetch: bool = True
) -> ExpertCache:
    """Moves a sparse model to a device, all but its experts, of which it keeps the most recently used ones there.

    The experts stay in pinned host memory. Every token runs the experts that it would run without the cache, on one
    sparse operator call a layer; sums over them may be rounded in another order. For inference: gradients, CUDA graphs
    and torch.compile need the experts in place. Moving the model (`model.to`) ends the offloading.

    Args:
        model: a sparse model on the CPU; packed checkpoints are read into memory as a whole.
        limit: bytes of the device's memory for experts, enough for those of one FFN.
        device: a GPU; on a CPU the cache works all the same, and gains nothing.
        prefetch: guess each FFN's experts by its router one FFN early, and fetch them while that one computes.

    Returns:
        The cache, with its `statistics`.

    Raises:
        PrunePathError: a dense model, one whose experts cannot be packed or differ in shape, or a limit too small.
    """
    ffns = list(sparse_ffns(model).values())
    device = torch.device(device)
    if not ffns:
        raise PrunePathError(f"Expected a sparse model to offload experts of, got a dense {type(model).__name__}.")
    if not all(ffn.pack() for ffn in ffns):
        raise PrunePathError(
            "Expected FFNs of plain linears in one dtype to offload, got others: merge adapters first."
        )
    shapes = {tuple(part.shape[1:]) for ffn in ffns for part in _parts(ffn, *ffn.operands())[:1]}
    if len(shapes) > 1:
        raise PrunePathError(f"Expected experts of one shape to offload, got {sorted(map(list, shapes))}.")
    size, most = expert_bytes(ffns[0]), max(ffn.num_experts for ffn in ffns)
    if limit < most * size:
        raise PrunePathError(
            f"Expected room for the {most} experts of an FFN, {most * size} bytes, got a limit of {limit}."
        )
    packed = []
    for ffn in ffns:
        weights = ffn.expert_major()
        mean_output = ffn.mean_output(weights[1])
        ffn.drop_weights()
        if device.type == "cuda":
            weights = [w.pin_memory() for w in weights]
        packed.append((*weights, mean_output))
    model.to(device)
    for ffn, (w_in, w_out, mean_output) in zip(ffns, packed, strict=True):
        ffn.use_packed(w_in, w_out, None if mean_output is None else mean_output.to(device))
    slots = min(limit // size, sum(ffn.num_experts for ffn in ffns))
    cache = ExpertCache(ffns, slots, device, prefetch=prefetch)
    for ffn in ffns:
        ffn.run = cache
    return cache


def expert_bytes(ffn: SparseFFN) -> int:
    """What an expert of a packed FFN takes in the cache."""
    return sum(part[0].numel() * part.element_size() for part in _parts(ffn, *ffn.operands()))


def _parts(ffn: SparseFFN, w_in: torch.Tensor, w_out: torch.Tensor, options: dict[str, torch.Tensor]) -> list:
    """The tensors that make up experts: row e of each is contiguous, and belongs to expert e."""
    inputs = w_in.unbind(2) if ffn.layout.is_fused else [w_in]
    return [*inputs, w_out, *(options[name] for name in _PER_EXPERT if name in options)]


def _chosen(expert_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Which experts are among expert_ids [T, K]: bool [E]."""
    mask = torch.zeros(num_experts + 1, dtype=torch.bool, device=expert_ids.device)
    mask[expert_ids.flatten().long()] = True  # the id -1, which is none, is the last
    return mask[:-1]
