"""Structured pruning: the neurons that matter least on average are cut out, for all tokens alike."""

from __future__ import annotations

import abc
import copy
import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from baselines.activations import ffn_inputs
from baselines.base import Batch, Method
from prunepath.errors import PrunePathError
from prunepath.families import find_ffns
from prunepath.nn import FFNLayout

_CHUNK = 4096


@dataclasses.dataclass
class NeuronStatistics:
    """Of the D neurons of one FFN over N tokens, float32 [D] each.

    Attributes:
        mean: of h.
        variance: of h, unbiased.
        mean_magnitude: of |h|.
        norm: ‖h‖₂ over the tokens, divided by √N.
        down: W_down, float32 [H, D].
    """

    mean: torch.Tensor
    variance: torch.Tensor
    mean_magnitude: torch.Tensor
    norm: torch.Tensor
    down: torch.Tensor


@torch.no_grad()
def neuron_statistics(model: nn.Module, batches: Sequence[Batch]) -> list[NeuronStatistics]:
    """Statistics of each of the dense model's FFNs, in the order of its modules."""
    watched = copy.deepcopy(model)  # made of sparse FFNs with one expert, which can be observed in every family
    ffns = [site.install(1) for site in find_ffns(watched)]
    statistics = []
    for ffn, x in zip(ffns, ffn_inputs(watched, ffns, batches), strict=True):
        total = square = magnitude = torch.zeros(ffn.intermediate_size, dtype=torch.float64, device=x.device)
        for chunk in x.split(_CHUNK):
            h = ffn.hidden(chunk).double()
            total, square, magnitude = total + h.sum(0), square + h.square().sum(0), magnitude + h.abs().sum(0)
        n = len(x)
        variance = (square - total.square() / n).clamp(min=0) / max(1, n - 1)
        values = (total / n, variance, magnitude / n, (square / n).sqrt())
        down = ffn.tables()[-1].t()
        statistics.append(NeuronStatistics(*(value.float() for value in values), down.float()))
    return statistics


@torch.no_grad()
def keep_neurons(owner: nn.Module, layout: FFNLayout, kept: torch.Tensor) -> None:
    """Slices an FFN's projections to the neurons `kept`, int64 [K], in place.

    Raises:
        PrunePathError: for a projection that is no `nn.Linear`.
    """
    for name in layout.projections:
        linear = owner.get_submodule(name)
        if not isinstance(linear, nn.Linear):
            raise PrunePathError(f"Expected {name} to be an nn.Linear that can be sliced, got {type(linear).__name__}.")
        if name == layout.down:
            linear.weight = _like(linear.weight, linear.weight[:, kept])
            linear.in_features = len(kept)
        else:
            linear.weight = _like(linear.weight, linear.weight[kept])
            linear.out_features = len(kept)
            if linear.bias is not None:
                linear.bias = _like(linear.bias, linear.bias[kept])


def _like(parameter: nn.Parameter, values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values.contiguous(), requires_grad=parameter.requires_grad)


class StaticPruning(Method):
    """Cuts neurons by a score, down to the checkpoint's budget.

    Attributes:
        across_layers: whether the layers' scores, standardised in each, compete for the budget; otherwise each layer
            keeps the same share.
        compensate: whether the mean output of the pruned neurons is added to the down projection's bias.
    """

    one_checkpoint = False
    across_layers = False
    compensate = False

    @abc.abstractmethod
    def score(self, statistics: NeuronStatistics) -> torch.Tensor:
        """How much each neuron matters: float32 [D]."""

    @torch.no_grad()
    def install(self, batches: Sequence[Batch]) -> None:
        if self.budget is None:
            raise PrunePathError(f"Expected a budget for {self.name}, which makes one checkpoint for each, got None.")
        statistics = neuron_statistics(self.model, batches)
        kept = self._kept([self.score(s) for s in statistics])
        self._fractions = [mask.float().mean().item() for mask in kept]
        self._widths = [len(mask) for mask in kept]
        for site, mask, stats in zip(find_ffns(self.model), kept, statistics, strict=True):
            owner = site.parent._modules[site.name]
            if self.compensate:
                down = owner.get_submodule(site.layout.down)
                missing = (stats.down @ (stats.mean * ~mask)).to(down.weight.dtype)
                if down.bias is None:
                    down.bias = nn.Parameter(missing, requires_grad=down.weight.requires_grad)
                else:
                    down.bias += missing
            keep_neurons(owner, site.layout, mask.nonzero()[:, 0])

    def _kept(self, scores: list[torch.Tensor]) -> list[torch.Tensor]:
        if not self.across_layers:
            return [_largest(score, round(self.budget * len(score))) for score in scores]
        standard = [(s - s.mean()) / s.std().clamp(min=1e-12) for s in scores]
        widths = [len(s) for s in scores]
        masks = list(_largest(torch.cat(standard), round(self.budget * sum(widths))).split(widths))
        return [mask if mask.any() else _largest(s, 1) for mask, s in zip(masks, standard, strict=True)]

    def calibrate(self, batches: Sequence[Batch]) -> None:
        """There is no knob."""

    def set_budget(self, budget: float) -> None:
        if budget != self.budget:
            raise PrunePathError(f"Expected budget {self.budget}, which this model was pruned to, got {budget}.")

    def per_layer(self) -> list[float]:
        return self._fractions

    def active_fraction(self) -> float:
        kept = sum(w * f for w, f in zip(self._widths, self._fractions, strict=True))
        return kept / sum(self._widths)


def _largest(score: torch.Tensor, count: int) -> torch.Tensor:
    """Bool [D], true for the `count` largest; at least one."""
    mask = torch.zeros_like(score, dtype=torch.bool)
    mask[score.topk(max(1, count)).indices] = True
    return mask


class StaticMean(StaticPruning):
    """Score: the mean size of a neuron's contribution, E‖W_down[:, j]·h_j‖₂."""

    name = "static-mean"

    def score(self, statistics: NeuronStatistics) -> torch.Tensor:
        return statistics.mean_magnitude * statistics.down.norm(dim=0)


class StaticWanda(StaticPruning):
    """Wanda (arXiv 2306.11695) made structured as FLAP (arXiv 2312.11983) does for its baseline Wanda-sp.

    Score of a neuron: the sum over its output weights of |W_down[i, j]|·‖h_j‖₂. Every layer keeps the same share.
    """

    name = "static-wanda"

    def score(self, statistics: NeuronStatistics) -> torch.Tensor:
        return statistics.norm * statistics.down.abs().sum(0)


class StaticFLAP(StaticPruning):
    """FLAP (arXiv 2312.11983).

    Score, its fluctuation metric: the variance of h_j times ‖W_down[:, j]‖₂². Scores are standardised in each layer and
    then compared across layers; what the pruned neurons added on average, W_down·E[h], goes into the down
    projection's bias.
    """

    name = "static-flap"
    across_layers = True
    compensate = True

    def score(self, statistics: NeuronStatistics) -> torch.Tensor:
        return statistics.variance * statistics.down.square().sum(0)
