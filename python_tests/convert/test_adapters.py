"""A user's own FFN class becomes sparse by registering a description of it."""

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

import prunepath
from prunepath.convert.adapters.base import activation_name


class ToyConfig(PretrainedConfig):
    model_type = "prunepath-test-toy"


class ToyFeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc_in = nn.Linear(16, 48)
        self.fc_out = nn.Linear(48, 16)

    def forward(self, x):
        return self.fc_out(nn.functional.gelu(self.fc_in(x)))


class ToyModel(PreTrainedModel):
    config_class = ToyConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(50, 16)
        self.ffn = ToyFeedForward()
        self.head = nn.Linear(16, 50)
        self.post_init()

    def forward(self, input_ids):
        x = self.embed(input_ids)
        return self.head(x + self.ffn(x))


class ToyAdapter(prunepath.FFNAdapter):
    classes = ("ToyFeedForward",)

    def layout(self, module):
        return prunepath.FFNLayout(up="fc_in", down="fc_out", activation="gelu")


def test_a_registered_class_converts():
    torch.manual_seed(0)
    model = ToyModel(ToyConfig()).eval()
    with torch.no_grad():
        model.embed.weight.normal_()
    ids = torch.randint(0, 50, (2, 9))
    texts = [torch.randint(0, 50, (100,)) for _ in range(10)]
    config = prunepath.PrunePathConfig(
        num_experts=6, sequence_length=20, partition_tokens=100, router_tokens=400, calibration_tokens=100
    )
    with torch.no_grad():
        expected = model(ids)
        with pytest.raises(prunepath.PrunePathError, match="got ToyModel"):
            prunepath.convert(model, None, texts, config)
        prunepath.register_adapter(ToyAdapter())
        prunepath.convert(model, None, texts, config)
        torch.testing.assert_close(model(ids), expected)
        prunepath.set_budget(model, 0.5)
        with prunepath.record_counts(model) as record:
            model(torch.stack(texts))
    assert 0.4 < record.active_fraction < 0.6


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("relu", "relu"),
        ("silu", "silu"),
        ("swish", "silu"),
        ("gelu", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("relu2", "relu2"),
    ],
)
def test_activation_names_compute_what_transformers_computes(name, expected):
    from prunepath.ops.reference import ACTIVATIONS

    module = ACT2FN[name]
    assert activation_name(module) == expected
    x = torch.linspace(-4, 4, 101)
    torch.testing.assert_close(ACTIVATIONS[expected](x), module(x), rtol=1e-5, atol=1e-6)


def test_an_activation_that_no_kernel_computes_is_named():
    with pytest.raises(prunepath.PrunePathError, match="got Tanh"):
        activation_name(nn.Tanh())
    with pytest.raises(prunepath.PrunePathError, match="QuickGELU"):
        activation_name(ACT2FN["quick_gelu"])
