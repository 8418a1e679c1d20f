"""GPT-NeoX and Pythia: down(act(up(x))) with biases."""

from torch import nn

from prunepath.families.base import FFNAdapter, activation_name
from prunepath.nn import FFNLayout


class GPTNeoX(FFNAdapter):
    classes = ("GPTNeoXMLP",)

    def layout(self, module: nn.Module) -> FFNLayout:
        return FFNLayout(up="dense_h_to_4h", down="dense_4h_to_h", activation=activation_name(module.act))
