"""The one configuration of a conversion."""

from __future__ import annotations

import dataclasses

from prunepath.errors import PrunePathError

PARTITIONS = ("coactivation", "weights", "contiguous", "random")
CONTRIBUTIONS = ("output", "loss")
AUTOCASTS = ("none", "bfloat16", "float16")
BACKBONES = ("full", "lora", "frozen")
SHRINK_CRITERIA = ("loss", "rate")
BACKENDS = ("auto", "triton", "cuda", "cpu", "reference")


@dataclasses.dataclass
class PrunePathConfig:
    """How a dense model becomes a sparse one. Every field is stored in the checkpoint.

    Args:
        num_experts: experts E of every FFN; must divide its intermediate size D.
        partition: how neurons are grouped: `coactivation`, `weights`, `contiguous` or `random`.
        center: whether a skipped expert contributes its mean over the calibration data instead of zero. None measures
            both on the calibration data and keeps the better.
        min_experts: experts that always run, per token.
        max_experts: experts that run at most, per token; 0 means all.
        seed: of the partition and of the router's initial weights.
        sequence_length: tokens of one calibration window.
        partition_tokens: calibration tokens whose activations group the neurons and give their means.
        router_tokens: calibration tokens that the routers train on, each seen once.
        router_learning_rate: peak learning rate of the routers' AdamW on standardised inputs, before division by √H.
        calibration_tokens: tokens, held out from router training, that turn budgets into thresholds.
        contribution: what routers learn an expert's share of: `output`, the norm of what it adds to the FFN's output;
            or `loss`, the same measured in the metric E[g·gᵀ] of the loss's gradients g there, which needs a model
            with a loss, and the memory for gradients of one batch's activations.
        autocast: `bfloat16` or `float16`: run the backbone under torch.autocast in this dtype while converting; or
            `none`. Routers always train in float32.
        backend: `auto`, or one of `triton`, `cuda`, `cpu`, `reference`.
    """

    num_experts: int = 64
    partition: str = "coactivation"
    center: bool | None = None
    min_experts: int = 1
    max_experts: int = 0
    seed: int = 0
    sequence_length: int = 256
    partition_tokens: int = 4096
    router_tokens: int = 131072
    router_learning_rate: float = 0.03
    calibration_tokens: int = 8192
    contribution: str = "output"
    autocast: str = "none"
    backend: str = "auto"

    def __post_init__(self) -> None:
        choices = {"partition": PARTITIONS, "contribution": CONTRIBUTIONS, "autocast": AUTOCASTS, "backend": BACKENDS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise PrunePathError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}.")
        whole = [field.name for field in dataclasses.fields(self) if field.name.endswith("_tokens")]
        for name in ("num_experts", "min_experts", "sequence_length", *whole):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise PrunePathError(f"{name} must be a whole number of at least 1, got {value!r}.")
        if self.min_experts > self.num_experts:
            raise PrunePathError(
                f"min_experts must be at most num_experts = {self.num_experts}, got {self.min_experts}."
            )
        if self.max_experts != 0 and not self.min_experts <= self.max_experts <= self.num_experts:
            raise PrunePathError(
                f"max_experts must be 0 (all) or from min_experts = {self.min_experts} to num_experts = "
                f"{self.num_experts}, got {self.max_experts}."
            )
