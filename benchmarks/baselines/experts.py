"""What methods that pick experts for each token share: the same experts, any-budget training, calibration, counting."""

from __future__ import annotations

import abc
import os
import random
from collections.abc import Sequence

import torch

from baselines.activations import ffn_inputs
from baselines.base import Batch, Method
from prunepath.checkpoint.description import install
from prunepath.config import PrunePathConfig
from prunepath.conversion.batches import merge
from prunepath.conversion.experts import reorder_neurons
from prunepath.conversion.partition import partition_neurons
from prunepath.errors import PrunePathError
from prunepath.nn import SparseFFN
from prunepath.nn.observers import CountRecord, valid_tokens
from prunepath.train.any_budget import AnyBudgetConfig

_PARTITION_TOKENS = 4096
_SAMPLED_PRIORITIES = 2**20
_TOLERANCE = 0.001
_PASSES = 10


class ExpertMethod(Method):
    """Groups neurons into experts and chooses, per token, which of them run.

    Fine-tuning is PrunePath's any-budget training: each step runs at a budget of its own. A method for one budget
    (`one_checkpoint` false) runs every step at that one.

    Attributes:
        partition: how neurons are grouped, as in `PrunePathConfig`.
        expert_width: neurons of an expert, as the method's paper has them; None for `settings.expert_width`.
        num_experts: experts of an FFN, the other way to say it; None where the width says it.
    """

    one_checkpoint = True
    partition = "coactivation"
    expert_width: int | None = None
    num_experts: int | None = None

    @torch.no_grad()
    def install(self, batches: Sequence[Batch]) -> None:
        if self.num_experts is not None:
            experts = {"num_experts": self.num_experts}
        else:
            experts = {"expert_width": self.expert_width or self.settings.expert_width}
        config = PrunePathConfig(**experts, router_rank=self.settings.router_rank)
        self.ffns: list[SparseFFN] = list(install(self.model, config).values())
        inputs = ffn_inputs(self.model, self.ffns, batches)
        for i, (ffn, x) in enumerate(zip(self.ffns, inputs, strict=True)):
            if ffn.expert_width > 1:
                order = self._partition(i, ffn, ffn.hidden(x[:_PARTITION_TOKENS]).float())
                reorder_neurons(ffn, order.to(x.device))
            ffn.selector = self._select
        self._draws = random.Random(self.settings.seed)
        self._auxiliary: list[torch.Tensor] = []
        self.training = False
        self.step_budget = 1.0
        with torch.random.fork_rng():
            torch.manual_seed(self.settings.seed)
            self.install_routers(inputs)
        self.counts = CountRecord(self.ffns)

    def _partition(self, index: int, ffn: SparseFFN, hidden: torch.Tensor) -> torch.Tensor:
        """The grouping of an FFN's neurons (`group`), from `settings.partitions` if it is there."""
        folder = self.settings.partitions
        path = None if folder is None else folder / f"{self.partition_name()}.{ffn.expert_width}.{index}.pt"
        if path is not None and path.exists():
            return torch.load(path)
        order = self.group(ffn, hidden)
        if path is not None:
            folder.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            torch.save(order, temporary)
            temporary.replace(path)
        return order

    def partition_name(self) -> str:
        """Tells partitions of one width apart in `settings.partitions`."""
        return self.partition

    def group(self, ffn: SparseFFN, hidden: torch.Tensor) -> torch.Tensor:
        """A partition as `partition_neurons` gives it, int64 [D], from activations float32 [P, D]."""
        return partition_neurons(
            self.partition,
            ffn.num_experts,
            intermediate_size=ffn.intermediate_size,
            profiles=hidden,
            weights=ffn.tables()[0].float(),
            seed=self.settings.seed,
        )

    def install_routers(self, inputs: list[torch.Tensor]) -> None:
        """Makes and fits the method's routers, from inputs x [N, H] of each FFN."""

    def router_weights(self, ffn: SparseFFN) -> float:
        """What the method reads to choose experts, in weights of 2 bytes; by default its router's parameters."""
        predictor = getattr(ffn, "predictor", None)
        return 0.0 if predictor is None else sum(p.numel() for p in predictor.parameters())

    def bytes_read(self) -> float:
        return self.active_fraction() + sum(map(self.router_weights, self.ffns)) / sum(map(ffn_weights, self.ffns))

    @abc.abstractmethod
    def choose(self, ffn: SparseFFN, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The experts of x [T, H] with activations `hidden` [T, D]: bool [T, E], or gates of hidden's dtype.

        In training (`self.training`) at `self.step_budget`, otherwise as `set_budget` asked.
        """

    def token_losses(self, ffn: SparseFFN, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor | None:
        """Each token's part of the auxiliary loss, [T], of x [T, H]; padding is left out of their mean."""
        return None

    def _select(self, ffn: SparseFFN, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        valid = valid_tokens(ffn, len(x))
        with torch.autocast(x.device.type, enabled=False):  # half-precision scores tie
            mask = self.choose(ffn, x, hidden)
            losses = self.token_losses(ffn, x, hidden) if self.training else None
        if losses is not None:
            self._auxiliary.append(losses.mean() if valid is None else (losses * valid).sum() / valid.sum())
        if not self.training:
            self.counts.add(ffn, mask.sum(-1))
        return mask

    def before_step(self, progress: float) -> None:
        self.training = True
        self._auxiliary.clear()
        self.step_budget = self.draw_budget(progress) if self.budget is None else self.budget

    def draw_budget(self, progress: float) -> float:
        """The budget of a training step."""
        return draw_budget(self._draws)

    def auxiliary_loss(self) -> torch.Tensor | float:
        if not self._auxiliary:
            return 0.0
        loss = torch.stack(self._auxiliary).mean()
        self._auxiliary.clear()
        return loss

    def set_budget(self, budget: float) -> None:
        self.training = False
        self.counts = CountRecord(self.ffns)


def ffn_weights(ffn: SparseFFN) -> int:
    """The weights of a dense FFN, without its biases."""
    return sum(table.numel() for table in ffn.tables())


class TopK(ExpertMethod):
    """Runs each token's k experts of the highest score, k the same in all layers.

    A budget b asks for κ = b·E experts, seldom a whole number: a token gets ⌊κ⌋ or ⌊κ⌋ + 1, drawn from a hash of its
    own hidden state, so that the mean is κ and neither the batch nor the position matters.
    """

    @abc.abstractmethod
    def scores(self, ffn: SparseFFN, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """A score of each expert, [T, E]; needs no gradient."""

    def choose(self, ffn: SparseFFN, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return largest(self.scores(ffn, x, hidden), x, self.step_budget)

    def calibrate(self, batches: Sequence[Batch]) -> None:
        """k follows from the budget."""

    def set_budget(self, budget: float) -> None:
        super().set_budget(budget)
        self.step_budget = budget


def largest(scores: torch.Tensor, x: torch.Tensor, budget: float, least: float = 1.0) -> torch.Tensor:
    """Each token's max(least, budget·E) experts of the highest score, on average over tokens: bool [T, E]."""
    experts = scores.shape[-1]
    wanted = max(least, budget * experts)
    # Any irrational multiple of a value that varies by much more than 1 after scaling is uniform modulo 1.
    draw = torch.remainder(x[:, :8].float().sum(-1, keepdim=True) * 1618.0339887, 1.0)
    counts = torch.floor(wanted + draw).clamp_(max=experts).long()
    order = scores.argsort(-1, descending=True)
    ranks = torch.arange(experts, device=x.device)
    return torch.zeros_like(order, dtype=torch.bool).scatter_(1, order, ranks < counts)


class ThresholdMethod(ExpertMethod):
    """Runs the experts whose priority is below a threshold, the knob.

    `calibrate` fits one threshold for all layers (`shared`) and one for each layer that gives all of them the same
    active fraction (`per_layer`), on-policy, and keeps for each budget the one with the lower held-out loss, as
    PrunePath does for itself, so that no method is held back by its thresholds. In training the threshold of a layer is
    the budget's quantile over the batch.

    Attributes:
        shapes: which of the two are tried.
    """

    shapes = ("shared", "per_layer")

    @abc.abstractmethod
    def priority(self, ffn: SparseFFN, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The lower, the sooner an expert runs: floating [T, E]; needs no gradient."""

    def install_routers(self, inputs: list[torch.Tensor]) -> None:
        self._thresholds: list[torch.Tensor | float] = [float("inf")] * len(self.ffns)
        self._table: dict[float, list[torch.Tensor]] = {}
        self._priorities: list[list[torch.Tensor]] | None = None

    def choose(self, ffn: SparseFFN, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            priority = self.priority(ffn, x, hidden).float()
            index = self.ffns.index(ffn)
            valid = valid_tokens(ffn, len(x))
            if self.training:
                if self.step_budget >= 1.0:
                    return torch.ones_like(priority, dtype=torch.bool)
                return priority < batch_threshold(priority, valid, self.step_budget)
            if self._priorities is not None:
                # The device would be full of all layers' priorities.
                self._priorities[index].append(sample_values(priority, valid))
            return priority < self._thresholds[index]

    @torch.no_grad()
    def calibrate(self, batches: Sequence[Batch]) -> None:
        batches = [merge(batches)]  # the device is given all there is to do at once
        self.training = False
        self.chosen_shapes: dict[float, str] = {}
        for budget in self.settings.budgets if self.budget is None else (self.budget,):
            fits = {shape: self._fit_thresholds(batches, budget, shape) for shape in self.shapes}
            # A shape that misses the budget, where scores tie, is no candidate unless all do.
            best = min(fits, key=lambda shape: (round(fits[shape][1], 2), fits[shape][2]))
            self.chosen_shapes[budget] = best
            self._table[budget] = fits[best][0]

    def _fit_thresholds(
        self, batches: Sequence[Batch], budget: float, shape: str
    ) -> tuple[list[torch.Tensor], float, float]:
        """Thresholds, how far from the budget they are, and their loss."""
        best = None
        self._thresholds = [float("inf")] * len(self.ffns)
        for _ in range(_PASSES):
            self.counts = CountRecord(self.ffns)
            self._priorities = [[] for _ in self.ffns]
            loss = torch.stack([self.model(**batch).loss.float() for batch in batches]).mean().item()
            miss = abs(self.active_fraction() - budget)
            if best is None or miss < best[1]:
                best = (self._thresholds, miss, loss)
            if miss <= _TOLERANCE:
                break
            priorities = [torch.cat(values) for values in self._priorities]
            if shape == "shared":
                self._thresholds = [self._shared_threshold(priorities, budget)] * len(self.ffns)
            else:
                self._thresholds = [batch_threshold(p, None, budget) for p in priorities]
        self._priorities = None
        return best

    def _shared_threshold(self, priorities: list[torch.Tensor], budget: float) -> torch.Tensor:
        """The threshold below which lies the share `budget` of all priorities, layers weighed by their width."""
        weights = torch.cat(
            [
                torch.full_like(p, ffn.intermediate_size / len(p), dtype=torch.float64)
                for p, ffn in zip(priorities, self.ffns, strict=True)
            ]
        )
        values, order = torch.cat(priorities).sort()
        before = weights[order].cumsum(0) - weights[order]
        rank = torch.searchsorted(before, budget * weights.sum())
        return torch.cat([values, values.new_full((1,), float("inf"))])[rank]

    def set_budget(self, budget: float) -> None:
        super().set_budget(budget)
        if budget >= 1.0:
            self._thresholds = [float("inf")] * len(self.ffns)
        elif budget in self._table:
            self._thresholds = self._table[budget]
        else:
            raise PrunePathError(f"Expected one of the calibrated budgets {sorted(self._table)} or 1.0, got {budget}.")


def batch_threshold(priority: torch.Tensor, valid: torch.Tensor | None, budget: float) -> torch.Tensor:
    """The value below which lies the share `budget` of the priorities [T, ...] of valid tokens; a scalar tensor.

    Of many priorities, a sample tells it (`sample_values`).
    """
    # The host never waits for the device: a tensor indexes by index_select.
    if priority.numel() > _SAMPLED_PRIORITIES:
        priority, valid = sample_values(priority, valid), None
    if valid is not None:
        priority = priority.masked_fill(~valid.unsqueeze(1), float("inf"))
    values = torch.cat([priority.flatten().sort().values, priority.new_full((1,), float("inf"))])
    if valid is None:
        return values[round(priority.numel() * budget)]
    rank = (valid.sum(0, keepdim=True) * (priority.shape[1] * budget)).round().long()
    return values.index_select(0, rank)[0]


def sample_values(values: torch.Tensor, valid: torch.Tensor | None, limit: int = _SAMPLED_PRIORITIES) -> torch.Tensor:
    """All values of valid tokens, or `limit` of them drawn with replacement if there are more: [N].

    Args:
        values: [T, ...].
        valid: bool [T]; None for all. The host waits for it only where there are few values.
    """
    if values.numel() <= limit:
        return (values if valid is None else values[valid]).flatten()
    generator = torch.Generator(values.device).manual_seed(0)  # the same for the same shape
    rows, width = len(values), values[0].numel()
    points = torch.rand(limit, generator=generator, device=values.device)
    if valid is None:
        tokens = (points * rows).long()
    else:
        tokens = torch.searchsorted(valid.cumsum(0), (points * valid.sum()).long(), right=True)
    columns = torch.randint(width, (limit,), generator=generator, device=values.device)
    return values.flatten().index_select(0, tokens.clamp_(max=rows - 1) * width + columns)


def mass_before(shares: torch.Tensor) -> torch.Tensor:
    """The sum of each row's larger shares, [T, E]: an expert of a top-mass selection runs if it is below τ."""
    values, order = shares.sort(-1, descending=True)
    return torch.empty_like(shares).scatter_(1, order, values.cumsum(-1) - values)


def draw_budget(draws: random.Random) -> float:
    """A training step's budget, from the distribution that PrunePath draws from (`AnyBudgetConfig`)."""
    config = AnyBudgetConfig()
    return 1.0 if draws.random() < config.dense_share else config.min_budget ** draws.random()
