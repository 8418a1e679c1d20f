"""Making a dense model sparse: experts, routers, thresholds."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from tqdm.auto import tqdm

from prunepath.budgets import get_thresholds, set_threshold
from prunepath.calibration.fit import Sample, fit_budgets
from prunepath.checkpoint.description import (
    SparseDescription,
    describe,
    description_of,
    install,
    path_in_backbone,
    unwrapped,
)
from prunepath.config import PrunePathConfig
from prunepath.conversion.batches import (
    Batch,
    backbone_inputs,
    count_tokens,
    first_tokens,
    mean_loss,
    merge,
    sample_batches,
    split_held_out,
)
from prunepath.conversion.checks import check_convertible
from prunepath.conversion.experts import ExpertGrouping, reorder_neurons
from prunepath.errors import PrunePathError
from prunepath.families import FFNSite
from prunepath.nn import SparseFFN, for_inference, sparse_ffns
from prunepath.nn.observers import observing_hidden, observing_inputs, padding_masks
from prunepath.train.router import RouterTraining
from prunepath.train.router_state import RouterState

# What a token costs in the parts of a conversion, against one of a forward pass without the head.
_ROUTER_COST, _GROUPING_COST, _FIT_COST, _LOSS_COST = 1.75, 1.0, 1.2, 1.5


@torch.inference_mode(False)
def convert(
    model: nn.Module,
    tokenizer: Any | None,
    texts: Iterable,
    config: PrunePathConfig | None = None,
    *,
    progress: bool = False,
    state: str | os.PathLike | None = None,
) -> nn.Module:
    """Makes a dense transformers model sparse, in place: experts, routers, thresholds.

    The backbone's weights keep their values; with experts of several neurons, neurons are reordered. The model is dense
    (budget 1.0) until `set_budget` or `set_threshold`. In memory at a time: the model, its routers, and the activations
    of one layer. Whatever fails or is interrupted leaves the model as it was.

    Args:
        model: a `PreTrainedModel` of a supported family, on the device to work on, or a peft model around one whose
            adapters leave the FFNs alone.
        tokenizer: its tokenizer; None if `texts` are token ids.
        texts: calibration data: an iterable of strings; or with `tokenizer` None of integer tensors of token ids, or of
            batches as a data collator makes them, dicts of tensors with `input_ids` and, for a loss, `labels`.
        config: see `PrunePathConfig`.
        progress: show a progress bar.
        state: a file that router training is kept in twice a minute. If it is there, an interrupted conversion with the
            same dense model, data and configuration goes on from it. It stays: remove it once the model is saved.

    Returns:
        `model`.

    Raises:
        PrunePathError: for a model that cannot be converted (`checks.check_convertible`), data that is too short or
            does not fit the model, or the state of another conversion.
    """
    config = config or PrunePathConfig()
    dense = backbone_owner(model)
    sites = check_convertible(dense, config)
    config = config_in_force(config, sites)
    data = ConversionData.sample(dense, texts, tokenizer, config, [site.intermediate_size for site in sites])
    device = next(dense.parameters()).device
    kept = None if state is None else RouterState(state, _fingerprint(dense, sites, data, config))
    resumed = None if kept is None else kept.load(device)

    with _Conversion(dense) as conversion:
        ffns = install(dense, config)
        with converting(dense, config):
            calibration = calibration_sample(dense, data.calibration)
            total = calibration.cost + _ROUTER_COST * data.router_tokens + _GROUPING_COST * data.grouping_tokens
            with tqdm(
                total=math.ceil(total), unit=" tokens", unit_scale=True, disable=not progress, desc="Converting"
            ) as bar:
                _learn_routers(dense, ffns, data, config, conversion, kept, resumed, bar)
                result = fit_budgets(list(ffns.values()), calibration, bar.update)
            paths = [path_in_backbone(dense, path) for path in ffns]
            describe(dense, SparseDescription(config, paths, [1.0] * len(ffns), result.table, result.to_dict()))
            set_threshold(dense, 1.0)
            for_inference(dense)
        conversion.commit()
    return model


def _learn_routers(
    model: nn.Module,
    ffns: dict[str, SparseFFN],
    data: ConversionData,
    config: PrunePathConfig,
    conversion: _Conversion,
    kept: RouterState | None,
    resumed: dict[str, Any] | None,
    bar: tqdm,
) -> None:
    """Groups neurons where experts have several, and trains the routers, in one pass of the dense model each."""
    rate, seed = config.router_learning_rate, config.seed
    trainings = {ffn: RouterTraining(ffn, rate, seed + i) for i, ffn in enumerate(ffns.values())}
    done = 0
    if resumed is not None:
        done = resumed["batches"]
        bar.update(_GROUPING_COST * data.grouping_tokens)
        for path, ffn in ffns.items():
            trainings[ffn].load_state_dict(resumed["ffns"][path]["router"])
            if resumed["ffns"][path]["order"] is not None:
                conversion.reorder(ffn, resumed["ffns"][path]["order"])
    elif data.grouping:
        grouped = [ffn for ffn in ffns.values() if ffn.expert_width > 1]
        share = _GROUPING_COST * data.grouping_tokens / len(grouped)
        grouping = ExpertGrouping(config, conversion.reorder, lambda part: bar.update(part * share))
        with observing_inputs(dict.fromkeys(grouped, grouping)):
            model.base_model(**backbone_inputs(merge(data.grouping)))
    for index, batch in enumerate(data.training):
        if index >= done:
            inputs = backbone_inputs(batch)
            part = (index / len(data.training), (index + 1) / len(data.training))
            train_routers(trainings, part, lambda inputs=inputs: model.base_model(**inputs))
            if kept is not None and (kept.is_due() or index + 1 == len(data.training)):
                orders = conversion.orders
                found = {p: {"order": orders.get(f), "router": trainings[f].state_dict()} for p, f in ffns.items()}
                kept.save({"batches": index + 1, "ffns": found})
        bar.update(_ROUTER_COST * count_tokens(batch))
    for path, ffn in ffns.items():
        if not trainings[ffn].is_begun:
            raise PrunePathError(f"Expected data that reaches every FFN, but the one at {path} saw none of it.")
        trainings[ffn].finish()


@torch.inference_mode(False)
def calibrate(model: nn.Module, tokenizer: Any | None, texts: Iterable, *, progress: bool = False) -> None:
    """Turns budgets into thresholds anew, after a sparse model's weights have changed. Afterwards it is dense.

    If it fails or is interrupted, the model keeps its thresholds.

    Args:
        model: a sparse model, on the device to work on.
        tokenizer, texts: data that the model was not trained on, as for `convert`.
        progress: show a progress bar.

    Raises:
        PrunePathError: for a dense model, or data that is too short.
    """
    description = description_of(model)
    config, sparse = description.config, backbone_owner(model)
    batches = sample_batches(sparse, texts, tokenizer, config.sequence_length, config.calibration_tokens, config.seed)
    sample = calibration_sample(sparse, batches)
    before = get_thresholds(model)
    try:
        bar = tqdm(
            total=math.ceil(sample.cost), unit=" tokens", unit_scale=True, disable=not progress, desc="Calibrating"
        )
        with converting(sparse, config), bar:
            result = fit_budgets(list(sparse_ffns(sparse).values()), sample, bar.update)
        description.budgets, description.calibration = result.table, result.to_dict()
        before = [1.0] * len(before)
        describe(model, description)
    finally:
        set_threshold(model, before)


def backbone_owner(model: nn.Module) -> nn.Module:
    """The transformers model inside torch's wrappers and peft's."""
    model = unwrapped(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def config_in_force(config: PrunePathConfig, sites: Sequence[FFNSite]) -> PrunePathConfig:
    """The configuration with the expert width and the routers' rank, form and bits that it leaves to defaults."""
    width = config.expert_width if config.num_experts is not None else config.expert_width or 1
    routers = [config.router_of(site.hidden_size, site.intermediate_size) for site in sites]
    # What FFNs of several sizes do not share stays to be found from each one's.
    shared = {name: value for name, value in routers[0].items() if all(r[name] == value for r in routers)}
    return dataclasses.replace(config, expert_width=width, **shared)


