"""T5 v1.0 (ungated) and T5 v1.1 and Flan-T5 (gated), in encoders and decoders; a dropout comes before `wo`."""

from torch import nn

from prunepath.families.base import FFNAdapter, activation_name
from prunepath.nn import FFNLayout


class T5(FFNAdapter):
    classes = ("T5DenseActDense",)

    def layout(self, module: nn.Module) -> FFNLayout:
        return FFNLayout(up="wi", down="wo", activation=activation_name(module.act), dropout="dropout")


class GatedT5(FFNAdapter):
    classes = ("T5DenseGatedActDense",)

    def layout(self, module: nn.Module) -> FFNLayout:
        return FFNLayout(gate="wi_0", up="wi_1", down="wo", activation=activation_name(module.act), dropout="dropout")
