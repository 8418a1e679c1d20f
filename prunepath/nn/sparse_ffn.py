"""The FFN as a sum of experts, of which each token runs the few that hold its probability mass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from prunepath import ops
from prunepath.errors import PrunePathError
from prunepath.nn.router import Router
from prunepath.nn.thresholds import check_fraction
from prunepath.ops.reference import ACTIVATIONS

NEVER_CHOSEN = -3e4
"""A logit that has no mass beside others, in every dtype."""
DECODE_TOKENS = 64
"""Calls of up to this many tokens read only the active experts; longer ones (prefill) may compute all and mask."""
GROUPED_FRACTION = 0.5
"""Longer calls on a CPU whose tokens run up to this share of the experts read the active ones too."""


@dataclasses.dataclass(frozen=True)
class FFNLayout:
    """The names of an FFN's parts on the module that owns them, and its activation.

    A name may be dotted, for a part that lives in a child of that module.

    Args:
        up: the projection from H to D.
        down: the projection from D to H.
        gate: the projection from H to D whose activation gates `up`; None for an ungated FFN, act(up(x)). The same name
            as `up` means one matrix of both, the gate's D rows first.
        activation: `relu`, `gelu`, `gelu_tanh`, `silu` or `relu2`.
        transposed: the weights are stored [in, out], as those of transformers' `Conv1D` are, and not [out, in].
        dropout: the dropout between activation and `down`, if there is one.
        output_dropout: the dropout after `down`, if the owner has one.
    """

    up: str
    down: str
    activation: str
    gate: str | None = None
    transposed: bool = False
    dropout: str | None = None
    output_dropout: str | None = None

    @property
    def is_fused(self) -> bool:
        """Whether gate and up are one matrix."""
        return self.gate == self.up

    @property
    def inputs(self) -> tuple[str, ...]:
        """The projections that read x."""
        return (self.up,) if self.gate is None or self.is_fused else (self.gate, self.up)

    @property
    def projections(self) -> tuple[str, ...]:
        return (*self.inputs, self.down)

    def sizes(self, owner: nn.Module) -> tuple[int, int]:
        """(H, D) of the FFN whose parts are on `owner`.

        Raises:
            PrunePathError: if a projection is missing, or their shapes do not fit together.
        """
        try:
            shapes = [tuple(owner.get_submodule(name).weight.shape) for name in self.projections]
        except AttributeError as error:
            raise PrunePathError(
                f"Expected a {type(owner).__name__} with the projections {', '.join(self.projections)}, but: {error}."
            ) from error
        *inputs, down = [shape[::-1] for shape in shapes] if self.transposed else shapes
        hidden_size, intermediate_size = down if len(down) == 2 else (0, 0)
        rows = 2 * intermediate_size if self.is_fused else intermediate_size
        if hidden_size * intermediate_size == 0 or any(shape != (rows, hidden_size) for shape in inputs):
            raise PrunePathError(
                f"Expected the projections {', '.join(self.projections)} of a {type(owner).__name__} to lead from H to "
                f"D and back, got weights of the shapes {', '.join(str(list(shape)) for shape in shapes)}."
            )
        return hidden_size, intermediate_size


@dataclasses.dataclass(frozen=True)
class _Packed:
    """Expert-major weights as `routed_ffn` takes them, and what they were made from.

    Every call asks `is_current`, so what it compares is held in plain dicts: looking a parameter up on its module
    takes longer than all of the comparisons.
    """

    w_in: torch.Tensor
    w_out: torch.Tensor
    options: dict[str, torch.Tensor | int]
    linears: tuple[tuple[dict[str, nn.Module | None], str, nn.Module], ...]
    tensors: tuple[tuple[dict[str, torch.Tensor | None], str, torch.Tensor, int, int], ...]
    mapped: bool

    def has_linears(self) -> bool:
        """Whether the projections are the modules that were packed."""
        for modules, name, linear in self.linears:
            if modules[name] is not linear:
                return False
        return True

    def is_current(self) -> bool:
        """False when a weight, a bias or the centre was replaced, or written to by an operation that autograd sees."""
        for owners, name, tensor, pointer, version in self.tensors:
            if owners.get(name) is not tensor or tensor.data_ptr() != pointer or _version(tensor) != version:
                return False
        return self.has_linears()

    def stayed(self) -> bool:
        """Whether the weights, biases and the centre are where they were, whatever was done to their modules."""
        return all(owners[name].data_ptr() == pointer for owners, name, _, pointer, _ in self.tensors)


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # inference tensors keep none


def _state(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), _version(tensor)


def _select(linear: nn.Module, index: torch.Tensor, dim: int, transposed: bool) -> None:
    """Keeps these outputs (dim 0) or inputs (dim 1) of a linear layer."""

    def select(parameter: nn.Parameter, dim: int) -> nn.Parameter:
        kept = parameter.data.index_select(dim, index.to(parameter.device))
        return nn.Parameter(kept, requires_grad=parameter.requires_grad)

    linear.weight = select(linear.weight, 1 - dim if transposed else dim)
    if dim == 0 and linear.bias is not None:
        linear.bias = select(linear.bias, 0)
    _set_size(linear, dim, len(index))


def _extend(linear: nn.Module, added: int, dim: int, transposed: bool, parts: int = 1) -> None:
    """Appends zero outputs (dim 0) or inputs (dim 1) to each of so many parts of a linear layer."""

    def extend(parameter: nn.Parameter, dim: int) -> nn.Parameter:
        pieces = []
        for part in parameter.data.chunk(parts, dim):
            pieces += [part, part.new_zeros([added if d == dim else size for d, size in enumerate(part.shape)])]
        return nn.Parameter(torch.cat(pieces, dim), requires_grad=parameter.requires_grad)

    linear.weight = extend(linear.weight, 1 - dim if transposed else dim)
    if dim == 0 and linear.bias is not None:
        linear.bias = extend(linear.bias, 0)
    _set_size(linear, dim, linear.weight.shape[1 - dim if transposed else dim])


def _set_size(linear: nn.Module, dim: int, size: int) -> None:
    for name in ("out_features", "nf") if dim == 0 else ("in_features", "nx"):
        if hasattr(linear, name):
            setattr(linear, name, size)


class PlainLinear(nn.Linear):
    """Marks subclasses of `nn.Linear` whose weights mean what a linear's do, so that they may be packed."""