@dataclasses.dataclass(frozen=True)
class ConversionData:
    """The batches of a conversion: what routers train on, what neurons are grouped by, what calibrates."""

    training: list[Batch]
    grouping: list[Batch]
    calibration: list[Batch]

    @classmethod
    def sample(
        cls,
        model: nn.Module,
        texts: Iterable,
        tokenizer: Any | None,
        config: PrunePathConfig,
        intermediate_sizes: Iterable[int],
    ) -> ConversionData:
        is_grouped = any(config.experts_of(size) < size for size in intermediate_sizes)
        learned = max(config.router_tokens, config.partition_tokens if is_grouped else 0)
        wanted = config.calibration_tokens + learned
        batches = sample_batches(model, texts, tokenizer, config.sequence_length, wanted, config.seed)
        share = config.calibration_tokens / wanted
        calibration, rest = split_held_out(batches, round(sum(map(count_tokens, batches)) * share))
        grouping = list(first_tokens(rest, config.partition_tokens)) if is_grouped else []
        return cls(list(first_tokens(rest, config.router_tokens)), grouping, calibration)

    @property
    def router_tokens(self) -> int:
        return sum(map(count_tokens, self.training))

    @property
    def grouping_tokens(self) -> int:
        return sum(map(count_tokens, self.grouping))


