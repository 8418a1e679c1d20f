"""GPT-2, whose weights are stored transposed, and whose MLP ends with a dropout."""

from torch import nn

from prunepath.families.base import FFNAdapter, activation_name
from prunepath.nn import FFNLayout


class GPT2(FFNAdapter):
    classes = ("GPT2MLP",)

    def layout(self, module: nn.Module) -> FFNLayout:
        return FFNLayout(
            up="c_fc",
            down="c_proj",
            activation=activation_name(module.act),
            transposed=True,
            output_dropout="dropout",
        )
