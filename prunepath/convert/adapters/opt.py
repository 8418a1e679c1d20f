"""OPT, whose decoder layer calls fc1, the activation and fc2 itself."""

from torch import nn

from prunepath.convert.adapters.base import FFNAdapter, activation_name
from prunepath.nn import FFNLayout, SparseFFN, SplitFFN


class OPT(FFNAdapter):
    classes = ("OPTDecoderLayer",)

    def layout(self, module: nn.Module) -> FFNLayout:
        return FFNLayout(up="fc1", down="fc2", activation=activation_name(module.activation_fn))

    def path(self, owner: str) -> str:
        return f"{owner}.mlp"

    def install(self, parent: nn.Module, name: str, num_experts: int, **options) -> SparseFFN:
        layer = parent._modules[name]
        layer.mlp = SplitFFN(layer, self.layout(layer), "activation_fn", num_experts, **options)
        layer.mlp.train(layer.training)
        return layer.mlp
