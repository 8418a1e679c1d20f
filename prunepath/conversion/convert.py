"""Making a dense model sparse: experts, routers, thresholds."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from prunepath.calibration.fit import Sample, fit_budgets, num_passes
from prunepath.checkpoint.description import SparseDescription, description_of, install
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
from prunepath.conversion.experts import ExpertGrouping, InputStatistics, reorder_neurons
from prunepath.errors import PrunePathError
from prunepath.families import find_ffns
from prunepath.nn import SparseFFN, is_sparse, sparse_ffns
from prunepath.nn.observers import observing_inputs, padding_masks
from prunepath.train.router import RouterTraining
from prunepath.train.router_state import RouterState


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

    The backbone's weights keep their values; neurons are reordered. The model is dense (budget 1.0) until `set_budget`
    or `set_threshold`. In memory at a time: the model, and the activations of one layer.

    Args:
        model: a `PreTrainedModel` of a supported family, on the device to work on.
        tokenizer: its tokenizer; None if `texts` are token ids.
        texts: calibration data: an iterable of strings; or with `tokenizer` None of integer tensors of token ids, or of
            batches as a data collator makes them, dicts of tensors with `input_ids` and, for a loss, `labels`.
        config: see `PrunePathConfig`.
        progress: show progress bars.
        state: a file that router training is kept in twice a minute, and which is removed at the end. If it is there,
            an interrupted conversion with the same dense model, data and configuration goes on from it.

    Returns:
        `model`.

    Raises:
        PrunePathError: for a model without supported FFNs, `num_experts` that does not divide their width, data that
            is too short, or the state of another conversion; the model is then unchanged.
    """
    config = config or PrunePathConfig()
    if is_sparse(model):
        raise PrunePathError("Expected a dense model, got one that prunepath has converted already.")
    sites = find_ffns(model)
    for site in sites:
        check_num_experts(site.intermediate_size, config.num_experts)
    device = next(model.parameters()).device
    ops.resolve_backend(config.backend, device)
    wanted = config.calibration_tokens + max(config.router_tokens, config.partition_tokens)
    batches = sample_batches(model, texts, tokenizer, config.sequence_length, wanted, config.seed)
    if config.contribution == "loss" and "labels" not in batches[0]:
        raise PrunePathError(
            f"Expected a model and data with a loss for contribution='loss', got {type(model).__name__}."
        )
    share = config.calibration_tokens / wanted
    calibration, training = split_held_out(batches, round(sum(map(count_tokens, batches)) * share))

    kept = None if state is None else RouterState(state, _fingerprint(model, batches, config))
    resumed = None if kept is None else kept.load(device)
    centered = config.center is not False if resumed is None else resumed["centered"]
    description = SparseDescription(config, centered, [s.path for s in sites], [1.0] * len(sites), {}, {})
    was_training = model.training
    model.eval()
    ffns = install(model, description)
    backbone = model.base_model
    with converting(model, config), _bars(progress) as bar:
        advance = bar("Grouping neurons", 100 * len(ffns))
        if resumed is None:
            grouping = ExpertGrouping(config, advance)
            with observing_inputs({ffn: grouping.observe for ffn in ffns.values()}):
                backbone(**backbone_inputs(merge(list(first_tokens(training, config.partition_tokens)))))
            if config.center is None and not grouping.centering_helps:
                description.centered = False
                for ffn in ffns.values():
                    ffn.center = None
        else:
            grouping = _regroup(config, ffns, resumed["ffns"])
            advance(100 * len(ffns))

        if config.contribution == "loss":
            _measure_loss_metric(model, list(ffns.values()), first_tokens(training, config.partition_tokens))
        trainings = {ffn: RouterTraining(ffn, stats.mean, stats.std, config) for ffn, stats in grouping.inputs.items()}
        batches = list(first_tokens(training, config.router_tokens))
        advance = bar("Training routers", len(batches))
        done = 0
        if resumed is not None:
            advance(done := resumed["batches"])
            for path, ffn in ffns.items():
                trainings[ffn].load_state_dict(resumed["ffns"][path]["router"])
        with observing_inputs({ffn: t.observe for ffn, t in trainings.items()}):
            for i in range(done, len(batches)):
                for router in trainings.values():
                    router.schedule(i / len(batches))
                backbone(**backbone_inputs(batches[i]))
                advance()
                if kept is not None and kept.is_due():
                    saved = {path: _router_state(ffn, grouping, trainings[ffn]) for path, ffn in ffns.items()}
                    kept.save({"batches": i + 1, "centered": description.centered, "ffns": saved})
        for router in trainings.values():
            router.finish()
        fit_table(model, description, calibration, bar("Calibrating budgets", num_passes()))
    model.train(was_training)
    for ffn in ffns.values():
        ffn.pack()
    if kept is not None:
        kept.remove()
    return model


