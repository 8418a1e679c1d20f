"""Inputs of the FFN operators."""

import dataclasses
import math

import pytest
import torch

from prunepath.ops import reference


@dataclasses.dataclass
class FfnInputs:
    """Random inputs: x, tables and router of one dtype, and as keyword arguments the biases, a factored router's floor
    and log-scale, and the scales of those router tables that are in 4 bits."""

    x: torch.Tensor
    gate: torch.Tensor | None
    up: torch.Tensor
    down_t: torch.Tensor
    router_in: torch.Tensor
    router_out: torch.Tensor
    router_bias: torch.Tensor
    num_experts: int
    biases: dict[str, torch.Tensor]
    factors: dict[str, torch.Tensor]
    scales: dict[str, torch.Tensor]

    @property
    def tables(self):
        return self.gate, self.up, self.down_t

    @property
    def router(self):
        return self.router_in, self.router_out, self.router_bias

    def wide(self):
        """The same in float64."""

        def double(value):
            if isinstance(value, dict):
                return {name: tensor.double() for name, tensor in value.items()}
            return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

        fields = dataclasses.fields(self)
        return FfnInputs(**{field.name: double(getattr(self, field.name)) for field in fields})

    def logits(self, activation="silu"):
        """The router's, of the reference."""
        return reference.router_logits(self.x, *self.router, **self.factors, activation=activation, **self.scales)

    def sparse(self, op, ids, counts, activation="silu", **changes):
        """`op`, a `sparse_ffn`, of these inputs."""
        arguments = {"x": self.x, "gate": self.gate, "up": self.up, "down_t": self.down_t} | changes
        return op(
            **arguments,
            expert_ids=ids,
            counts=counts,
            activation=activation,
            num_experts=self.num_experts,
            **self.biases,
        )

    def routed(self, op, threshold, activation="silu", **options):
        """`op`, a `routed_ffn`, of these inputs."""
        options |= self.biases | self.factors | self.scales
        return op(self.x, *self.router, threshold, *self.tables, activation, **options)


@pytest.fixture
def make_ffn():
    def make(
        num_tokens=3,
        num_experts=5,
        width=6,
        hidden_size=40,
        *,
        rank=8,  # None for a router of full rank
        factored=False,
        packed=(),  # names of the router's tables that are in 4 bits
        gated=True,
        dtype=torch.float32,
        biases=True,
        bias_dtype=torch.float32,
        seed=0,
    ):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape, scale=1.0, dtype=dtype):
            return (torch.randn(*shape, generator=generator) * scale).to(dtype)

        intermediate_size = num_experts * width
        given = {
            "gate_bias": normal(intermediate_size, scale=0.5, dtype=bias_dtype),
            "up_bias": normal(intermediate_size, scale=0.5, dtype=bias_dtype),
            "down_bias": normal(hidden_size, dtype=bias_dtype),
        }
        if not gated:
            del given["gate_bias"]
        scale = hidden_size**-0.5
        router_rows = 2 * num_experts if factored and gated else num_experts
        router_size = rank or hidden_size
        ffn = FfnInputs(
            x=normal(num_tokens, hidden_size),
            gate=normal(intermediate_size, hidden_size, scale=scale) if gated else None,
            up=normal(intermediate_size, hidden_size, scale=scale),
            down_t=normal(intermediate_size, hidden_size),
            router_in=normal(rank, hidden_size, scale=scale) if rank else None,
            router_out=normal(router_rows, router_size, scale=2 * router_size**-0.5),
            router_bias=normal(router_rows, dtype=torch.float32),
            num_experts=num_experts,
            biases=given if biases else {},
            factors={},
            scales={},
        )
        if factored:
            ffn.factors["router_floor"] = normal(router_rows, scale=0.2, dtype=bias_dtype)
            ffn.factors["router_log_scale"] = normal(num_experts, dtype=bias_dtype)
        for name in packed:
            table = getattr(ffn, name)
            setattr(ffn, name, reference.pack_rows(torch.randint(-8, 8, table.shape, generator=generator)))
            scale = (0.5 + torch.rand(len(table), generator=generator)) * table.float().std() / 4.6
            ffn.scales[f"{name}_scale"] = scale.to(bias_dtype)
        return ffn

    return make


@pytest.fixture
def poison():
    """Puts NaN (integers: −77) into the freed memory that outputs of the given shapes are likely to be made of."""

    def fill(*shapes_and_dtypes):
        held = []
        for shape, dtype in shapes_and_dtypes:
            value = math.nan if dtype.is_floating_point else -77
            held += [torch.full(shape, value, dtype=dtype) for _ in range(8)]
        del held

    return fill


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
