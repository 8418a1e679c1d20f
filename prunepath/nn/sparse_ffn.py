"""The FFN as a sum of experts, of which each token runs the few that hold its probability mass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import nn

from prunepath import ops
from prunepath.nn.router import Router
from prunepath.nn.thresholds import check_fraction
from prunepath.ops.reference import ACTIVATIONS

DECODE_TOKENS = 64
"""Calls of up to this many tokens read only the active experts; longer ones (prefill) compute all and mask."""


@dataclasses.dataclass(frozen=True)
class FFNLayout:
    """The names of an FFN's projections on the module that owns them, and its activation.

    Args:
        up: the `nn.Linear` from H to D.
        down: the `nn.Linear` from D to H.
        gate: the `nn.Linear` from H to D whose activation gates `up`; None for an ungated FFN, act(up(x)).
        activation: `relu`, `gelu`, `gelu_tanh`, `silu` or `relu2`.
    """

    up: str
    down: str
    activation: str
    gate: str | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """The projections that read x, in the order in which a neuron's weights are packed."""
        return (self.up,) if self.gate is None else (self.gate, self.up)

    @property
    def projections(self) -> tuple[str, ...]:
        return (*self.inputs, self.down)


@dataclasses.dataclass(frozen=True)
class _Packed:
    """Expert-major weights, and what they were made from."""

    w_in: torch.Tensor
    w_out: torch.Tensor
    b_in: torch.Tensor | None
    b_out: torch.Tensor | None
    center: torch.Tensor | None
    linears: tuple[nn.Linear, ...]
    fingerprint: tuple[tuple[int, int], ...]


class PlainLinear(nn.Linear):
    """Marks subclasses of `nn.Linear` whose weights mean what a linear's do, so that they may be packed."""


