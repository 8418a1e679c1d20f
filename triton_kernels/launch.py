"""Runs the FFN's kernels: what lies where in the workspace, and which kernels a number of tokens takes."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import configs, decode, prefill
from .arithmetic import INTERPRETED
from .checks import in_strides
from .configs import MAX_DECODE_TOKENS, MIN_BLOCK_TOKENS, Shape
from .route import route_into
from .selection import MAX_ALONE_EXPERTS, NUM_COUNTERS

_ROUTER_SPLITS = 16
_REDUCED_COLUMNS = 128
_MAX_REDUCERS = 32
# Comparisons of given experts that a program has in registers at a time.
_COMPARED = 2048


class Router:
    """What the experts of a token follow from: the router and its options."""

    def __init__(self, weight: Tensor, bias: Tensor | None, threshold: Tensor, min_experts: int, max_experts: int):
        self.weight = weight
        self.bias = bias
        self.threshold = threshold
        self.threshold_stride = threshold.stride(0) if threshold.dim() else 0
        self.min_experts = min_experts
        self.max_experts = max_experts or weight.shape[0]


class _Space:
    """Tensors in one workspace, one after the other, each at a multiple of 16 bytes. Without one: their size."""

    def __init__(self, workspace: Tensor | None):
        self.workspace = workspace
        self.size = 0

    def take(self, dtype: torch.dtype, *shape: int) -> Tensor | None:
        start = self.size
        number = 1
        for length in shape:
            number *= length
        self.size = start + -(-number * dtype.itemsize // 16) * 16
        if self.workspace is None:
            return None
        return self.workspace[start : start + number * dtype.itemsize].view(dtype).view(shape)


def shape_of(w_in: Tensor) -> Shape:
    num_experts, width, inner, hidden_size = w_in.shape
    return Shape(hidden_size, num_experts * width, inner, w_in.dtype)


def _hidden_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the activations between the kernels: float16 has too few exponents for them."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _precision(dtype: torch.dtype) -> str:
    """Of the product of activations and w_out."""
    return "tf32" if dtype == torch.float16 and torch.version.hip is None else "ieee"


class _Zeroed:
    """What kernels count with and mark tokens in; zero when the first kernel that uses them starts."""

    def __init__(self, space: _Space, num_experts: int, hidden_size: int):
        num_words = 2 * num_experts  # int64
        self.all = space.take(torch.int32, num_words + NUM_COUNTERS + triton.cdiv(hidden_size, 16))
        if self.all is not None:
            self.words = self.all[:num_words].view(torch.int64)
            self.counters = self.all[num_words:]


class _Fused:
    """A call of `router_kernel` and `fused_kernel`, or of the latter with given experts."""

    def __init__(self, space: _Space, num_tokens: int, w_in: Tensor, device: torch.device):
        num_experts, hidden_size = w_in.shape[0], w_in.shape[3]
        arch = configs.architecture(device)
        self.config = configs.fused(arch, shape_of(w_in), num_tokens)
        self.overlap = _overlap(arch, num_tokens)
        self.programs = configs.num_multiprocessors(device) * self.config.programs
        self.zeroed = _Zeroed(space, num_experts, hidden_size)
        self.logits = space.take(torch.float32, num_tokens, num_experts)
        self.listed_experts = space.take(torch.int32, num_experts)
        self.listed_words = space.take(torch.int64, num_experts)
        self.partials = space.take(torch.float32, self.programs, num_tokens, hidden_size)

    def run(self, x, w_in, w_out, activation, b_in, b_out, center, router, expert_ids, counts, y) -> None:
        num_tokens, hidden_size = x.shape
        num_experts, width, inner, _ = w_in.shape
        if router is None:
            self.zeroed.all.zero_()
        else:
            block = min(4096, configs.block_hidden(shape_of(w_in)))
            experts = max(1, min(4, 4096 // block))
            decode.router_kernel[(triton.cdiv(num_experts, experts),)](
                x,
                router.weight,
                router.bias,
                self.logits,
                self.zeroed.all,
                self.zeroed.all.shape[0],
                num_tokens,
                num_experts,
                hidden_size,
                *x.stride(),
                TOKENS=num_tokens,
                BLOCK_EXPERTS=experts,
                BLOCK_HIDDEN=block,
                num_warps=8 if experts * block >= 2048 else 4,
                **self.overlap,
            )
        block_experts = _expert_block(num_experts)
        reducers = 1 if INTERPRETED else min(_MAX_REDUCERS, max(1, self.programs // self.config.programs // 2))
        decode.fused_kernel[(self.programs,)](
            x,
            w_in,
            w_out,
            b_in,
            b_out,
            center,
            *_selection(self, router, expert_ids, counts),
            self.partials,
            y,
            num_tokens,
            num_experts,
            width,
            hidden_size,
            *_limits(router, expert_ids),
            _num_selectors(num_tokens, self.programs),
            reducers,
            *x.stride(),
            *in_strides(w_in),
            ACTIVATION=activation,
            GATED=inner == 2,
            TOKENS=num_tokens,
            BLOCK_EXPERTS=block_experts,
            EXPERT_CHUNK=max(16, min(block_experts, _COMPARED // block_experts)),
            ALONE=num_experts <= MAX_ALONE_EXPERTS,
            BLOCK_NEURONS=min(self.config.neurons, 1 << (max(1, width).bit_length() - 1)),
            BLOCK_HIDDEN=configs.block_hidden(shape_of(w_in)),
            BLOCK_REDUCED=min(_REDUCED_COLUMNS, configs.block_hidden(shape_of(w_in))),
            ALIGNED=_is_aligned(w_in, w_out),
            STAGES=self.config.stages,
            num_warps=self.config.warps,
            **_registers(self.config.programs * self.config.warps),
            **self.overlap,
        )


class _Split:
    """A call of `router_dot_kernel`, `hidden_kernel` and `output_kernel`."""

    def __init__(self, space: _Space, num_tokens: int, w_in: Tensor, device: torch.device):
        num_experts, hidden_size = w_in.shape[0], w_in.shape[3]
        shape = shape_of(w_in)
        arch = configs.architecture(device)
        self.overlap = _overlap(arch, num_tokens)
        self.hidden_config, self.output_config = configs.hidden_and_output(arch, shape, num_tokens)
        self.programs = configs.num_multiprocessors(device) * self.hidden_config.programs
        self.zeroed = _Zeroed(space, num_experts, hidden_size)
        self.logits = space.take(torch.float32, _ROUTER_SPLITS, num_tokens, num_experts)
        self.listed_experts = space.take(torch.int32, num_experts)
        self.listed_words = space.take(torch.int64, num_experts)
        self.hidden = space.take(_hidden_dtype(w_in.dtype), num_tokens, shape.intermediate_size)
        self.partials = space.take(torch.float32, self.output_config.splits, num_tokens, hidden_size)

    def run(self, x, w_in, w_out, activation, b_in, b_out, center, router, expert_ids, counts, y) -> None:
        num_tokens, hidden_size = x.shape
        num_experts, width, inner, _ = w_in.shape
        block_tokens = max(MIN_BLOCK_TOKENS, triton.next_power_of_2(num_tokens))
        if router is None:
            self.zeroed.all.zero_()
        else:
            _router_logits(x, router, self.logits, _ROUTER_SPLITS, self.zeroed.all, block_tokens, self.overlap)
        config = self.hidden_config
        decode.hidden_kernel[(self.programs,)](
            x,
            w_in,
            b_in,
            center,
            *_selection(self, router, expert_ids, counts),
            self.hidden,
            num_tokens,
            num_experts,
            width,
            hidden_size,
            *_limits(router, expert_ids),
            _num_selectors(num_tokens, self.programs),
            *x.stride(),
            *in_strides(w_in),
            ACTIVATION=activation,
            GATED=inner == 2,
            ROUNDED=_precision(x.dtype) == "tf32",
            SPLITS=_ROUTER_SPLITS,
            BLOCK_EXPERTS=_expert_block(num_experts),
            BLOCK_TOKENS=block_tokens,
            BLOCK_NEURONS=config.neurons,
            BLOCK_HIDDEN=config.columns,
            num_warps=config.warps,
            num_stages=config.stages,
            **_registers(config.programs * config.warps),
            **self.overlap,
        )
        config = self.output_config
        decode.output_kernel[(triton.cdiv(hidden_size, config.columns), config.splits, 1)](
            self.hidden,
            w_out,
            b_out,
            self.zeroed.counters,
            self.listed_experts,
            self.partials,
            y,
            num_tokens,
            num_experts * width,
            width,
            hidden_size,
            PRECISION=_precision(x.dtype),
            LISTED_ALONE=True,
            SPLITS=config.splits,
            BLOCK_TOKENS=block_tokens,
            BLOCK_NEURONS=config.neurons,
            BLOCK_COLUMNS=config.columns,
            num_warps=config.warps,
            num_stages=config.stages,
            **self.overlap,
        )


class _Grouped:
    """A call of many tokens."""

    def __init__(self, space: _Space, num_tokens: int, w_in: Tensor, device: torch.device):
        num_experts = w_in.shape[0]
        shape = shape_of(w_in)
        self.zeros = space.take(torch.int32, 1)
        self.logits = space.take(torch.float32, num_tokens, num_experts)
        self.expert_ids = space.take(torch.int32, num_tokens, num_experts)
        self.probs = space.take(torch.float32, num_tokens, num_experts)
        self.chosen = space.take(torch.int8, num_experts, num_tokens)
        self.tokens = space.take(torch.int32, num_experts, num_tokens)
        self.num_chosen = space.take(torch.int32, num_experts)
        self.hidden = space.take(_hidden_dtype(w_in.dtype), num_tokens, shape.intermediate_size)

    def run(self, x, w_in, w_out, activation, b_in, b_out, center, router, expert_ids, counts, y) -> None:
        num_tokens, hidden_size = x.shape
        num_experts, width, inner, _ = w_in.shape
        if router is not None:
            _router_logits(x, router, self.logits, 1, self.zeros, 64, {"OVERLAPS": False})
            columns = router.max_experts
            expert_ids = self.expert_ids.view(-1)[: num_tokens * columns].view(num_tokens, columns)
            probs = self.probs.view(-1)[: num_tokens * columns].view(num_tokens, columns)
            route_into(
                self.logits, router.threshold, router.threshold_stride, router.min_experts, expert_ids, probs, counts
            )
        self.chosen.zero_()
        self.hidden.zero_()
        prefill.mark_kernel[(num_tokens,)](
            expert_ids, counts, self.chosen, num_tokens, expert_ids.shape[1], BLOCK=128, num_warps=1
        )
        prefill.group_kernel[(num_experts,)](
            self.chosen, self.tokens, self.num_chosen, num_tokens, BLOCK=1024, num_warps=4
        )
        tokens, neurons, columns, warps, stages = configs.prefill_hidden(shape_of(w_in))
        if width > 0:
            grid = (num_experts * triton.cdiv(width, neurons), triton.cdiv(num_tokens, tokens))
            prefill.grouped_hidden_kernel[grid](
                x,
                w_in,
                b_in,
                center,
                self.tokens,
                self.num_chosen,
                self.hidden,
                num_tokens,
                num_experts,
                width,
                hidden_size,
                *x.stride(),
                *in_strides(w_in),
                ACTIVATION=activation,
                GATED=inner == 2,
                ROUNDED=_precision(x.dtype) == "tf32",
                BLOCK_TOKENS=tokens,
                BLOCK_NEURONS=neurons,
                BLOCK_HIDDEN=columns,
                num_warps=warps,
                num_stages=stages,
            )
        tokens, neurons, columns, warps, stages = configs.prefill_output(shape_of(w_in))
        grid = (triton.cdiv(hidden_size, columns), 1, triton.cdiv(num_tokens, tokens))
        decode.output_kernel[grid](
            self.hidden,
            w_out,
            b_out,
            None,
            None,
            None,
            y,
            num_tokens,
            num_experts * width,
            width,
            hidden_size,
            PRECISION=_precision(x.dtype),
            LISTED_ALONE=False,
            SPLITS=1,
            BLOCK_TOKENS=tokens,
            BLOCK_NEURONS=neurons,
            BLOCK_COLUMNS=columns,
            num_warps=warps,
            num_stages=stages,
            OVERLAPS=False,
        )


def _selection(plan: _Fused | _Split, router: Router | None, expert_ids: Tensor | None, counts: Tensor) -> tuple:
    """The arguments, from logits to listed_words, that say which experts the tokens run."""
    logits, threshold, stride = (None, None, 0)
    if router is not None:
        logits, threshold, stride = plan.logits, router.threshold, router.threshold_stride
    zeroed = plan.zeroed
    return (
        *(logits, threshold, stride, expert_ids, counts, zeroed.counters, zeroed.words),
        *(plan.listed_experts, plan.listed_words),
    )


def _limits(router: Router | None, expert_ids: Tensor | None) -> tuple[int, int]:
    return (0, expert_ids.shape[1]) if router is None else (router.min_experts, router.max_experts)


def _is_aligned(w_in: Tensor, w_out: Tensor) -> bool:
    """Whether rows can be loaded 16 bytes at a time."""
    addresses = (w_in.data_ptr(), w_out.data_ptr(), *(stride * w_in.itemsize for stride in in_strides(w_in)))
    return w_in.shape[3] % 16 == 0 and all(address % 16 == 0 for address in addresses)


def _registers(warps: int) -> dict[str, int]:
    """As many for a thread as so many warps of a multiprocessor can have: ptxas would leave room for more warps."""
    if INTERPRETED or torch.version.hip is not None:
        return {}
    return {"maxnreg": min(255, 65536 // (32 * warps))}


def _num_selectors(num_tokens: int, programs: int) -> int:
    return 1 if INTERPRETED else min(num_tokens, programs)


def _expert_block(num_experts: int) -> int:
    return max(16, triton.next_power_of_2(num_experts))


def _overlap(arch: str, num_tokens: int) -> dict[str, bool]:
    """Options of kernels that overlap the one before, where they do: other GPUs know no `launch_pdl`."""
    return {"OVERLAPS": True, "launch_pdl": True} if configs.overlaps(arch, num_tokens) else {"OVERLAPS": False}


def _router_logits(
    x: Tensor,
    router: Router,
    logits: Tensor,
    splits: int,
    zeros: Tensor,
    block_tokens: int,
    overlap: dict[str, bool],
) -> None:
    num_tokens, hidden_size = x.shape
    num_experts = router.weight.shape[0]
    experts = 16 if block_tokens <= 64 and splits > 1 else 32
    decode.router_dot_kernel[(triton.cdiv(num_experts, experts), splits, triton.cdiv(num_tokens, block_tokens))](
        x,
        router.weight,
        router.bias,
        logits,
        zeros,
        zeros.shape[0],
        num_tokens,
        num_experts,
        hidden_size,
        *x.stride(),
        SPLITS=splits,
        BLOCK_TOKENS=block_tokens,
        BLOCK_EXPERTS=experts,
        BLOCK_HIDDEN=64 if x.dtype == torch.float32 else 128,
        num_warps=4,
        num_stages=2 if splits == 1 or torch.version.hip is not None else 4,  # all that a program loads, at once
        **overlap,
    )


def _plan(num_tokens: int, w_in: Tensor) -> type[_Fused | _Split | _Grouped]:
    if num_tokens > MAX_DECODE_TOKENS:
        return _Grouped
    return _Fused if configs.is_fused(shape_of(w_in), num_tokens) else _Split


def workspace_size(num_tokens: int, w_in: Tensor) -> int:
    """Bytes that a call of `num_tokens` tokens, or of fewer, needs."""
    if num_tokens == 0:
        return 0
    # A plan needs the more the more tokens it has; that of fewer tokens may need more than that of many.
    largest = 0
    for tokens in (1, 2, 3, 4, MIN_BLOCK_TOKENS, 32, MAX_DECODE_TOKENS, num_tokens):
        if tokens <= num_tokens:
            space = _Space(None)
            _plan(tokens, w_in)(space, tokens, w_in, w_in.device)
            largest = max(largest, space.size)
    return largest


def run(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    activation: str,
    b_in: Tensor | None,
    b_out: Tensor | None,
    center: Tensor | None,
    router: Router | None,
    expert_ids: Tensor | None,
    counts: Tensor,
    y: Tensor,
    workspace: Tensor | None,
) -> None:
    """Writes y, and with a router counts."""
    num_tokens = x.shape[0]
    if num_tokens == 0:
        return
    plan = _plan(num_tokens, w_in)
    if workspace is None:
        space = _Space(None)
        plan(space, num_tokens, w_in, w_in.device)
        workspace = torch.empty(space.size, dtype=torch.uint8, device=x.device)
    with torch.cuda.device_of(x):
        plan(_Space(workspace), num_tokens, w_in, w_in.device).run(
            x, w_in, w_out, activation, b_in, b_out, center, router, expert_ids, counts, y
        )