def train_routers(
    trainings: dict[SparseFFN, RouterTraining], part: tuple[float, float], run: Callable[[], object]
) -> None:
    """Trains routers on what `run` sends densely through their FFNs: a part of all training, as shares of it."""

    def observe(ffn: SparseFFN, x: torch.Tensor, hidden: torch.Tensor) -> None:
        trainings[ffn].observe(x, hidden)

    for training in trainings.values():
        training.schedule(*part)
    with observing_hidden(dict.fromkeys(trainings, observe)):
        run()


def calibration_sample(model: nn.Module, batches: Sequence[Batch]) -> Sample:
    """Batches as calibration takes them: half to fit thresholds on, half to measure losses on."""
    fit, compare = batches, batches  # of a single batch
    if len(batches) > 1:
        fit, compare = split_held_out(batches, sum(map(count_tokens, batches)) // 2)
    inputs = backbone_inputs(merge(fit))
    return Sample(
        encode=lambda: model.base_model(**inputs),
        loss=lambda: mean_loss(model, compare),
        costs=(_FIT_COST * sum(map(count_tokens, fit)), _LOSS_COST * sum(map(count_tokens, compare))),
    )


def _fingerprint(model: nn.Module, sites: Sequence[FFNSite], data: ConversionData, config: PrunePathConfig) -> str:
    """A hash of what a conversion's outcome depends on; of each FFN the first weights stand for all."""
    digest = hashlib.sha256(json.dumps([type(model).__name__, dataclasses.asdict(config)]).encode())
    rows = [next(site.parent._modules[site.name].parameters()).detach().flatten()[:4096] for site in sites]
    batches = (*data.training, *data.grouping, *data.calibration)
    for tensor in (*rows, *(batch["input_ids"] for batch in batches)):
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class _Conversion(contextlib.ExitStack):
    """A `with` block that leaves the model as it found it, unless `commit` was called.

    Attributes:
        orders: FFN -> which neuron each has become, of FFNs that were reordered.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.orders: dict[SparseFFN, torch.Tensor] = {}
        self._model = model
        self._modules = [(m, type(m), dict(vars(m)), dict(m._modules)) for m in model.modules()]
        self._config = dict(vars(model.config))
        self.callback(self._undo)

    def reorder(self, ffn: SparseFFN, order: torch.Tensor) -> None:
        with _uninterrupted():
            reorder_neurons(ffn, order)
            self.orders[ffn] = order

    def commit(self) -> None:
        self._modules = []

    def _undo(self) -> None:
        if not self._modules:
            return
        with _uninterrupted():
            for ffn, order in self.orders.items():
                reorder_neurons(ffn, order.argsort())
            for ffn in sparse_ffns(self._model).values():
                ffn.lay_out_for_training()
            for module, kind, attributes, children in self._modules:
                module.__class__ = kind
                vars(module).clear()
                vars(module).update(attributes)
                module._modules.clear()
                module._modules.update(children)
            vars(self._model.config).clear()
            vars(self._model.config).update(self._config)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Holds an interrupt by the keyboard back until the block, which is short, has ended."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    held = []
    signal.signal(signal.SIGINT, lambda *arguments: held.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if held:
            signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def converting(model: nn.Module, config: PrunePathConfig) -> Iterator[None]:
    """Forward passes in evaluation mode without gradients, caches and padding, in the configured precision."""
    device = next(model.parameters()).device.type
    precision = contextlib.nullcontext()
    if config.autocast != "none":
        precision = torch.autocast(device, getattr(torch, config.autocast))
    is_slow = device == "cpu" and config.autocast == "none" and not _has_half_precision_products()
    products = _WideProducts() if is_slow else contextlib.nullcontext()
    with torch.no_grad(), precision, products, _evaluating(model):
        with padding_masks(model), padding_masks(model.base_model):
            yield


def _has_half_precision_products() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware; without, x86 takes three times as long as float32."""
    is_x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return not is_x86 or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class _WideProducts(TorchFunctionMode):
    """Computes linear maps of half-precision tensors in float32, and rounds the results."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is nn.functional.linear and not kwargs and args[0].dtype in (torch.bfloat16, torch.float16):
            y = _WideLinear.apply(args[0], args[1])
            bias = args[2] if len(args) > 2 else None
            return y if bias is None else y + bias
        return function(*args, **(kwargs or {}))


class _WideLinear(torch.autograd.Function):
    """x·Wᵀ in float32 that keeps no wide copy of W for its gradient, which only x has."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return nn.functional.linear(x.float(), weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (weight,) = ctx.saved_tensors
        return (gradient.float() @ weight.float()).to(gradient.dtype), None


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Keeps forward passes from dropout, and from gathering keys and values that nothing will read."""
    was_training = {module: module.training for module in model.modules()}
    before = dict(vars(model.config))
    model.eval()
    model.config.use_cache = False
    try:
        yield
    finally:
        for module in model.modules():
            module.training = was_training.get(module, model.training)
        if "use_cache" in before:
            model.config.use_cache = before["use_cache"]
        else:
            del model.config.use_cache