def _fingerprint(model: nn.Module, batches: Sequence[Batch], config: PrunePathConfig) -> str:
    """A hash of what a conversion's outcome depends on; of each FFN one row of weights stands for all."""
    digest = hashlib.sha256(json.dumps([type(model).__name__, dataclasses.asdict(config)]).encode())
    rows = [next(site.parent._modules[site.name].parameters()).detach().flatten()[:4096] for site in find_ffns(model)]
    for tensor in (*rows, *(batch["input_ids"] for batch in batches)):
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _router_state(ffn: SparseFFN, grouping: ExpertGrouping, training: RouterTraining) -> dict[str, Any]:
    statistics = grouping.inputs[ffn]
    state = {"order": grouping.orders[ffn], "mean": statistics.mean, "std": statistics.std}
    return {**state, "center": ffn.center, "router": training.state_dict()}


def _regroup(config: PrunePathConfig, ffns: dict[str, SparseFFN], states: dict[str, dict[str, Any]]) -> ExpertGrouping:
    """Groups the neurons as an interrupted conversion has."""
    grouping = ExpertGrouping(config)
    for path, ffn in ffns.items():
        state = states[path]
        reorder_neurons(ffn, state["order"])
        if ffn.center is not None:
            ffn.center.copy_(state["center"])
        grouping.orders[ffn] = state["order"]
        grouping.inputs[ffn] = InputStatistics(state["mean"], state["std"])
    return grouping


def calibrate(model: nn.Module, tokenizer: Any | None, texts: Iterable, *, progress: bool = False) -> None:
    """Turns budgets into thresholds anew, after a sparse model's weights have changed. Afterwards it is dense.

    Args:
        model: a sparse model, on the device to work on.
        tokenizer, texts: data that the model was not trained on, as for `convert`.
        progress: show a progress bar.

    Raises:
        PrunePathError: for a dense model, or data that is too short.
    """
    description = description_of(model)
    config = description.config
    batches = sample_batches(model, texts, tokenizer, config.sequence_length, config.calibration_tokens, config.seed)
    was_training = model.training
    model.eval()
    with converting(model, config), _bars(progress) as bar:
        if config.contribution == "loss":
            set_threshold(model, 1.0)
            _measure_loss_metric(model, list(sparse_ffns(model).values()), batches)
        fit_table(model, description, batches, bar("Calibrating budgets", num_passes()))
    model.train(was_training)


def fit_table(
    model: nn.Module, description: SparseDescription, batches: Sequence[Batch], progress: Callable[[], None]
) -> None:
    """Fills the table of budgets from calibration batches, and leaves the model dense."""
    half = sum(map(count_tokens, batches)) // 2
    fit, choose = split_held_out(batches, half) if len(batches) > 1 else (batches, batches)
    samples = [calibration_sample(model, part) for part in (fit, choose, batches)]
    result = fit_budgets(list(sparse_ffns(model).values()), *samples, progress)
    description.budgets = result.table
    description.calibration = {
        "shapes": {f"{budget:g}": shape for budget, shape in result.shapes.items()},
        "losses": result.losses,
        "routers": [dataclasses.asdict(quality) for quality in result.routers],
    }
    model.config.quantization_config = description.to_dict()
    set_threshold(model, 1.0)


def calibration_sample(model: nn.Module, batches: Sequence[Batch]) -> Sample:
    """Batches as calibration takes them."""
    inputs = backbone_inputs(merge(batches))
    return Sample(lambda: model.base_model(**inputs), lambda: mean_loss(model, batches))


def _measure_loss_metric(model: nn.Module, ffns: list[SparseFFN], batches: Iterable[Batch]) -> None:
    """Measures the metric of `contribution="loss"` on batches, with the model dense."""

    def run(batch: Batch) -> tuple[torch.Tensor | None, int]:
        loss = getattr(model(**batch), "loss", None) if "labels" in batch else None
        return loss, count_tokens(batch)

    measure_loss_metric(ffns, (functools.partial(run, batch) for batch in batches))


@contextlib.contextmanager
def converting(model: nn.Module, config: PrunePathConfig) -> Iterator[None]:
    """Forward passes without gradients, caches and padding, in the configured precision."""
    device = next(model.parameters()).device.type
    precision = contextlib.nullcontext()
    if config.autocast != "none":
        precision = torch.autocast(device, getattr(torch, config.autocast))
    with torch.no_grad(), precision, _without_cache(model), _padding_masks(model):
        yield


@contextlib.contextmanager
def _padding_masks(model: nn.Module) -> Iterator[None]:
    """Tells the FFNs of padding in calls of the model and in calls of its backbone."""
    with padding_masks(model), padding_masks(model.base_model):
        yield


@contextlib.contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Keeps forward passes from gathering keys and values that nothing will read."""
    before = getattr(model.config, "use_cache", None)
    model.config.use_cache = False
    try:
        yield
    finally:
        if before is None:
            del model.config.use_cache
        else:
            model.config.use_cache = before


@contextlib.contextmanager
def _bars(enabled: bool) -> Iterator[Any]:
    """Yields a function (description, total) -> advance; the bars close with the block."""
    with contextlib.ExitStack() as stack:

        def bar(description: str, total: int):
            line = stack.enter_context(tqdm(total=total, desc=description, disable=not enabled))
            return lambda steps=1: line.update(steps)

        yield bar
