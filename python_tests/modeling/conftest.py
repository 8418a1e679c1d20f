"""Tiny random models of every supported family, and random tokens to convert them with."""

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import prunepath

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama_mlp_bias": (LlamaConfig, LlamaForCausalLM, {"mlp_bias": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
}
VOCABULARY = 97


def _make_model(family: str, seed: int = 0):
    """A model with two layers, H = 32 and D = 64, weights large enough that its choices are clear."""
    torch.manual_seed(seed)
    shared = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    if family == "opt":
        config = OPTConfig(**shared, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0, init_std=0.2)
        return OPTForCausalLM(config).eval()
    config_class, model_class, extra = FAMILIES[family]
    config = config_class(
        **shared, intermediate_size=64, num_key_value_heads=2, head_dim=8, initializer_range=0.2, **extra
    )
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


@pytest.fixture
def make_model():
    """Makes a tiny model: (family, seed=0) -> model."""
    return _make_model


@pytest.fixture(params=[*FAMILIES, "opt"])
def dense(request):
    return _make_model(request.param)


@pytest.fixture
def llama():
    return _make_model("llama")


@pytest.fixture(scope="session")
def token_texts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, VOCABULARY, (150,), generator=generator) for _ in range(24)]


@pytest.fixture(scope="session")
def small_config():
    return prunepath.PrunePathConfig(
        num_experts=8, sequence_length=32, partition_tokens=256, router_tokens=1024, calibration_tokens=512
    )


@pytest.fixture
def ids():
    return torch.randint(2, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(2))
