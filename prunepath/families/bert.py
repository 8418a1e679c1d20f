"""BERT and RoBERTa, whose FFN is spread over two children of a layer that do more besides: residual, LayerNorm."""

from torch import nn

from prunepath.families.base import FFNAdapter, activation_name
from prunepath.nn import FFNLayout


class BERT(FFNAdapter):
    classes = ("BertLayer", "RobertaLayer")
    split_by = "intermediate.intermediate_act_fn"

    def layout(self, module: nn.Module) -> FFNLayout:
        activation = activation_name(module.intermediate.intermediate_act_fn)
        return FFNLayout(up="intermediate.dense", down="output.dense", activation=activation)
