"""A tiny random model and a tokenizer of one token a byte, in memory."""

import copy

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import prunepath


def byte_tokenizer(**special_tokens: str) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<end>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer(bos_token="<end>", eos_token="<end>")


@pytest.fixture(scope="session")
def tokenizer_without_start():
    return byte_tokenizer()


@pytest.fixture(scope="session")
def _dense():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def texts():
    return [f"Text number {i}: the {i * i} birds of a feather flock together.\n" * 4 for i in range(60)]


@pytest.fixture(scope="session")
def _sparse(_dense, tokenizer, texts):
    config = prunepath.PrunePathConfig(
        num_experts=8, sequence_length=64, partition_tokens=512, router_tokens=1024, calibration_tokens=512
    )
    return prunepath.convert(copy.deepcopy(_dense), tokenizer, texts, config)


@pytest.fixture
def dense(_dense):
    return copy.deepcopy(_dense)


@pytest.fixture
def sparse(_sparse):
    return copy.deepcopy(_sparse)
