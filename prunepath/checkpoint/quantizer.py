"""Sparse checkpoints by transformers' `from_pretrained`: a registered quantizer, which quantises nothing.

Imported while `transformers.quantizers` is still loading, so it names the submodules that are complete by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from prunepath.checkpoint.description import QUANT_METHOD, SparseDescription, describe, install, path_in_backbone
from prunepath.checkpoint.loading import check_routers
from prunepath.checkpoint.packing import check_routers_in, is_packed, transpose_packed
from prunepath.checkpoint.tensor_file import TensorFile
from prunepath.errors import CheckpointError
from prunepath.nn import for_inference, sparse_ffns


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
    _is_packed = False

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        description = self.quantization_config.description
        ffns = {path_in_backbone(model, path): ffn for path, ffn in install(model, description.config).items()}
        unknown = [path for path in ffns if path not in description.ffns]
        if unknown:
            raise CheckpointError(
                f"Expected a model with the FFNs {', '.join(description.ffns)}, got {type(model).__name__} with "
                f"{unknown[0]}."
            )
        self.quantization_config.description = description.narrowed(list(ffns))  # an encoder alone has fewer
        files = [TensorFile(file) for file in checkpoint_files or () if file.endswith(".safetensors")]
        if files:
            check_routers_in({name: file for file in files for name in file.entries}, ffns)
            self._is_packed = any(map(is_packed, files))
        if self._is_packed:
            transpose_packed(ffns.values())
            model._keys_to_ignore_on_load_unexpected = {
                *(model._keys_to_ignore_on_load_unexpected or ()),
                r"^padding\.",
            }
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        ffns = sparse_ffns(model)
        check_routers(model)
        if self._is_packed:
            if any(parameter.is_meta for ffn in ffns.values() for parameter in ffn.parameters()):
                raise CheckpointError(
                    "Expected a device map that leaves nothing of a packed checkpoint to be fetched for each call: "
                    "load the checkpoint that it was packed from."
                )
            transpose_packed(ffns.values())
        for_inference(model)
        description = self.quantization_config.description
        for ffn, threshold in zip(ffns.values(), description.thresholds, strict=True):
            ffn.threshold = threshold
        describe(model, description)
        # To transformers, a model with a quantizer is quantised, and may not be cast or trained.
        del model.hf_quantizer, model.quantization_method
        model.is_quantized = False
        for module in model.modules():
            vars(getattr(module, "config", self)).pop("_is_quantized", None)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True