class SparseFFN(nn.Module):
    """y = b + Σ over active experts of W_down[:, S_i]·(h_{S_i}(x) − m_{S_i}), exactly the dense FFN at τ = 1.

    Neurons are ordered so that expert i is neurons i·n to (i + 1)·n. The projections keep their names, shapes and
    modules, so checkpoints, optimisers and adapters see an ordinary FFN; `pack` lays their storage out expert by
    expert and leaves the parameters as views of it, so the weights exist once. Taking a state dict undoes that until
    the next inference call.

    Inference on few tokens is one `routed_ffn` call. With gradients enabled, for more than `DECODE_TOKENS` tokens, or
    when a projection is no plain `nn.Linear` (a LoRA layer, say), the FFN is computed densely and masked, in autograd.

    Three hooks, None unless set: `observe_input(ffn, x)`, `observe_counts(ffn, counts)`, and `select(ffn, x, hidden)`,
    which replaces the router's choice by a mask [T, E], and keeps the FFN to the masked dense computation. They see
    padding too; `valid_tokens` tells it apart where `prunepath.nn.observers.padding_masks` is in force.

    Args:
        dense: the module that owns the projections.
        layout: their names, and the activation.
        num_experts: E; divides the intermediate size D.
        center: hold a mean activation for each neuron (`center`, [D]), which a skipped neuron contributes.
        min_experts, max_experts: bounds on a token's experts; `max_experts` 0 means all.
        backend: see `prunepath.ops.resolve_backend`.
        adopt: register the projections here, under their names, because this module replaces `dense`; False leaves
            them with `dense`.
    """

    def __init__(
        self,
        dense: nn.Module,
        layout: FFNLayout,
        num_experts: int,
        *,
        center: bool = False,
        min_experts: int = 1,
        max_experts: int = 0,
        backend: str = "auto",
        adopt: bool = True,
    ) -> None:
        super().__init__()
        up = getattr(dense, layout.up)
        self.layout = layout
        self.hidden_size: int = up.in_features
        self.intermediate_size: int = up.out_features
        self.num_experts = num_experts
        self.expert_width = self.intermediate_size // num_experts
        self.min_experts = min_experts
        self.max_experts = max_experts
        self.backend = backend
        self.observe_input: Callable[[SparseFFN, torch.Tensor], None] | None = None
        self.observe_counts: Callable[[SparseFFN, torch.Tensor], None] | None = None
        self.select: Callable[[SparseFFN, torch.Tensor, torch.Tensor], torch.Tensor] | None = None
        self.padding_mask: torch.Tensor | None = None
        if adopt:
            for name in layout.projections:
                self.add_module(name, getattr(dense, name))
        self._owner = (self if adopt else dense,)  # a tuple, so that the owner does not become a submodule
        self._owner[0].register_state_dict_pre_hook(self._unpack)
        factory = {"device": up.weight.device, "dtype": up.weight.dtype}
        self.router = Router(self.hidden_size, num_experts, **factory)
        self.register_buffer("center", torch.zeros(self.intermediate_size, **factory) if center else None)
        self.register_buffer(
            "_threshold", torch.ones((), dtype=torch.float32, device=factory["device"]), persistent=False
        )
        self._threshold_value = 1.0
        self._packed: _Packed | None = None
        self._ops: ops.Backend | None = None

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, "
            f"num_experts={self.num_experts}, threshold={self._threshold_value:g}"
        )

    @property
    def threshold(self) -> float:
        """τ, the probability mass that a token's experts cover; 1.0 runs all of them."""
        return self._threshold_value

    @threshold.setter
    def threshold(self, value: float) -> None:
        value = check_fraction("threshold", value)
        self._threshold_value = value
        device = self.router.weight.device
        if self._threshold.device == device and self._threshold.dtype == torch.float32:
            self._threshold.fill_(value)  # in place: captured CUDA graphs and compiled models read this tensor
        else:
            self._threshold = torch.tensor(value, dtype=torch.float32, device=device)

    def projection(self, name: str) -> nn.Module:
        return self._owner[0]._modules[name]

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        """Neuron activations h [T, D] of x [T, H], in x's dtype."""
        act = ACTIVATIONS[self.layout.activation]
        if self.layout.gate is None:
            return act(self.projection(self.layout.up)(x))
        return act(self.projection(self.layout.gate)(x)) * self.projection(self.layout.up)(x)

    def valid_tokens(self, num_tokens: int) -> torch.Tensor | None:
        """Which of the current call's T tokens are no padding: bool [T]; None if all are, or nobody said."""
        if self.padding_mask is None or num_tokens % len(self.padding_mask):
            return None
        length = num_tokens // len(self.padding_mask)  # with a KV cache, a call has only the sequences' last tokens
        return self.padding_mask[:, -length:].flatten() if length <= self.padding_mask.shape[1] else None

    def active_mask(self, x: torch.Tensor) -> torch.Tensor:
        """Which experts run for x [T, H]: bool [T, E]. No gradient passes through the selection."""
        with torch.no_grad():
            expert_ids, _, counts = self._backend().route(
                self.router(x), self._threshold, min_experts=self.min_experts, max_experts=self.max_experts
            )
            if self.observe_counts is not None:
                self.observe_counts(self, counts)
            columns = torch.where(expert_ids < 0, self.num_experts, expert_ids).long()
            mask = torch.zeros(len(x), self.num_experts + 1, dtype=torch.bool, device=x.device)
            return mask.scatter_(1, columns, True)[:, : self.num_experts]

    def skip(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """`hidden` [T, D] with the neurons of inactive experts at their mean, or at zero without centring.

        Args:
            mask: [T, E], bool; or of hidden's dtype, gates that scale what an expert adds.
        """
        experts = hidden.unflatten(-1, (self.num_experts, self.expert_width))
        gates = mask.unsqueeze(-1)
        if self.center is None:
            return (experts * gates).flatten(-2)
        means = self.center.view(self.num_experts, self.expert_width).to(hidden.dtype)
        if mask.dtype == torch.bool:
            return torch.where(gates, experts, means).flatten(-2)
        return (means + gates * (experts - means)).flatten(-2)

    def mask(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """What `skip` applies to the activations `hidden` [T, D] of x [T, H]: `select`'s choice, or the router's."""
        if self.select is None:
            return self.active_mask(x)
        mask = self.select(self, x, hidden)
        if self.observe_counts is not None:
            self.observe_counts(self, (mask > 0).sum(-1, dtype=torch.int32))
        return mask

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """FFN output of `hidden_states` [..., H], same shape and dtype."""
        x = hidden_states.reshape(-1, self.hidden_size)
        if self.observe_input is not None:
            self.observe_input(self, x)
        if self.reads_active_experts(x):
            y = self.run_active_experts(x)
        else:
            hidden = self.hidden(x)
            y = self.projection(self.layout.down)(self.skip(hidden, self.mask(x, hidden)))
        return y.view(hidden_states.shape)

    def reads_active_experts(self, x: torch.Tensor) -> bool:
        """Whether x [T, H] is served by the kernels, which read the active experts alone."""
        if self.select is not None or len(x) > DECODE_TOKENS or torch.is_grad_enabled():
            return False
        return self._pack_if_stale()

    def run_active_experts(self, x: torch.Tensor) -> torch.Tensor:
        packed = self._packed
        y, counts = self._backend().routed_ffn(
            x,
            self.router.weight,
            self.router.bias,
            self._threshold,
            packed.w_in,
            packed.w_out,
            self.layout.activation,
            b_in=packed.b_in,
            b_out=packed.b_out,
            center=packed.center,
            min_experts=self.min_experts,
            max_experts=self.max_experts,
        )
        if self.observe_counts is not None:
            self.observe_counts(self, counts)
        return y

    def _backend(self) -> ops.Backend:
        if self._ops is None:
            self._ops = ops.resolve_backend(self.backend, self.router.weight.device)
        return self._ops

    def _pack_if_stale(self) -> bool:
        """Makes the packed weights agree with the projections; False where they cannot be packed."""
        packed = self._packed
        if packed is not None:
            modules = self._owner[0]._modules
            if all(modules[name] is i for name, i in zip(self.layout.projections, packed.linears, strict=True)) and (
                torch.compiler.is_compiling() or packed.fingerprint == self._fingerprint(packed.linears)
            ):
                return True
        return not torch.compiler.is_compiling() and self.pack()

    def _fingerprint(self, linears: tuple[nn.Linear, ...]) -> tuple[tuple[int, int], ...]:
        """Changes when a weight, a bias or the centre is replaced, or written to by an autograd-visible operation."""
        tensors = [linear.weight for linear in linears]
        tensors += [linear.bias for linear in linears if linear.bias is not None]
        if self.center is not None:
            tensors.append(self.center)
        return tuple([(tensor.data_ptr(), tensor._version) for tensor in tensors])

    def pack(self) -> bool:
        """Stores the weights expert by expert and makes the projections' parameters views of that storage.

        Returns:
            False, with nothing packed, if a projection is no plain `nn.Linear` or has no data yet.
        """
        linears = tuple(self.projection(name) for name in self.layout.projections)
        plain = all(type(linear) is nn.Linear or isinstance(linear, PlainLinear) for linear in linears)
        if not plain or any(linear.weight.device.type == "meta" for linear in linears):
            self._unpack()
            return False
        with torch.no_grad():
            self._packed = self._pack(linears)
        return True

    def _pack(self, linears: tuple[nn.Linear, ...]) -> _Packed:
        *inputs, down = linears
        pack_experts = ops.reference.pack_experts if self._backend().name == "reference" else ops.pack_experts
        w_in, w_out = pack_experts(
            inputs[0].weight if len(inputs) == 2 else None, inputs[-1].weight, down.weight, self.num_experts
        )
        neurons, width = self.intermediate_size, len(inputs)
        for g, linear in enumerate(inputs):
            linear.weight.data = w_in.view(neurons, width, self.hidden_size)[:, g]
        down.weight.data = w_out.view(neurons, self.hidden_size).t()
        shape = (self.num_experts, self.expert_width)
        b_in = b_out = center = None
        if any(linear.bias is not None for linear in inputs):
            biases = [torch.zeros_like(w_out[..., 0]).flatten() if i.bias is None else i.bias for i in inputs]
            b_in = torch.stack([bias.float() for bias in biases], dim=-1).view(*shape, width)
        if down.bias is not None:
            b_out = down.bias.detach().float()
        if self.center is not None:
            center = self.center.float().view(shape)
            mean_output = self.center.float() @ w_out.view(neurons, self.hidden_size).float()
            b_out = mean_output if b_out is None else b_out + mean_output
        return _Packed(w_in, w_out, b_in, b_out, center, linears, self._fingerprint(linears))

    def _unpack(self, *_) -> None:
        """Gives every weight storage of its own again: files cannot hold tensors that overlap in memory."""
        linears = [self.projection(name) for name in self.layout.projections]
        for linear in linears if self._packed is None else self._packed.linears:
            if isinstance(linear, nn.Linear):
                linear.weight.data = linear.weight.data.contiguous()
        self._packed = None

    def train(self, mode: bool = True):
        if mode:
            self._unpack()  # what is folded into the packed biases goes stale while weights train
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self._ops = None
        self.threshold = self._threshold_value  # float32 whatever the model was cast to
        if self._packed is not None:
            self._packed = None
            self.pack()
        return self

    def __getstate__(self) -> dict:
        # A copy packs its own weights on its first use.
        return {**self.__dict__, "_packed": None, "_ops": None}
