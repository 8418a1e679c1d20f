"""A tiny sparse Llama with experts of one neuron, data that it learns in a few steps, and a Trainer's arguments."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

LENGTH = 16


def _windows(count: int, seed: int) -> torch.Tensor:
    """Rows that count upwards from a random start: easy to learn."""
    starts = torch.randint(0, 64, (count, 1), generator=torch.Generator().manual_seed(seed))
    return (starts + torch.arange(LENGTH)) % 64


@pytest.fixture(scope="session")
def windows():
    """Makes token ids [count, 16]: (count, seed) -> tensor."""
    return _windows


@pytest.fixture(scope="session")
def dataset():
    """Makes rows as a Trainer takes them: (count) -> list."""
    return lambda count=64: [{"input_ids": row, "labels": row} for row in _windows(count, 2)]


@pytest.fixture(scope="session")
def _sparse(make_sparse):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    model = make_sparse(LlamaForCausalLM(config).eval(), router_rank=8)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if ".router." in name and tensor.is_floating_point():
                tensor.mul_(0.2)  # as even as trained routers are, so that every budget has a threshold
    return model


@pytest.fixture
def model(_sparse):
    return copy.deepcopy(_sparse)


@pytest.fixture
def arguments(tmp_path):
    """Makes TrainingArguments for a few steps: (**more) -> arguments."""

    def make(**more) -> TrainingArguments:
        defaults = dict(
            max_steps=4, per_device_train_batch_size=8, learning_rate=1e-3, report_to=[], save_strategy="no"
        )
        return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, **(defaults | more))

    return make
