"""The FFN as a sum of experts, of which each token runs the few that hold its probability mass."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.hooks import RemovableHandle

from prunepath import ops
from prunepath.config import RouterForm
from prunepath.errors import PrunePathError
from prunepath.nn.layout import FFNLayout, is_plain, lay_out
from prunepath.nn.router import Router
from prunepath.nn.thresholds import check_each, check_fraction
from prunepath.ops.reference import ACTIVATIONS

KERNEL_TOKENS = 64
"""Calls of up to this many tokens read only the active experts; longer ones (prefill) compute all and mask."""

InputHook = Callable[["SparseFFN", torch.Tensor], None]
CountsHook = Callable[["SparseFFN", torch.Tensor], None]


class SparseFFN(nn.Module):
    """y = b_down + Σ over active experts of W_down[:, S_i]·h_{S_i}(x), exactly the dense FFN at τ = 1.

    Expert i is neurons i·n to (i + 1)·n − 1. The projections keep their names, shapes and modules, so checkpoints,
    optimisers and adapters see an ordinary FFN. Only `lay_out_for_inference` and `lay_out_for_training` change how
    weights lie in memory, and no call keeps anything in the module.

    Inference on few tokens is one `ops.routed_ffn` call. With gradients enabled, on more than `KERNEL_TOKENS` tokens,
    or where a projection is more than a plain linear (a LoRA layer or hooks, say), is of another dtype than the rest or
    not laid out for inference, the FFN is computed densely and masked, in autograd.

    Args:
        dense: the module that owns the projections.
        layout: their names, and the activation.
        num_experts: E; divides the intermediate size D.
        router_rank: r of the router; 0 is full rank.
        router_form: of the router; `factored` needs experts of one neuron.
        router_bits: of the router's tables, 4 or 16; 4 needs an even H and r.
        min_experts, max_experts: bounds on a token's experts; `max_experts` 0 means all.
        adopt: register the layout's parts here, under their names, because this module replaces `dense`; False leaves
            them with `dense`.

    Attributes:
        selector: None, or a function (ffn, x [T, H], hidden [T, D]) that chooses the experts in the router's place: a
            bool mask [T, E], or gates of hidden's dtype that scale what experts add. It keeps the FFN to the masked
            dense computation.
        executor: None, or a function (ffn, x [T, H]) that gives (y [T, H], counts int32 [T]) in the place of
            `run_kernels`, for inference calls of any length. Moving or casting the module ends it.
    """

    def __init__(
        self,
        dense: nn.Module,
        layout: FFNLayout,
        num_experts: int,
        *,
        router_rank: int = 0,
        router_form: RouterForm = "linear",
        router_bits: int = 16,
        min_experts: int = 1,
        max_experts: int = 0,
        adopt: bool = True,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.hidden_size, self.intermediate_size = layout.sizes(dense)
        self.num_experts = num_experts
        self.expert_width = self.intermediate_size // num_experts
        self.min_experts = min_experts
        self.max_experts = max_experts
        self.selector: Callable[[SparseFFN, torch.Tensor, torch.Tensor], torch.Tensor] | None = None
        self.executor: Callable[[SparseFFN, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None
        self._input_hooks: OrderedDict[int, InputHook] = OrderedDict()
        self._counts_hooks: OrderedDict[int, CountsHook] = OrderedDict()
        if adopt:
            for name in (*layout.projections, layout.dropout, layout.output_dropout):
                if name is not None:
                    child = name.partition(".")[0]
                    self.add_module(child, dense._modules[child])
        # A tuple, so that an owner does not become a submodule of its FFN.
        self._owner = () if adopt else (dense,)
        weight = self.projection(layout.up).weight
        factors = 0 if router_form == "linear" else 1 if layout.gate is None else 2
        self.router = Router(
            self.hidden_size,
            num_experts,
            router_rank,
            factors=factors,
            bits=router_bits,
            activation=layout.activation,
            device=weight.device,
            dtype=weight.dtype,
        )
        threshold = torch.ones((), dtype=torch.float32, device=weight.device)
        self.register_buffer("_threshold", threshold, persistent=False)
        self.register_buffer("_request_thresholds", None, persistent=False)
        self._threshold_value = 1.0
        self._has_request_thresholds = False

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, "
            f"num_experts={self.num_experts}, threshold={self._threshold_value:g}"
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """FFN output of `hidden_states` [..., H], same shape; its dtype is the down projection's.

        Raises:
            PrunePathError: for inputs of another width, or a batch that requests with their own thresholds do not fit.
        """
        if hidden_states.shape[-1:] != (self.hidden_size,):
            raise PrunePathError(
                f"Expected hidden states of shape [..., {self.hidden_size}], got {list(hidden_states.shape)}."
            )
        x = hidden_states.reshape(-1, self.hidden_size)
        if self._has_request_thresholds and hidden_states.dim() > 2:
            self._check_requests(hidden_states.shape[0])
        for hook in tuple(self._input_hooks.values()):
            hook(self, x)
        if self.is_served_by_kernels(x):
            y, counts = self.run_kernels(x) if self.executor is None else self.executor(self, x)
            self._report_counts(counts)
        else:
            # Projections see the input's own shape: peft, mixing adapters, goes by its sequences.
            hidden = self.hidden(hidden_states)
            flat = hidden.reshape(-1, self.intermediate_size)
            y = self.project(self.skip(flat, self.active(x, flat)).reshape(hidden.shape))
        if self.layout.output_dropout is not None:
            y = self.get_submodule(self.layout.output_dropout)(y)
        return y.view_as(hidden_states)

    def is_served_by_kernels(self, x: torch.Tensor) -> bool:
        """Whether x [T, H] is served by `run_kernels` or `executor`, which read the active experts alone."""
        if torch.is_grad_enabled() or self.selector is not None or (self.layout.dropout and self.training):
            return False
        if forward_ad._current_level >= 0:
            return False  # forward-mode derivatives (torch.func.jvp), for which gradients need not be enabled
        if torch.compiler.is_exporting():
            return False  # programs of any length, in torch's own operators
        return (self.executor is not None or x.shape[0] <= KERNEL_TOKENS) and self.has_row_tables()

    def run_kernels(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(y [T, H], counts int32 [T]) of x [T, H] by one operator call; the weights have to be laid out for it."""
        router = self.router  # or what peft puts around it
        *gate, up, down_t = self.tables()
        biases = self.biases()
        kernels = ops.resolve_backend(up.device)
        y, counts = kernels.routed_ffn(
            x.to(up.dtype),
            router.w_in,
            router.w_out,
            router.bias,
            self._thresholds(x.shape[0]),
            gate[0] if gate else None,
            up,
            down_t,
            self.layout.activation,
            router_in_scale=router.w_in_scale,
            router_out_scale=router.w_out_scale,
            router_floor=router.floor,
            router_log_scale=router.log_scale,
            gate_bias=biases[0] if gate else None,
            up_bias=biases[-2],
            down_bias=biases[-1],
            min_experts=self.min_experts,
            max_experts=self.max_experts,
        )
        device = up.device.type
        return y.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else y, counts

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        """Neuron activations h [..., D] of x [..., H]."""
        layout = self.layout
        act = ACTIVATIONS[layout.activation]
        up = self._call(layout.up, x)
        if layout.gate is None:
            return act(up)
        gate, up = up.chunk(2, dim=-1) if layout.is_fused else (self._call(layout.gate, x), up)
        return act(gate) * up

    def skip(self, hidden: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        """`hidden` [T, D] with zeros for the neurons of inactive experts; `active` [T, E] is as `selector` gives it."""
        experts = hidden.unflatten(-1, (self.num_experts, self.expert_width))
        if active.dtype == torch.bool:
            return torch.where(active.unsqueeze(-1), experts, 0.0).flatten(-2)  # not a product: 0·∞ is NaN
        return (experts * active.unsqueeze(-1)).flatten(-2)

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """The output [..., H] of masked activations [..., D], with the FFN's own dropout before the projection."""
        if self.layout.dropout is not None:
            hidden = self.get_submodule(self.layout.dropout)(hidden)
        projection = self.projection(self.layout.down)
        if is_plain(projection) and not torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(projection.weight.dtype)  # T5 keeps `wo` in float32 when the rest is float16
        return self._call(self.layout.down, hidden)

    def select(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The router's (mask bool [T, E], counts int32 [T]) for x [T, H], as of `ops.select`. No gradient."""
        with torch.no_grad():
            logits = self.router(x)
            is_exporting = torch.compiler.is_exporting()
            select = ops.reference.select if is_exporting else ops.resolve_backend(logits.device).select
            return select(
                logits, self._thresholds(x.shape[0]), min_experts=self.min_experts, max_experts=self.max_experts
            )

    def active(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """What `skip` applies to the activations `hidden` [T, D] of x [T, H]: chosen by the selector or the router."""
        if self.selector is None:
            active, counts = self.select(x)
        else:
            active = self.selector(self, x, hidden)
            counts = active.count_nonzero(-1).int() if self._counts_hooks else None
        self._report_counts(counts)
        return active

    # The weights

    def projection(self, name: str) -> nn.Module:
        module = self._owner[0] if self._owner else self
        for part in name.split("."):
            module = module._modules[part]
        return module

    def _call(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self.projection(name)(x)

    def matrix(self, name: str) -> torch.Tensor:
        """The weight [out, in] of a projection, a view of the parameter."""
        weight = self.projection(name).weight
        return weight.t() if self.layout.transposed else weight

    def tables(self) -> list[torch.Tensor]:
        """[gate, up, down_t] or [up, down_t], each [D, H] with a row for each neuron; views of the parameters."""
        matrices = [self.matrix(name) for name in self.layout.inputs]
        inputs = matrices[0].chunk(2) if self.layout.is_fused else matrices
        return [*inputs, self.matrix(self.layout.down).t()]

    def biases(self) -> list[torch.Tensor | None]:
        """The biases that belong to `tables`, each [D] but the last, [H]; None for a projection without one."""
        biases = [self.projection(name).bias for name in self.layout.inputs]
        if self.layout.is_fused:
            biases = [None, None] if biases[0] is None else list(biases[0].chunk(2))
        return [*biases, self.projection(self.layout.down).bias]

    def is_plain(self) -> bool:
        """Whether every projection is its weight and bias and nothing else, so that their modules need no call."""
        return all(is_plain(self.projection(name)) for name in self.layout.projections)

    def has_row_tables(self) -> bool:
        """Whether kernels can read the weights: plain, of one device and dtype, not float64, with contiguous rows."""
        if not self.is_plain():
            return False
        tables = self.tables()
        like = self.router.bias
        if like.is_meta or like.dtype == torch.float64:
            return False
        if any(table.dtype != like.dtype or table.device != like.device for table in tables):
            return False
        if self.router.is_ready and all(table.stride(1) == 1 for table in tables):
            return True
        if not torch.compiler.is_compiling():
            warnings.warn(
                "An FFN's weights are not laid out for inference, so that it computes all neurons and masks them: call "
                "prunepath.for_inference(model).",
                stacklevel=2,
            )
        return False

    def is_column_major(self, name: str) -> bool:
        """Whether inference needs a projection's weight stored column by column, so that each neuron's are together."""
        return (name == self.layout.down) != self.layout.transposed

    def lay_out_for_inference(self) -> None:
        """Stores every neuron's weights contiguously: the down projection [H, D] column by column. Packs the router."""
        self.router.pack()
        for name in self.layout.projections:
            lay_out(self.projection(name), column_major=self.is_column_major(name))

    def lay_out_for_training(self) -> None:
        """Stores every parameter row by row, as optimisers that flatten them and sharded training need it.

        The router's packed tables become parameters.
        """
        self.router.unpack()
        for name in self.layout.projections:
            lay_out(self.projection(name), column_major=False)

    # Thresholds

    @property
    def threshold(self) -> float:
        """τ, the probability mass that a token's experts cover; 1.0 runs all. Setting it sets it for all requests.

        It is this module's alone: `save_pretrained` writes what `set_threshold` or `set_budget` set last.
        """
        return self._threshold_value

    @threshold.setter
    @torch.inference_mode(False)
    def threshold(self, value: float) -> None:
        self._threshold_value = check_fraction("threshold", value)
        self._has_request_thresholds = False
        device = self._threshold.device if self.router.w_out.is_meta else self.router.w_out.device
        self._write("_threshold", torch.full((), self._threshold_value, dtype=torch.float32, device=device))
        requests = self._request_thresholds
        if requests is not None:
            self._write("_request_thresholds", torch.full_like(requests, self._threshold_value))

    def try_threshold(self, value: torch.Tensor) -> None:
        """Runs at the threshold `value`, float32 [] on this module's device, which the host does not wait for.

        `threshold` does not show it, and ends it when it is set.
        """
        self._write("_threshold", value)

    @torch.inference_mode(False)
    def set_request_thresholds(self, values: Sequence[float] | None) -> None:
        """Gives each sequence of a batch its own threshold, until `threshold` is set.

        The values lie in one float32 tensor [B]; setting B others writes to it, as setting `threshold` does, so that
        captured CUDA graphs and compiled models follow. Moving or casting the module gives all of them `threshold`.

        Args:
            values: thresholds in (0, 1], one for each of the B sequences; a call's T tokens are then B times as many
                tokens of each, sequence by sequence. None returns to one threshold for all.
        """
        if values is None:
            self.threshold = self._threshold_value
            return
        new = torch.tensor(check_each("threshold", values), dtype=torch.float32, device=self._threshold.device)
        self._write("_request_thresholds", new)
        self._has_request_thresholds = True

    def _write(self, name: str, values: torch.Tensor) -> None:
        """Gives a buffer new values: in place if it can be, since captured CUDA graphs and compiled models read it."""
        written = self._buffers[name]
        like = [(t.shape, t.dtype, t.device) for t in (written, values) if t is not None]
        if like == like[:1] * 2:
            # A tensor that was copied or moved inside torch.inference_mode() cannot be written outside of it.
            with torch.inference_mode(written.is_inference()):
                written.copy_(values)
        else:
            self._buffers[name] = values

    def _thresholds(self, num_tokens: int) -> torch.Tensor:
        """The threshold of T tokens, [] or [T]."""
        if not self._has_request_thresholds:
            return self._buffers["_threshold"]
        thresholds = self._buffers["_request_thresholds"]
        if len(thresholds) == num_tokens:
            return thresholds
        self._check_requests(num_tokens)
        return thresholds.repeat_interleave(num_tokens // len(thresholds), output_size=num_tokens)

    def _check_requests(self, size: int) -> None:
        requests = len(self._buffers["_request_thresholds"])
        if size % requests:
            raise PrunePathError(
                f"Expected a batch of the {requests} sequences that were given budgets or thresholds of their own, got "
                f"{size}: give each of this batch one, or set one for all."
            )

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        if self._threshold.dtype != torch.float32:  # whatever the model was cast to
            self._request_thresholds = None
        self.threshold = self._threshold_value
        self.executor = None
        return self

    # Hooks

    def register_input_hook(self, hook: InputHook) -> RemovableHandle:
        """Calls `hook(ffn, x)` with the input x [T, H] of every call, padding included."""
        return _register(self._input_hooks, hook)

    def register_counts_hook(self, hook: CountsHook) -> RemovableHandle:
        """Calls `hook(ffn, counts)` with the numbers of active experts, int32 [T], of every call, padding included."""
        return _register(self._counts_hooks, hook)

    def _report_counts(self, counts: torch.Tensor) -> None:
        for hook in tuple(self._counts_hooks.values()):
            hook(self, counts)


def _register(hooks: OrderedDict[int, Callable], hook: Callable) -> RemovableHandle:
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle
