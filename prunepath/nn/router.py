"""The router: from a token's hidden state to a logit for each expert."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from prunepath.ops import reference

_LARGEST_CODE = 7
_CLIP = 2.5
"""Magnitudes beyond so many root mean squares of their row are cut: a finer grid for the others gains more."""
_LEAST_REACH = 1e-6
TABLES = ("w_in", "w_out")


class Router(nn.Module):
    """Logits whose softmax is each expert's share of a token's probability mass, in one of two forms.

    Both begin with v = W_out·(W_in·x) + b. The linear form has v [E] as its logits z. The factored form, for experts of
    one neuron, estimates the F factors of every neuron's activation, of which a gated FFN has two, act(gate·x) and
    up·x, and another one: v is [F·E], the first E of them before the activation φ, and

        z_e = s_e + Σ_f ¼·log(φ_f(v_fe)² + ε_fe²),    φ_1 = φ, φ_2(v) = v.

    The floor ε is what the estimate may be wrong by; e^(2s) is the norm of the neuron's output weights, so that e^z
    estimates the root of the neuron's contribution (`router_target`). A product's logarithm is no linear function of x:
    neurons matter by magnitude, whatever the sign of up·x.

    With 4 bits, W_in and W_out are whole numbers from −7 to 7, with a scale for each row. Kernels read them packed, two
    in a byte. To train they are floating-point numbers (`unpack`), which a forward pass rounds and cuts to that range;
    gradients pass through the rounding as if it were not there (LSQ, arXiv 1902.08153, section 2).

    Its parameters require no gradient, since no model output has one for them: what trains routers says so.

    Args:
        hidden_size: H, the width of the FFN's input; even with 4 bits.
        num_experts: E.
        rank: r; W_in is [r, H], and W_out [E, r] or [F·E, r]. 0 is full rank: no W_in, and W_out has H columns. Even
            with 4 bits.
        factors: F of the factored form, 1 or 2; 0 is the linear form.
        bits: 4, or 16 for tables of the FFN's own dtype.
        activation: of the FFN. Its stand-in φ (`reference.ROUTER_ACTIVATIONS`) ranks what ReLU would all make zero.

    Attributes:
        w_in, w_out: parameters of the shapes above; packed, they are buffers, uint8 of half as many columns.
        w_in_scale, w_out_scale: of the rows of tables of 4 bits, [r] and [E] or [F·E], buffers; otherwise None.
        bias: b, [E] or [F·E].
        floor: ε [F·E], whose signs do not matter; None in the linear form.
        log_scale: s [E]; None in the linear form.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        rank: int = 0,
        *,
        factors: int = 0,
        bits: int = 16,
        activation: str = "silu",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, device=device, dtype=dtype), requires_grad=False)

        self.num_experts = num_experts
        self.rank = rank
        self.factors = factors
        self.bits = bits
        self.activation = activation
        rows = num_experts * max(1, factors)
        self.register_parameter("w_in", zeros(rank, hidden_size) if rank else None)
        self.w_out = zeros(rows, rank or hidden_size)
        ones = functools.partial(torch.ones, device=device, dtype=dtype)
        self.register_buffer("w_in_scale", ones(rank) if rank and bits == 4 else None)
        self.register_buffer("w_out_scale", ones(rows) if bits == 4 else None)
        self.bias = zeros(rows)
        self.register_parameter("floor", zeros(rows) if factors else None)
        self.register_parameter("log_scale", zeros(num_experts) if factors else None)
        if factors:
            nn.init.ones_(self.floor)
        self.pack()

    def extra_repr(self) -> str:
        form = "factored" if self.factors else "linear"
        return f"num_experts={self.num_experts}, rank={self.rank or 'full'}, form={form}, bits={self.bits}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Float32 logits [T, E] of x [T, H] in any dtype.

        They are computed in float32 because half-precision logits tie often, and ties are broken by index alone.
        """
        with torch.autocast(x.device.type, enabled=False):
            w_in, w_out = (self._table(name) for name in TABLES)
            return reference.router_logits(
                x.float(), w_in, w_out, self.bias, self.floor, self.log_scale, self.activation
            )

    def _table(self, name: str) -> torch.Tensor | None:
        """What the logits are computed with, in floating point."""
        table, scale = getattr(self, name), getattr(self, f"{name}_scale")
        if scale is None:
            return table
        if table.dtype == torch.uint8:
            return reference.unpack_rows(table, scale)
        scale = scale.float().unsqueeze(1)
        steps = _steps(table, scale)
        return (steps + (steps.round() - steps).detach()) * scale

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that it consists of, by name."""
        tensors = {**self._parameters, **self._buffers}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    # Packed tables

    @property
    def is_packed(self) -> bool:
        return self.w_out.dtype == torch.uint8

    @property
    def is_ready(self) -> bool:
        """Whether the tables are as kernels read them."""
        return self.bits == 16 or self.is_packed

    @torch.inference_mode(False)
    @torch.no_grad()
    def pack(self) -> None:
        """Rounds tables of 4 bits, and keeps nothing else of them; others stay as they are."""
        for name in () if self.is_ready else TABLES:
            table, scale = getattr(self, name), getattr(self, f"{name}_scale")
            if table is not None:
                delattr(self, name)
                codes = _steps(table, scale.float().unsqueeze(1)).round()
                self.register_buffer(name, reference.pack_rows(codes.to(torch.int8)))

    @torch.inference_mode(False)
    @torch.no_grad()
    def unpack(self) -> None:
        """Makes packed tables floating-point parameters, which an optimiser can train; packing them loses nothing."""
        for name in TABLES if self.is_packed else ():
            table, scale = getattr(self, name), getattr(self, f"{name}_scale")
            if table is not None:
                delattr(self, name)
                wide = reference.unpack_rows(table, scale).to(scale.dtype)
                self.register_parameter(name, nn.Parameter(wide, requires_grad=False))

    @torch.inference_mode(False)
    @torch.no_grad()
    def fit_scales(self) -> None:
        """Gives tables of 4 bits that are not packed the scales that suit them (`row_scales`)."""
        for name in () if self.is_ready else TABLES:
            table = getattr(self, name)
            if table is not None:
                getattr(self, f"{name}_scale").copy_(row_scales(table.float()))

    def requires_grad_(self, requires_grad: bool = True) -> Router:
        """As of any module; gradients need tables that are not packed."""
        if requires_grad:
            self.unpack()
        return super().requires_grad_(requires_grad)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any) -> None:
        found = state_dict.get(f"{prefix}w_out")
        if self.bits == 4 and found is not None:
            (self.pack if found.dtype == torch.uint8 else self.unpack)()
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def bytes_read(self, number: float) -> float:
        """Bytes that it takes to route a token, if numbers that are not packed are of `number` bytes."""
        tables = [self.w_out] if self.w_in is None else [self.w_in, self.w_out]
        elements = sum(table.numel() for table in tables) * (2 if self.is_packed else 1)
        others = sum(tensor.numel() for name, tensor in self.tensors().items() if name not in TABLES)
        return elements * (number if self.bits == 16 else self.bits / 8) + others * number


def row_scales(table: torch.Tensor) -> torch.Tensor:
    """Scales [R] for rows [R, C]: the grid reaches the largest number, or as far as suits normal ones (`_CLIP`)."""
    reach = torch.minimum(table.abs().amax(1), _CLIP * table.square().mean(1).sqrt())
    return reach.clamp(min=_LEAST_REACH) / _LARGEST_CODE


def _steps(table: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """A table in units of its scales [R, 1], within the grid: float32."""
    return (table.float() / scale).clamp(-_LARGEST_CODE, _LARGEST_CODE)
