"""What PrunePath knows about each model family's FFN: one small file a family."""

from prunepath.families import bert, gated_mlp, gpt2, gpt_neox, opt, phi3, t5
from prunepath.families.base import (
    FFNAdapter,
    FFNSite,
    activation_name,
    find_ffns,
    register_adapter,
    supported_classes,
)

for adapter in (
    gated_mlp.GatedMLP(),
    phi3.Phi3(),
    opt.OPT(),
    gpt2.GPT2(),
    gpt_neox.GPTNeoX(),
    bert.BERT(),
    t5.T5(),
    t5.GatedT5(),
):
    register_adapter(adapter)

__all__ = ["FFNAdapter", "FFNSite", "activation_name", "find_ffns", "register_adapter", "supported_classes"]
