"""The one configuration of a conversion."""

from __future__ import annotations

import dataclasses

from prunepath.errors import PrunePathError

PARTITIONS = ("coactivation", "weights", "contiguous", "random")
AUTOCASTS = ("none", "bfloat16", "float16")
BACKBONES = ("full", "lora", "frozen")
BACKENDS = ("auto", "triton", "cuda", "cpu", "reference")


@dataclasses.dataclass
class PrunePathConfig:
    """How a dense model becomes a sparse one. Every field is stored in the checkpoint.

    Args:
        expert_width: neurons n of an expert; must divide the intermediate size D of every FFN. None is 1, the finest,
            unless `num_experts` is given.
        num_experts: experts E = D / n of every FFN, which is the other way to say it.
        router_rank: rank r of the routers; 0 is full rank, None suits the model's hidden size.
        partition: how neurons are grouped where an expert has several: `coactivation`, `weights`, `contiguous` or
            `random`. With one neuron an expert they keep their order.
        min_experts: experts that always run, per token.
        max_experts: experts that run at most, per token; 0 means all.
        seed: of the partition and of the router's initial weights.
        sequence_length: tokens of one calibration window.
        partition_tokens: calibration tokens whose activations group the neurons.
        router_tokens: calibration tokens that the routers train on.
        router_learning_rate: peak learning rate of the routers' AdamW on standardised inputs.
        calibration_tokens: tokens, held out from router training, that turn budgets into thresholds.
        autocast: `bfloat16` or `float16`: run the backbone under torch.autocast in this dtype while converting; or
            `none`. Routers always train in float32.
    """

    expert_width: int | None = None
    num_experts: int | None = None
    router_rank: int | None = None
    partition: str = "coactivation"
    min_experts: int = 1
    max_experts: int = 0
    seed: int = 0
    sequence_length: int = 256
    partition_tokens: int = 4096
    router_tokens: int = 32768
    router_learning_rate: float = 0.03
    calibration_tokens: int = 4096
    autocast: str = "none"

    def __post_init__(self) -> None:
        for name, known in {"partition": PARTITIONS, "autocast": AUTOCASTS}.items():
            if getattr(self, name) not in known:
                raise PrunePathError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}.")
        least = dict.fromkeys([f.name for f in dataclasses.fields(self) if f.name.endswith("_tokens")], 1)
        least |= {"expert_width": 1, "num_experts": 1, "router_rank": 0, "min_experts": 1, "max_experts": 0}
        least |= {"sequence_length": 1, "seed": 0}
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is None and name in ("expert_width", "num_experts", "router_rank"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
                raise PrunePathError(f"{name} must be a whole number of at least {minimum}, got {value!r}.")
        if not isinstance(self.router_learning_rate, float | int) or not self.router_learning_rate > 0:
            raise PrunePathError(f"router_learning_rate must be a number above 0, got {self.router_learning_rate!r}.")
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

    def rank_of(self, hidden_size: int) -> int:
        """r of the router of an FFN with this hidden size; 0 is full rank."""
        if self.router_rank is not None:
            return 0 if self.router_rank >= hidden_size else self.router_rank
        return default_router_rank(hidden_size)


def default_router_rank(hidden_size: int) -> int:
    """A ninth of the hidden size or so, in whole multiples of 32; full rank (0) for very small models."""
    rank = max(32, round(hidden_size / 9 / 32) * 32)
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
