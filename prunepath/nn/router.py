"""The router: from a token's hidden state to a logit for each expert."""

from __future__ import annotations

import torch
from torch import nn

from prunepath.ops import reference


class Router(nn.Module):
    """Logits whose softmax is each expert's share of the FFN's output, in one of two forms.

    Both begin with v = W_out·(W_in·x) + b. The linear form has v [E] as its logits z. The factored form, for experts of
    one neuron, estimates the F factors of every neuron's activation, of which a gated FFN has two, act(gate·x) and
    up·x, and another one: v is [F·E], the first E of them before the activation φ, and

        z_e = s_e + Σ_f ½·log(φ_f(v_fe)² + ε_fe²),    φ_1 = φ, φ_2(v) = v.

    The floor ε is what the estimate may be wrong by; e^s is the norm of the neuron's output weights. A product's
    logarithm is no linear function of x: neurons matter by magnitude, whatever the sign of up·x.

    Its parameters require no gradient, since no model output has one for them: what trains routers says so.

    Args:
        hidden_size: H, the width of the FFN's input.
        num_experts: E.
        rank: r; W_in is [r, H], and W_out [E, r] or [F·E, r]. 0 is full rank: no W_in, and W_out has H columns.
        factors: F of the factored form, 1 or 2; 0 is the linear form.
        activation: of the FFN. Its stand-in φ (`reference.ROUTER_ACTIVATIONS`) ranks what ReLU would all make zero.

    Attributes:
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
        self.activation = activation
        rows = num_experts * max(1, factors)
        self.register_parameter("w_in", zeros(rank, hidden_size) if rank else None)
        self.w_out = zeros(rows, rank or hidden_size)
        self.bias = zeros(rows)
        self.register_parameter("floor", zeros(rows) if factors else None)
        self.register_parameter("log_scale", zeros(num_experts) if factors else None)
        if factors:
            nn.init.ones_(self.floor)

    def extra_repr(self) -> str:
        form = "factored" if self.factors else "linear"
        return f"num_experts={self.num_experts}, rank={self.rank or 'full'}, form={form}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Float32 logits [T, E] of x [T, H] in any dtype.

        They are computed in float32 because half-precision logits tie often, and ties are broken by index alone.
        """
        with torch.autocast(x.device.type, enabled=False):
            return reference.router_logits(
                x.float(), self.w_in, self.w_out, self.bias, self.floor, self.log_scale, self.activation
            )
