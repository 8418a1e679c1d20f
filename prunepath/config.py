"""What can be chosen in a conversion and in fine-tuning. The command line's options are made of these classes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

from prunepath.errors import PrunePathError

Partition = Literal["coactivation", "weights", "contiguous", "random"]
RouterForm = Literal["linear", "factored"]
Autocast = Literal["none", "bfloat16", "float16"]
Backbone = Literal["full", "lora", "frozen"]
Backend = Literal["auto", "triton", "cuda", "cpu", "reference"]
PARTITIONS = get_args(Partition)
AUTOCASTS = get_args(Autocast)
ROUTER_FORMS = get_args(RouterForm)
ROUTER_BITS = (4, 16)
BACKBONES = get_args(Backbone)


@dataclasses.dataclass
class PrunePathConfig:
    """How a dense model becomes a sparse one. Every field is stored in the checkpoint.

    Args:
        expert_width: neurons n of an expert; must divide the intermediate size D of every FFN. By default 1, the
            finest, unless `num_experts` is given.
        num_experts: experts E = D / n of every FFN, which is the other way to say it.
        router_rank: rank r of the routers; 0 is full rank. By default it suits the model's hidden size.
        router_form: how routers tell what an expert will contribute (`prunepath.nn.Router`): `factored`, the default
            for experts of one neuron, estimates its activation; `linear`, the default for wider ones, its logit.
        router_bits: of the routers' tables: 4, rounded while they train, or 16, the model's own dtype. By default 4
            for factored routers of even sizes, since two numbers share a byte, and 16 for others.
        partition: how neurons are grouped where an expert has several: `coactivation`, `weights`, `contiguous` or
            `random`. With one neuron an expert they keep their order.
        min_experts: experts that always run, per token.
        max_experts: experts that run at most, per token; 0 means all.
        seed: seed of the partition and of the routers' initial weights.
        sequence_length: tokens of one calibration window.
        partition_tokens: calibration tokens whose activations group the neurons.
        router_tokens: calibration tokens that the routers train on.
        router_learning_rate: peak learning rate of the routers' AdamW on standardised inputs; a fifth of it is a
            factored router's, relative to its weights.
        calibration_tokens: tokens, held out from router training, that turn budgets into thresholds.
        autocast: run the backbone under torch.autocast in this dtype while converting; `none` does not. Routers always
            train in float32.
    """

    expert_width: int | None = None
    num_experts: int | None = None
    router_rank: int | None = None
    router_form: RouterForm | None = None
    router_bits: int | None = None
    partition: Partition = "coactivation"
    min_experts: int = 1
    max_experts: int = 0
    seed: int = 0
    sequence_length: int = 256
    partition_tokens: int = 4096
    router_tokens: int = 32768
    router_learning_rate: float = 0.1
    calibration_tokens: int = 8192
    autocast: Autocast = "none"

    def __post_init__(self) -> None:
        _check_choice("partition", self.partition, PARTITIONS)
        if self.router_form is not None:
            _check_choice("router_form", self.router_form, ROUTER_FORMS)
        if self.router_bits is not None:
            _check_choice("router_bits", self.router_bits, ROUTER_BITS)
        _check_choice("autocast", self.autocast, AUTOCASTS)
        least = dict.fromkeys([f.name for f in dataclasses.fields(self) if f.name.endswith("_tokens")], 1)
        least |= {"expert_width": 1, "num_experts": 1, "router_rank": 0, "min_experts": 1, "max_experts": 0}
        least |= {"sequence_length": 1, "seed": 0}
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is not None or name not in ("expert_width", "num_experts", "router_rank"):
                _check_whole(name, value, minimum)
        _check_positive("router_learning_rate", self.router_learning_rate)
        if self.expert_width is not None and self.num_experts is not None:
            raise PrunePathError(
                f"Expected expert_width or num_experts, got both, {self.expert_width} and {self.num_experts}."
            )
        if self.num_experts is not None and self.min_experts > self.num_experts:
            raise PrunePathError(
                f"min_experts must be at most num_experts = {self.num_experts}, got {self.min_experts}."
            )
        if self.max_experts and self.max_experts < self.min_experts:
            raise PrunePathError(
                f"max_experts must be 0 (all) or at least min_experts = {self.min_experts}, got {self.max_experts}."
            )

    def experts_of(self, intermediate_size: int) -> int:
        """E of an FFN of this width.

        Raises:
            PrunePathError: if experts of the configured width or number do not divide it, or if it has fewer experts
                than `min_experts` or `max_experts` asks for; names the nearest valid choices.
        """
        name = "expert_width" if self.num_experts is None else "num_experts"
        wanted = (self.expert_width or 1) if self.num_experts is None else self.num_experts
        if intermediate_size % wanted:
            below, above = nearest_divisors(intermediate_size, wanted)
            nearest = " and ".join(str(n) for n in sorted({below, above}))
            raise PrunePathError(
                f"Expected {name} to divide the intermediate size {intermediate_size}, got {wanted}; nearest valid: "
                f"{nearest}."
            )
        experts = intermediate_size // wanted if self.num_experts is None else wanted
        if max(self.min_experts, self.max_experts) > experts:
            raise PrunePathError(
                f"Expected min_experts and max_experts of at most the {experts} experts of an FFN of width "
                f"{intermediate_size}, got {self.min_experts} and {self.max_experts}."
            )
        return experts

    def router_of(self, hidden_size: int, intermediate_size: int) -> dict[str, Any]:
        """`router_form`, `router_rank` and `router_bits` of an FFN of these widths; a rank of 0 is full rank.

        Raises:
            PrunePathError: for a factored router of experts of several neurons, or 4 bits where they cannot be.
        """
        is_fine = self.experts_of(intermediate_size) == intermediate_size
        if self.router_form == "factored" and not is_fine:
            raise PrunePathError(
                "Expected experts of one neuron with router_form 'factored', got wider ones: give expert_width=1 or "
                "router_form='linear'."
            )
        form = self.router_form or ("factored" if is_fine else "linear")
        rank = default_router_rank(hidden_size, form) if self.router_rank is None else self.router_rank
        rank = 0 if rank >= hidden_size else rank
        fits = form == "factored" and hidden_size % 2 == 0 and rank % 2 == 0
        if self.router_bits == 4 and not fits:
            raise PrunePathError(
                "Expected a factored router, and an even hidden size and router_rank, with router_bits 4, got a "
                f"{form} one, {hidden_size} and {rank}."
            )
        return {"router_form": form, "router_rank": rank, "router_bits": self.router_bits or (4 if fits else 16)}


@dataclasses.dataclass(frozen=True)
class FineTuning:
    """How a sparse model is fine-tuned.

    Args:
        steps: optimiser steps.
        batch_size: windows of a step, of all processes together.
        sequence_length: tokens of a window.
        learning_rate: peak of the backbone's learning rate (AdamW, warm-up over a twentieth, then cosine to zero).
        router_learning_rate: peak of the routers' learning rate. By default three times the backbone's.
        backbone: what trains beside the routers: `full` is all weights, `lora` is low-rank updates of the linears,
            merged at the end, and `frozen` is nothing.
        lora_rank: rank of those updates (LoRA, arXiv 2106.09685).
        distillation_weight: weight of the divergence from the dense teacher in the loss; 0 uses none.
        gradient_accumulation_steps: passes of a step, each with its share of the windows and a budget of its own.
        gradient_checkpointing: keep each layer's inputs alone for the backward pass, and compute the rest again.
        seed: seed of the data's order and the drawn budgets.
        save_steps: an interrupted run goes on from the last multiple of this many steps.
    """

    steps: int = 500
    batch_size: int = 16
    sequence_length: int = 512
    learning_rate: float = 3e-4
    router_learning_rate: float | None = None
    backbone: Backbone = "full"
    lora_rank: int = 16
    distillation_weight: float = 1.0
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    seed: int = 0
    save_steps: int = 100

    def __post_init__(self) -> None:
        _check_choice("backbone", self.backbone, BACKBONES)
        for name in (
            "steps",
            "batch_size",
            "sequence_length",
            "lora_rank",
            "gradient_accumulation_steps",
            "save_steps",
        ):
            _check_whole(name, getattr(self, name), 1)
        _check_whole("seed", self.seed, 0)
        _check_positive("learning_rate", self.learning_rate)
        if self.router_learning_rate is not None:
            _check_positive("router_learning_rate", self.router_learning_rate)
        weight = self.distillation_weight
        if not _is_finite(weight) or weight < 0:
            raise PrunePathError(f"distillation_weight must be a finite number of at least 0, got {weight!r}.")


def default_router_rank(hidden_size: int, form: RouterForm) -> int:
    """Four ninths of the hidden size or so, a ninth for linear routers, in whole multiples of 32.

    It is full rank (0) for very small models.
    """
    share = 4 / 9 if form == "factored" else 1 / 9
    rank = max(32, round(share * hidden_size / 32) * 32)
    return 0 if 2 * rank > hidden_size else rank


def nearest_divisors(size: int, wanted: int) -> tuple[int, int]:
    """The divisors of `size` nearest to `wanted`: the largest not above and the smallest not below.

    The two are equal if `wanted` is one itself, and where nothing lies on one side of it (below 1, above `size`).
    """
    below = above = min(max(wanted, 1), size)
    while size % below:
        below -= 1
    while size % above:
        above += 1
    return below, above


def _check_choice(name: str, value: Any, known: tuple) -> None:
    if value not in known:
        raise PrunePathError(f"{name} must be one of {', '.join(map(str, known))}, got {value!r}.")


def _check_whole(name: str, value: Any, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise PrunePathError(f"{name} must be a whole number of at least {minimum}, got {value!r}.")


def _check_positive(name: str, value: Any) -> None:
    if not _is_finite(value) or value <= 0:
        raise PrunePathError(f"{name} must be a finite number above 0, got {value!r}.")


def _is_finite(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value)
