"""Phi-3 and Phi-4, whose gate and up are one matrix."""

from torch import nn

from prunepath.families.base import FFNAdapter, activation_name
from prunepath.nn import FFNLayout


class Phi3(FFNAdapter):
    classes = ("Phi3MLP",)

    def layout(self, module: nn.Module) -> FFNLayout:
        return FFNLayout(
            gate="gate_up_proj",
            up="gate_up_proj",
            down="down_proj",
            activation=activation_name(module.activation_fn),
        )
