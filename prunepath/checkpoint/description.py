"""What a sparse checkpoint says of its sparsity: `quantization_config` in `config.json`."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn

from prunepath.config import PrunePathConfig
from prunepath.errors import CheckpointError, PrunePathError
from prunepath.families import find_ffns
from prunepath.nn import SparseFFN
from prunepath.nn.model import require_sparse_ffns
from prunepath.nn.thresholds import check_fraction

FORMAT_VERSION = 3
QUANT_METHOD = "prunepath"


@dataclasses.dataclass
class SparseDescription:
    """The contents of `quantization_config`.

    Attributes:
        config: how the model was converted; expert width or number, and the router's rank, form and bits, are those in
            force.
        ffns: dotted paths of the FFNs in the model without its head, in the order of its modules.
        thresholds: the current threshold of each FFN.
        budgets: calibrated table, budget -> threshold of each FFN; empty for a model that was not calibrated.
        calibration: what calibration measured (`prunepath.calibration`).
    """

    config: PrunePathConfig
    ffns: list[str]
    thresholds: list[float]
    budgets: dict[float, list[float]] = dataclasses.field(default_factory=dict)
    calibration: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "config": dataclasses.asdict(self.config),
            "ffns": list(self.ffns),
            "thresholds": list(self.thresholds),
            "budgets": {f"{budget:g}": list(values) for budget, values in sorted(self.budgets.items())},
            "calibration": self.calibration,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SparseDescription:
        """Reads and checks `quantization_config`.

        Raises:
            CheckpointError: for another format version, or missing or inconsistent entries.
        """
        version = data.get("format_version")
        if version != FORMAT_VERSION or isinstance(version, bool):
            advice = "upgrade prunepath" if isinstance(version, int) and version > FORMAT_VERSION else "convert it anew"
            raise CheckpointError(
                f"Expected a checkpoint of format version {FORMAT_VERSION}, got {str(version)[:40]}: {advice}."
            )
        try:
            known = {field.name for field in dataclasses.fields(PrunePathConfig)}
            description = cls(
                config=PrunePathConfig(**{k: v for k, v in data["config"].items() if k in known}),
                ffns=[str(path) for path in data["ffns"]],
                thresholds=[check_fraction("threshold", t) for t in data["thresholds"]],
                budgets={
                    check_fraction("budget", float(b)): [check_fraction("threshold", t) for t in values]
                    for b, values in data["budgets"].items()
                },
                calibration=dict(data["calibration"]),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, KeyError):
                problem = f"it has no entry {error}."
            elif isinstance(error, PrunePathError):
                problem = str(error)
            else:
                problem = "an entry is of the wrong kind."
            raise CheckpointError(f"Expected a complete PrunePath quantization_config, but: {problem}") from error
        for name, values in [("thresholds", description.thresholds), *description.budgets.items()]:
            if len(values) != len(description.ffns):
                raise CheckpointError(
                    f"Expected one threshold for each of the checkpoint's {len(description.ffns)} FFNs, got "
                    f"{len(values)} under {name!r}."
                )
        return description

    def narrowed(self, ffns: Sequence[str]) -> SparseDescription:
        """The description of a model that has only some of the FFNs, such as an encoder alone."""
        rows = [self.ffns.index(path) for path in ffns]
        budgets = {budget: [values[i] for i in rows] for budget, values in self.budgets.items()}
        return dataclasses.replace(
            self, ffns=list(ffns), thresholds=[self.thresholds[i] for i in rows], budgets=budgets
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside torch's wrappers: DataParallel, DistributedDataParallel, torch.compile."""
    while not hasattr(model, "config"):
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            raise PrunePathError(f"Expected a transformers model, got {type(model).__name__}, which has no config.")
        model = inner
    return model


def path_in_backbone(model: nn.Module, path: str) -> str:
    """A module's path in the model without its head."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return path.removeprefix(prefix)


def description_of(model: nn.Module) -> SparseDescription:
    """What the model's checkpoint says, or will say, of its sparsity.

    Raises:
        PrunePathError: for a dense model.
    """
    require_sparse_ffns(model)
    return SparseDescription.from_dict(unwrapped(model).config.quantization_config)


def describe(model: nn.Module, description: SparseDescription) -> None:
    """Makes `description` what the model's checkpoint will say."""
    unwrapped(model).config.quantization_config = description.to_dict()


def install(model: nn.Module, config: PrunePathConfig) -> dict[str, SparseFFN]:
    """Replaces the model's FFNs by sparse ones with untrained routers.

    The model gets a configuration of its own, since other models may share it, and it will describe this one.

    Returns:
        The FFNs by dotted path in the model, in the order of its modules.
    """
    sites = find_ffns(model)
    shared = model.config
    own = copy.deepcopy(shared)
    for module in model.modules():
        if vars(module).get("config") is shared:
            module.config = own
    return {
        site.path: site.install(
            config.experts_of(site.intermediate_size),
            **config.router_of(site.hidden_size, site.intermediate_size),
            min_experts=config.min_experts,
            max_experts=config.max_experts,
        )
        for site in sites
    }
