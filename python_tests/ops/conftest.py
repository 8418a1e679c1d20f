"""Inputs of the FFN operators."""

import dataclasses

import pytest
import torch


@dataclasses.dataclass
class FfnInputs:
    """Random inputs: x and weights of one dtype, and the optional parameters as keyword arguments."""

    x: torch.Tensor
    w_in: torch.Tensor
    w_out: torch.Tensor
    router_weight: torch.Tensor
    router_bias: torch.Tensor
    parameters: dict[str, torch.Tensor]

    def wide(self):
        """The same in float64."""
        parameters = {name: value.double() for name, value in self.parameters.items()}
        weights = (self.w_in.double(), self.w_out.double(), self.router_weight.double())
        return FfnInputs(self.x.double(), *weights, self.router_bias.double(), parameters)


@pytest.fixture
def make_ffn():
    def make(
        num_tokens=3,
        num_experts=5,
        width=6,
        hidden_size=40,
        *,
        gated=True,
        dtype=torch.float32,
        parameters=True,
        parameter_dtype=torch.float32,
        seed=0,
    ):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape, scale=1.0):
            return torch.randn(*shape, generator=generator) * scale

        inner = 2 if gated else 1
        given = {
            "b_in": normal(num_experts, width, inner, scale=0.5).to(parameter_dtype),
            "b_out": normal(hidden_size).to(parameter_dtype),
            "center": normal(num_experts, width, scale=0.3).to(parameter_dtype),
        }
        return FfnInputs(
            normal(num_tokens, hidden_size).to(dtype),
            normal(num_experts, width, inner, hidden_size, scale=max(hidden_size, 1) ** -0.5).to(dtype),
            normal(num_experts, width, hidden_size).to(dtype),
            normal(num_experts, hidden_size, scale=2 * max(hidden_size, 1) ** -0.5).to(dtype),
            normal(num_experts),
            given if parameters else {},
        )

    return make


@pytest.fixture
def make_selection():
    """Random selections: counts from 0 to K, ids without repetition, −1 after the count."""

    def make(num_tokens, num_experts, columns=None, *, seed=0):
        generator = torch.Generator().manual_seed(seed)
        columns = num_experts if columns is None else columns
        order = torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, :columns]
        counts = torch.randint(0, columns + 1, (num_tokens,), generator=generator)
        ids = order.masked_fill(torch.arange(columns) >= counts[:, None], -1)
        return ids.to(torch.int32), counts.to(torch.int32)

    return make


@pytest.fixture
def assert_close_to():
    """Asserts that the relative error of y, over all tokens, is within what its dtype allows."""
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}

    def check(y, expected):
        assert y.shape == expected.shape
        if expected.numel() > 0:
            error = (y.double() - expected).norm() / expected.norm()
            assert error <= tolerance[y.dtype], f"relative error {error:.3g}"

    return check
