"""OPT, whose decoder layer calls fc1, the activation and fc2 itself."""

from torch import nn

from prunepath.families.base import FFNAdapter, activation_name
from prunepath.nn import FFNLayout


class OPT(FFNAdapter):
    classes = ("OPTDecoderLayer",)
    split_by = "activation_fn"

    def layout(self, module: nn.Module) -> FFNLayout:
        return FFNLayout(up="fc1", down="fc2", activation=activation_name(module.activation_fn))