def _is_plain(module: nn.Module) -> bool:
    """Whether the weight and the bias of a projection are all there is to it."""
    kind = type(module)
    return kind is nn.Linear or issubclass(kind, PlainLinear) or kind.__name__ == "Conv1D"  # transformers' class


class SparseFFN(nn.Module):
    """y = b + Σ over active experts of W_down[:, S_i]·(h_{S_i}(x) − m_{S_i}), exactly the dense FFN at τ = 1.

    Neurons are ordered so that expert i is neurons i·n to (i + 1)·n. The projections keep their names, shapes and
    modules, so checkpoints, optimisers and adapters see an ordinary FFN; `pack` lays their storage out expert by
    expert and leaves the parameters as views of it, so the weights exist once. Taking a state dict undoes that until
    the next inference call. Gate and up in one matrix stay as they are, for the kernels read them there.

    Inference on few tokens is one `routed_ffn` call, and on a CPU that on more, where few experts are active. With
    gradients enabled, for other calls of more than `DECODE_TOKENS` tokens, or when a projection is no plain linear (a
    LoRA layer, say) or of another dtype than the rest (T5's `wo` in float16 models), the FFN is computed densely and
    masked, in autograd.

    Five hooks, None unless set: `observe_input(ffn, x)`, `observe_counts(ffn, counts)`, `fetch(ffn, x)`, called before
    the kernels read the experts of x, `run(ffn, x)`, which gives (y, counts) in the operator's place, and
    `select(ffn, x, hidden)`, which replaces the router's choice by a mask [T, E], and keeps the FFN to the masked dense
    computation. They see padding too; `valid_tokens` tells it apart where `prunepath.nn.observers.padding_masks` is in
    force.
    `removed_output` [H], None unless set, is added to the output: what stands for the experts that `keep_experts`
    removed. `dense_experts` counts those too: active fractions are shares of the dense FFN.
    `output_metric`, None or float32 [H, H], is set by `prunepath.train.loss_metric`, and saved nowhere. `pages` is
    where the weights of a packed checkpoint lie, if they are used from there: a `prunepath.packing.ExpertPages`.

    Args:
        dense: the module that owns the projections.
        layout: their names, and the activation.
        num_experts: E; divides the intermediate size D.
        center: hold a mean activation for each neuron (`center`, [D]), which a skipped neuron contributes.
        min_experts, max_experts: bounds on a token's experts; `max_experts` 0 means all.
        backend: see `prunepath.ops.resolve_backend`.
        adopt: register the layout's parts here, under their names, because this module replaces `dense`; False leaves
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
        self.layout = layout
        self.hidden_size, self.intermediate_size = layout.sizes(dense)
        self.num_experts = self.dense_experts = num_experts
        self.expert_width = self.intermediate_size // num_experts
        self.min_experts = min_experts
        self.max_experts = max_experts
        self.backend = backend
        self.observe_input: Callable[[SparseFFN, torch.Tensor], None] | None = None
        self.observe_counts: Callable[[SparseFFN, torch.Tensor], None] | None = None
        self.select: Callable[[SparseFFN, torch.Tensor, torch.Tensor], torch.Tensor] | None = None
        self.fetch: Callable[[SparseFFN, torch.Tensor], None] | None = None
        self.run: Callable[[SparseFFN, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None
        self.pages: object | None = None
        self.padding_mask: torch.Tensor | None = None
        self.output_metric: torch.Tensor | None = None
        if adopt:
            for name in (*layout.projections, layout.dropout, layout.output_dropout):
                if name is not None:
                    child = name.partition(".")[0]
                    self.add_module(child, dense._modules[child])
        owner = self if adopt else dense
        # Where each projection is. The tuples keep its parent from becoming a submodule of this one.
        self._places: dict[str, tuple[nn.Module, str]] = {}
        for name in layout.projections:
            parent, _, leaf = name.rpartition(".")
            self._places[name] = (owner.get_submodule(parent), leaf)
        owner.register_state_dict_pre_hook(self._unpack)
        weight = self.projection(layout.up).weight
        factory = {"device": weight.device, "dtype": weight.dtype}
        self.router = Router(self.hidden_size, num_experts, **factory)
        self.register_buffer("center", torch.zeros(self.intermediate_size, **factory) if center else None)
        self.register_buffer("removed_output", None)
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
            self._threshold = torch.full(self._threshold.shape, value, dtype=torch.float32, device=device)

    def try_threshold(self, value: torch.Tensor) -> None:
        """Runs at the threshold `value`, float32 [] on this module's device, which the host does not wait for.

        `threshold` does not show it, and ends it when it is set.
        """
        self._threshold.copy_(value)

    def set_request_thresholds(self, values: Sequence[float] | None) -> None:
        """Gives each sequence of a batch its own threshold.

        The values lie in one float32 tensor [B]; setting B others writes to it, as setting `threshold` does, so that
        captured CUDA graphs and compiled models follow. Moving or casting the module gives all of them `threshold`.

        Args:
            values: thresholds in (0, 1], one for each of the B sequences; a call's T tokens are then B times as many
                tokens of each, sequence by sequence. None returns to one threshold for all.
        """
        if values is None:
            values = self._threshold_value
        else:
            values = [check_fraction("threshold", value) for value in values]
        new = torch.tensor(values, dtype=torch.float32, device=self.router.weight.device)
        if new.shape == self._threshold.shape:
            self._threshold.copy_(new)
        else:
            self._threshold = new

    def projection(self, name: str) -> nn.Module:
        parent, leaf = self._places[name]
        return parent._modules[leaf]

    def input_weights(self) -> list[torch.Tensor]:
        """The weights that read x, each [D, H]: (gate, up) or (up,). Views of the parameters, whatever their layout."""
        matrices = [self._matrix(name) for name in self.layout.inputs]
        return list(matrices[0].chunk(2)) if self.layout.is_fused else matrices

    def input_biases(self) -> list[torch.Tensor | None]:
        """The biases of `input_weights`, each [D] or None; views too."""
        biases = [self.projection(name).bias for name in self.layout.inputs]
        if self.layout.is_fused:
            return [None, None] if biases[0] is None else list(biases[0].chunk(2))
        return biases

    def down_weight(self) -> torch.Tensor:
        """W_down [H, D], a view of the parameter."""
        return self._matrix(self.layout.down)

    def _matrix(self, name: str) -> torch.Tensor:
        weight = self.projection(name).weight
        return weight.t() if self.layout.transposed else weight

    def contribution_weight(self) -> torch.Tensor:
        """W_down [H, D] as contributions are measured by it: in the metric M of `output_metric`, M^{1/2}·W_down."""
        weight = self.down_weight()
        return weight if self.output_metric is None else self.output_metric.to(weight.device) @ weight.float()

    def _store(self, name: str, matrix: torch.Tensor) -> None:
        """Makes `matrix` [out, in] the storage of a projection's weight."""
        projection = self.projection(name)
        stored = matrix.t() if self.layout.transposed else matrix
        if projection.weight is None:
            projection.weight = nn.Parameter(stored)
        else:
            projection.weight.data = stored

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        """Neuron activations h [T, D] of x [T, H], in x's dtype."""
        layout = self.layout
        act = ACTIVATIONS[layout.activation]
        up = self.projection(layout.up)(x)
        if layout.gate is None:
            return act(up)
        gate, up = up.chunk(2, dim=-1) if layout.is_fused else (self.projection(layout.gate)(x), up)
        return act(gate) * up

    def _project(self, hidden: torch.Tensor) -> torch.Tensor:
        """The output [T, H] of masked activations [T, D], with the FFN's own dropout before the projection."""
        if self.layout.dropout is not None:
            hidden = self.get_submodule(self.layout.dropout)(hidden)
        projection = self.projection(self.layout.down)
        dtype = projection.weight.dtype
        if hidden.dtype != dtype and dtype.is_floating_point and not torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(dtype)  # T5 keeps `wo` in float32 when the rest of the model is float16
        return self.add_removed(projection(hidden))

    def add_removed(self, output: torch.Tensor) -> torch.Tensor:
        """The output with `removed_output`, where there is one."""
        return output if self.removed_output is None else output + self.removed_output.to(output.dtype)

    def valid_tokens(self, num_tokens: int) -> torch.Tensor | None:
        """Which of the current call's T tokens are no padding: bool [T]; None if all are, or nobody said."""
        if self.padding_mask is None or num_tokens % len(self.padding_mask):
            return None
        length = num_tokens // len(self.padding_mask)  # with a KV cache, a call has only the sequences' last tokens
        return self.padding_mask[:, -length:].flatten() if length <= self.padding_mask.shape[1] else None

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The router's (expert_ids, probs, counts) for x [T, H], as of `prunepath.ops.route`. No gradient."""
        with torch.no_grad():
            return self._backend().route(
                self.router(x), self._thresholds(x.shape[0]), min_experts=self.min_experts, max_experts=self.max_experts
            )

    def active_mask(self, x: torch.Tensor) -> torch.Tensor:
        """Which experts run for x [T, H]: bool [T, E]. No gradient passes through the selection."""
        expert_ids, _, counts = self.route(x)
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
        """FFN output of `hidden_states` [..., H], same shape; its dtype is the down projection's."""
        x = hidden_states.reshape(-1, self.hidden_size)
        if self.observe_input is not None:
            self.observe_input(self, x)
        if self.reads_active_experts(x):
            y = self.run_active_experts(x)
        else:
            hidden = self.hidden(x)
            y = self._project(self.skip(hidden, self.mask(x, hidden)))
        if self.layout.output_dropout is not None:
            y = self.get_submodule(self.layout.output_dropout)(y)
        return y.view_as(hidden_states)

    def reads_active_experts(self, x: torch.Tensor) -> bool:
        """Whether x [T, H] is served by the kernels, which read the active experts alone."""
        if self.run is not None and (self.select is not None or torch.is_grad_enabled()):
            raise PrunePathError("Expected inference without gradients, since the experts are offloaded.")
        if self.run is not None:
            return True
        if self.select is not None or torch.is_grad_enabled():
            return False
        if self.layout.dropout is not None and self.training:
            return False
        if x.shape[0] > DECODE_TOKENS and not self.is_mapped and not self._is_grouped_faster(x):
            return False
        return self._pack_if_stale()

    def _is_grouped_faster(self, x: torch.Tensor) -> bool:
        """Whether the kernels, which group many tokens by expert, take less time for them than computing all does.

        Judged by the active fraction of some of them.
        """
        if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return False
        if self._backend().name == "reference":
            return False
        some = slice(None, None, -(-len(x) // DECODE_TOKENS))
        thresholds = self._thresholds(len(x))
        thresholds = thresholds[some] if thresholds.dim() else thresholds
        _, _, counts = self._backend().route(
            self.router(x[some]), thresholds, min_experts=self.min_experts, max_experts=self.max_experts
        )
        return counts.sum().item() <= GROUPED_FRACTION * self.num_experts * len(counts)

    def run_active_experts(self, x: torch.Tensor) -> torch.Tensor:
        """The output [T, H] of x [T, H] by one operator call; the weights have to be packed."""
        if self.fetch is not None:
            self.fetch(self, x)
        if self.run is not None:
            y, counts = self.run(self, x)
        else:
            packed = self._packed
            router = self._modules["router"]._parameters
            y, counts = self._ops.routed_ffn(
                x,
                router["weight"],
                router["bias"],
                self._thresholds(x.shape[0]),
                packed.w_in,
                packed.w_out,
                self.layout.activation,
                **packed.options,
            )
        if self.observe_counts is not None:
            self.observe_counts(self, counts)
        return y

    def _thresholds(self, num_tokens: int) -> torch.Tensor:
        """The threshold of T tokens, [] or [T]."""
        threshold = self._buffers["_threshold"]
        if threshold.dim() == 1 and 0 < len(threshold) < num_tokens:
            return threshold.repeat_interleave(num_tokens // len(threshold), output_size=num_tokens)
        return threshold

    @property
    def is_mapped(self) -> bool:
        """Whether the weights are those of `use_packed`, on the CPU."""
        return self._packed is not None and self._packed.mapped

    def _backend(self) -> ops.Backend:
        if self._ops is None:
            self._ops = ops.resolve_backend(self.backend, self.router.weight.device)
        return self._ops

    def _pack_if_stale(self) -> bool:
        """Makes the packed weights agree with the projections; False where they cannot be packed."""
        packed = self._packed
        if torch.compiler.is_compiling():
            return packed is not None and packed.has_linears()
        return (packed is not None and packed.is_current()) or self.pack()

    def pack(self) -> bool:
        """Stores the weights expert by expert and makes the projections' parameters views of that storage.

        Returns:
            False, with nothing packed, if a projection is no plain linear, has another dtype than the rest, or has no
            data yet.
        """
        linears = tuple(self.projection(name) for name in self.layout.projections)
        kinds = {(linear.weight.device.type, linear.weight.dtype) for linear in linears}
        if not all(map(_is_plain, linears)) or len(kinds) > 1 or linears[0].weight.device.type == "meta":
            self._unpack()
            return False
        self._backend()  # the one that calls use
        with torch.no_grad(), torch.autocast(linears[0].weight.device.type, enabled=False):
            self._packed = self._pack(linears)
        self.pages = None
        return True

    def _pack(self, linears: tuple[nn.Module, ...]) -> _Packed:
        layout, hidden_size = self.layout, self.hidden_size
        shape = (self.num_experts, self.expert_width)
        if layout.is_fused:
            both = self._matrix(layout.up).data.contiguous()
            self._store(layout.up, both)
            w_in = both.view(2, *shape, hidden_size).permute(1, 2, 0, 3)
            w_out = self.down_weight().data.t().contiguous().view(*shape, hidden_size)
        else:
            pack_experts = ops.reference.pack_experts if self._backend().name == "reference" else ops.pack_experts
            *gate, up = self.input_weights()
            w_in, w_out = pack_experts(gate[0] if gate else None, up, self.down_weight(), self.num_experts)
            for g, name in enumerate(layout.inputs):
                self._store(name, w_in.flatten(0, 1)[:, g])
        self._store(layout.down, w_out.flatten(0, 1).t())
        return self._describe(w_in, w_out, self.mean_output(w_out), linears, mapped=False)

    def mean_output(self, w_out: torch.Tensor) -> torch.Tensor | None:
        """What the experts of w_out [E, n, H] add where all contribute their means, W_down·m: float32 [H]."""
        return None if self.center is None else self.center.float() @ w_out.flatten(0, 1).float()

    def _describe(
        self,
        w_in: torch.Tensor,
        w_out: torch.Tensor,
        mean_output: torch.Tensor | None,
        linears: tuple[nn.Module, ...],
        *,
        mapped: bool,
    ) -> _Packed:
        shape = (self.num_experts, self.expert_width)
        b_in = b_out = center = None
        biases = self.input_biases()
        if any(bias is not None for bias in biases):
            device = self.router.weight.device  # the weights' may be another one
            biases = [torch.zeros(self.intermediate_size, device=device) if b is None else b for b in biases]
            b_in = torch.stack([bias.float() for bias in biases], dim=-1).view(*shape, len(biases))
        if linears[-1].bias is not None:
            b_out = linears[-1].bias.detach().float()
        if self.center is not None:
            center = self.center.float().view(shape)
            b_out = mean_output if b_out is None else b_out + mean_output
        if self.removed_output is not None:
            b_out = self.removed_output.float() if b_out is None else b_out + self.removed_output.float()
        options = {"b_in": b_in, "b_out": b_out, "center": center}
        options = {name: tensor for name, tensor in options.items() if tensor is not None}
        if (self.min_experts, self.max_experts) != (1, 0):
            options.update(min_experts=self.min_experts, max_experts=self.max_experts)
        places = [self._places[name] for name in self.layout.projections]
        owners = [(linear._parameters, name) for linear in linears for name in ("weight", "bias")]
        owners += [(self._buffers, "center"), (self._buffers, "removed_output")]
        return _Packed(
            w_in,
            w_out,
            options,
            tuple([(parent._modules, leaf, linear) for (parent, leaf), linear in zip(places, linears, strict=True)]),
            tuple(
                [
                    (tensors, name, tensor, *_state(tensor))
                    for tensors, name in owners
                    if (tensor := tensors.get(name)) is not None
                ]
            ),
            mapped,
        )

    def operands(self) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """w_in, w_out and the optional tensors of `ops.sparse_ffn`, of an FFN whose weights are packed."""
        packed = self._packed
        options = {name: packed.options[name] for name in ("b_in", "b_out", "center") if name in packed.options}
        return packed.w_in, packed.w_out, options

    def packed_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of `use_packed`'s weights."""
        experts = (self.num_experts, self.expert_width)
        inputs = (2, *experts) if self.layout.is_fused else (*experts, 1 if self.layout.gate is None else 2)
        return (*inputs, self.hidden_size), (*experts, self.hidden_size)

    def expert_major(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights as `use_packed` takes them."""
        self.pack()
        packed = self._packed
        w_in = packed.w_in.permute(2, 0, 1, 3) if self.layout.is_fused else packed.w_in
        return w_in, packed.w_out

    def drop_weights(self) -> None:
        """Leaves the projections without weights, until `use_packed` gives them some."""
        self._packed = None
        for name in self.layout.projections:
            self.projection(name).weight = None

    @torch.no_grad()
    def use_packed(self, w_in: torch.Tensor, w_out: torch.Tensor, mean_output: torch.Tensor | None) -> None:
        """Takes weights that are laid out expert by expert already, without copying or reading them.

        As long as they are on the CPU, calls of any length read the active experts alone.

        Args:
            w_in: [E, n, G, H], as of `ops.pack_experts`; [2, E, n, H] where gate and up are one matrix.
            w_out: [E, n, H].
            mean_output: as of `mean_output(w_out)`, which would read all of w_out; None without centring.
        """
        layout = self.layout
        if layout.is_fused:
            self._store(layout.up, w_in.view(-1, self.hidden_size))
            w_in = w_in.permute(1, 2, 0, 3)
        else:
            for g, name in enumerate(layout.inputs):
                self._store(name, w_in.flatten(0, 1)[:, g])
        self._store(layout.down, w_out.flatten(0, 1).t())
        linears = tuple(self.projection(name) for name in layout.projections)
        self._backend()  # the one that calls use
        self._packed = self._describe(w_in, w_out, mean_output, linears, mapped=w_in.device.type == "cpu")

    @torch.no_grad()
    def keep_experts(self, experts: Sequence[int]) -> None:
        """Removes all experts but these, with their neurons and their rows of the router.

        Args:
            experts: in ascending order, at least one.
        """
        self._unpack()
        kept = torch.tensor(experts, device="cpu")  # whatever device is the default
        neurons = torch.arange(self.intermediate_size, device="cpu").view(-1, self.expert_width)[kept].flatten()
        rows = torch.cat([neurons, self.intermediate_size + neurons]) if self.layout.is_fused else neurons
        for name in self.layout.inputs:
            _select(self.projection(name), rows, 0, self.layout.transposed)
        _select(self.projection(self.layout.down), neurons, 1, self.layout.transposed)
        _select(self.router, kept, 0, False)
        if self.center is not None:
            self.center = self.center[neurons.to(self.center.device)]
        self.num_experts, self.intermediate_size = len(kept), len(neurons)
        self.min_experts = min(self.min_experts, self.num_experts)
        self.max_experts = self.max_experts if self.max_experts < self.num_experts else 0

    @torch.no_grad()
    def pad_experts(self, num_experts: int) -> None:
        """Appends experts of zeros that no router chooses, up to `num_experts`."""
        self._unpack()
        added = num_experts - self.num_experts
        rows = added * self.expert_width
        for name in self.layout.inputs:
            _extend(self.projection(name), rows, 0, self.layout.transposed, 2 if self.layout.is_fused else 1)
        _extend(self.projection(self.layout.down), rows, 1, self.layout.transposed)
        _extend(self.router, added, 0, False)
        self.router.bias[self.num_experts :] = NEVER_CHOSEN
        if self.center is not None:
            self.center = F.pad(self.center, (0, rows))
        self.num_experts, self.intermediate_size = num_experts, num_experts * self.expert_width

    def _unpack(self, *_) -> None:
        """Gives every weight storage of its own again: files cannot hold tensors that overlap in memory."""
        linears = [self.projection(name) for name in self.layout.projections]
        for linear in linears if self._packed is None else [linear for _, _, linear in self._packed.linears]:
            if _is_plain(linear) and linear.weight is not None:
                linear.weight.data = linear.weight.data.contiguous()
        self._packed = self.pages = None

    def train(self, mode: bool = True):
        if mode:
            self._unpack()  # what is folded into the packed biases goes stale while weights train
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self._ops = None
        self.threshold = self._threshold_value  # float32 whatever the model was cast to
        packed = self._packed
        if packed is not None and packed.mapped and packed.stayed():
            self._backend()
            tensors = tuple([(owner, name, owner[name], *_state(owner[name])) for owner, name, *_ in packed.tensors])
            self._packed = dataclasses.replace(packed, tensors=tensors)
        elif packed is not None or self.run is not None:
            self._packed = self.run = None
            self.pack()
        return self

    def __getstate__(self) -> dict:
        # A copy packs its own weights on its first use.
        return {**self.__dict__, "_packed": None, "pages": None, "fetch": None, "run": None, "_ops": None}
