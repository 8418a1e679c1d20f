"""Llama's gated MLP, which Mistral, Qwen and Gemma share: down(act(gate(x)) ⊙ up(x))."""

from torch import nn

from prunepath.families.base import FFNAdapter, activation_name
from prunepath.nn import FFNLayout


class GatedMLP(FFNAdapter):
    classes = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "GemmaMLP", "Gemma2MLP", "Gemma3MLP")

    def layout(self, module: nn.Module) -> FFNLayout:
        return FFNLayout(gate="gate_proj", up="up_proj", down="down_proj", activation=activation_name(module.act_fn))
