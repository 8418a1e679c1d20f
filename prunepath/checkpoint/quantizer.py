"""Loading sparse checkpoints by transformers' `from_pretrained`: a registered quantizer.

Imported while `transformers.quantizers` is still loading, so it names the submodules that are complete by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from prunepath.checkpoint import packing
from prunepath.budgets import set_threshold
from prunepath.checkpoint.description import QUANT_METHOD, SparseDescription, install
from prunepath.checkpoint.loading import check_routers
from prunepath.checkpoint.tensor_file import TensorFile
from prunepath.errors import CheckpointError
from prunepath.nn import sparse_ffns


@register_quantization_config(QUANT_METHOD)
class PrunePathQuantizationConfig(QuantizationConfigMixin):
    """The `quantization_config` of a sparse checkpoint, checked as it is read."""

    def __init__(self, **entries: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.description = SparseDescription.from_dict(entries)

    def to_dict(self) -> dict[str, Any]:
        return self.description.to_dict()


@register_quantizer(QUANT_METHOD)
class PrunePathQuantizer(HfQuantizer):
    """Puts sparse FFNs into the empty model, before the checkpoint's weights are read into it."""

    requires_calibration = True
    _experts: TensorFile | None = None

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        description = self.quantization_config.description
        ffns = install(model, description)
        # A headless model has shorter paths than the model that was saved, or longer ones.
        if len(ffns) != len(description.ffns) or not all(
            a.endswith(b) or b.endswith(a) for a, b in zip(ffns, description.ffns, strict=True)
        ):
            raise CheckpointError(
                f"Expected a model with the FFNs {', '.join(description.ffns)}, got {type(model).__name__} with "
                f"{', '.join(ffns)}."
            )
        if checkpoint_files:
            _check_added_tensors(description.ffns, ffns.values(), checkpoint_files)
            self._experts = packing.expert_file(checkpoint_files)
            if self._experts is not None:
                packing.prepare(model, description.ffns, list(ffns.values()), self._experts)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        check_routers(model)
        model.config.quantization_config = self.quantization_config.to_dict()
        description = self.quantization_config.description
        set_threshold(model, description.thresholds)
        ffns = list(sparse_ffns(model).values())
        if self._experts is not None:
            packing.attach(description.ffns, ffns, self._experts)
            self._experts = None
        else:
            for ffn in ffns:
                ffn.pack()
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _check_added_tensors(paths: Sequence[str], ffns: Any, files: Sequence[str]) -> None:
    """Raises CheckpointError unless the files hold what each FFN has beside its projections, in the right shape."""
    shapes = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                shapes.update({name: list(tensors.get_slice(name).get_shape()) for name in tensors.keys()})
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"Expected {file} to be a whole safetensors file, but: {error}.") from error
    for path, ffn in zip(paths, ffns, strict=True):
        expected = {"router.weight": [ffn.num_experts, ffn.hidden_size], "router.bias": [ffn.num_experts]}
        if ffn.center is not None:
            expected["center"] = [ffn.intermediate_size]
        if ffn.removed_output is not None:
            expected["removed_output"] = [ffn.hidden_size]
        for name, shape in expected.items():
            found = shapes.get(f"{path}.{name}")
            if found != shape:
                raise CheckpointError(
                    f"Expected the checkpoint to hold {path}.{name} of shape {shape}, "
                    f"{'but it is missing' if found is None else f'got {found}'}."
                )
