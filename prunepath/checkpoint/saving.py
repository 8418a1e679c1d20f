"""Saving by transformers' `save_pretrained`: a dense model's checkpoint does not say that it is sparse.

A sparse model's configuration, given to `AutoModel.from_config` or a model's class, makes a dense model.
"""

from __future__ import annotations

import functools
from typing import Any

from transformers.modeling_utils import PreTrainedModel

from prunepath.checkpoint.description import QUANT_METHOD
from prunepath.nn import is_sparse

_save_pretrained = PreTrainedModel.save_pretrained


@functools.wraps(_save_pretrained)
def save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    declared = getattr(self.config, "quantization_config", None)
    if not isinstance(declared, dict) or declared.get("quant_method") != QUANT_METHOD or is_sparse(self):
        return _save_pretrained(self, *args, **kwargs)
    del self.config.quantization_config
    try:
        return _save_pretrained(self, *args, **kwargs)
    finally:
        self.config.quantization_config = declared


PreTrainedModel.save_pretrained = save_pretrained
