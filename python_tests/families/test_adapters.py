"""A user's own FFN class becomes sparse by registering a description of it, as docs/adapters.md shows."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

import prunepath
from prunepath.families import activation_name, base


class ToyConfig(PretrainedConfig):
    model_type = "prunepath-test-toy"


class ToyModel(PreTrainedModel):
    config_class = ToyConfig

    def __init__(self, config, ffn):
        super().__init__(config)
        self.embed = nn.Embedding(50, 16)
        self.ffn = ffn
        self.head = nn.Linear(16, 50)
        self.post_init()

    def forward(self, input_ids):
        x = self.embed(input_ids)
        return self.head(x + self.ffn(x))


@pytest.fixture
def examples(monkeypatch):
    """The documentation's Python code, block by block, and a namespace to run it in."""
    monkeypatch.setattr(base, "_adapters", dict(base._adapters))
    text = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE), {}


@pytest.mark.parametrize("name", ["MyFeedForward", "MyLayer"])
def test_the_documented_examples_convert(examples, name):
    blocks, namespace = examples
    classes, registrations = zip(*(block.split("prunepath.register_adapter", 1) for block in blocks), strict=True)
    exec("\n".join(classes), namespace)
    torch.manual_seed(0)
    model = ToyModel(ToyConfig(), namespace[name]()).eval()
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
        for registration in registrations:
            exec(f"prunepath.register_adapter{registration}", namespace)
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
        ("gelu_fast", "gelu_tanh"),
        ("gelu_accurate", "gelu_tanh"),
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
