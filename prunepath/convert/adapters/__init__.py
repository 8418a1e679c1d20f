"""What PrunePath knows about each model family's FFN: one small file a family."""

from prunepath.convert.adapters import gated_mlp, opt
from prunepath.convert.adapters.base import (
    FFNAdapter,
    FFNSite,
    find_ffns,
    register_adapter,
    supported_classes,
)

register_adapter(gated_mlp.GatedMLP())
register_adapter(opt.OPT())

__all__ = ["FFNAdapter", "FFNSite", "find_ffns", "register_adapter", "supported_classes"]
