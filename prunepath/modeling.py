"""Sparse models: converting, saving, loading, and turning the knob."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import nn
from tqdm.auto import tqdm

from prunepath import ops
from prunepath.config import PrunePathConfig
from prunepath.convert.adapters import find_ffns
from prunepath.convert.batches import (
    Batch,
    backbone_inputs,
    count_tokens,
    first_tokens,
    mean_loss,
    merge,
    sample_batches,
    split_held_out,
)
from prunepath.convert.experts import ExpertGrouping, InputStatistics, reorder_neurons
from prunepath.convert.partition import check_num_experts
from prunepath.convert.tensor_file import TensorFile
from prunepath.errors import CheckpointError, PrunePathError
from prunepath.nn import SparseFFN
from prunepath.nn.observers import CountRecord, counting, observing_inputs, padding_masks
from prunepath.nn.thresholds import check_fraction, interpolate_thresholds
from prunepath.train.calibration import Sample, fit_budgets, num_passes
from prunepath.train.loss_metric import measure_loss_metric
from prunepath.train.router import RouterTraining
from prunepath.train.router_state import RouterState

FORMAT_VERSION = 2
QUANT_METHOD = "prunepath"


@dataclasses.dataclass(frozen=True)
class Shrinking:
    """What `prunepath.shrinking` did to a model.

    Attributes:
        dense_experts: experts of each FFN before.
        experts: for each FFN how many are left.
        folded: whether each FFN has a `removed_output`.
        padded: whether each FFN was filled up with zeros to `PrunePathConfig.num_experts` experts.
    """

    dense_experts: int
    experts: list[int]
    folded: bool
    padded: bool

    def fits(self, description: SparseDescription) -> bool:
        """Whether the numbers are such as they can be in a checkpoint."""
        most = description.config.num_experts
        return (
            len(self.experts) == len(description.ffns)
            and most <= self.dense_experts
            and all(isinstance(left, int) and 1 <= left <= most for left in self.experts)
        )


@dataclasses.dataclass
class SparseDescription:
    """What `config.json` says of a sparse checkpoint, under `quantization_config`.

    Attributes:
        config: how it was converted.
        centered: whether each FFN has a `center` tensor.
        ffns: dotted paths of the FFNs, in the order of the model's modules.
        thresholds: the current threshold of each FFN.
        budgets: calibrated table, budget -> threshold of each FFN; empty for a model that was not calibrated.
        calibration: what calibration measured: the chosen `shapes`, the `losses` of all of them, and each FFN's router
            by its `kl` and `recall` (`prunepath.train.calibration.Calibration`).
        shrinking: how experts were removed; None for a model that has all of them.
    """

    config: PrunePathConfig
    centered: bool
    ffns: list[str]
    thresholds: list[float]
    budgets: dict[float, list[float]]
    calibration: dict[str, Any]
    shrinking: Shrinking | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": QUANT_METHOD,
            "format_version": 1 if self.shrinking is None else FORMAT_VERSION,
            "config": dataclasses.asdict(self.config),
            "centered": self.centered,
            "ffns": list(self.ffns),
            "thresholds": list(self.thresholds),
            "budgets": {f"{budget:g}": list(values) for budget, values in sorted(self.budgets.items())},
            "calibration": self.calibration,
            **({} if self.shrinking is None else {"shrinking": dataclasses.asdict(self.shrinking)}),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SparseDescription:
        """Reads and checks `quantization_config`.

        Raises:
            CheckpointError: for a format version from the future, or missing or inconsistent entries.
        """
        version = data.get("format_version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise CheckpointError(f"Expected format_version to be a whole number of at least 1, got {version!r}.")
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"This checkpoint has format version {version}, and this version of prunepath reads up to "
                f"{FORMAT_VERSION}: upgrade prunepath."
            )
        try:
            known = {field.name for field in dataclasses.fields(PrunePathConfig)}
            config = PrunePathConfig(**{k: v for k, v in data["config"].items() if k in known})
            description = cls(
                config=config,
                centered=bool(data["centered"]),
                ffns=[str(path) for path in data["ffns"]],
                thresholds=[check_fraction("threshold", t) for t in data["thresholds"]],
                budgets={
                    check_fraction("budget", b): [check_fraction("threshold", t) for t in values]
                    for b, values in data["budgets"].items()
                },
                calibration=dict(data["calibration"]),
                shrinking=None if data.get("shrinking") is None else Shrinking(**data["shrinking"]),
            )
            if description.shrinking is not None and not description.shrinking.fits(description):
                raise TypeError
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, KeyError):
                problem = f"it has no entry {error}."
            elif isinstance(error, PrunePathError):
                problem = str(error)
            else:
                problem = "an entry is of the wrong kind."
            raise CheckpointError(f"Expected a complete PrunePath quantization_config, but: {problem}") from error
        for name, values in [("thresholds", description.thresholds), *description.budgets.items()]:
            if len(values) != len(description.ffns):
                raise CheckpointError(
                    f"Expected one threshold for each of the checkpoint's {len(description.ffns)} FFNs, got "
                    f"{len(values)} under {name!r}."
                )
        return description


def sparse_ffns(model: nn.Module) -> dict[str, SparseFFN]:
    """The model's sparse FFNs by dotted path, in the order of its modules; empty for a dense model."""
    return {path: module for path, module in model.named_modules() if isinstance(module, SparseFFN)}


def is_sparse(model: nn.Module) -> bool:
    """Whether `model` has been converted."""
    return any(isinstance(module, SparseFFN) for module in model.modules())


def _sparse_ffns(model: nn.Module) -> dict[str, SparseFFN]:
    ffns = sparse_ffns(model)
    if not ffns:
        raise PrunePathError(
            f"Expected a model converted by prunepath, got a dense {type(model).__name__}: convert it, or import "
            "prunepath before loading it."
        )
    return ffns


def description_of(model: nn.Module) -> SparseDescription:
    """What the model's checkpoint says, or will say, of its sparsity."""
    _sparse_ffns(model)
    return SparseDescription.from_dict(model.config.quantization_config)


def get_thresholds(model: nn.Module) -> list[float]:
    """The current threshold τ of each FFN, in the order of the model's modules."""
    return [ffn.threshold for ffn in _sparse_ffns(model).values()]


def set_threshold(model: nn.Module, threshold: float | Sequence[float]) -> None:
    """Sets the probability mass that a token's experts must cover.

    Args:
        threshold: τ in (0, 1] for every FFN, or one for each. 1.0 is exactly dense.
    """
    ffns = _sparse_ffns(model)
    if isinstance(threshold, Sequence) and not isinstance(threshold, str):
        values = [check_fraction("threshold", value) for value in threshold]
        if len(values) != len(ffns):
            raise PrunePathError(f"Expected one threshold for each of the {len(ffns)} FFNs, got {len(values)}.")
    else:
        values = [check_fraction("threshold", threshold)] * len(ffns)
    for ffn, value in zip(ffns.values(), values, strict=True):
        ffn.threshold = value
    model.config.quantization_config["thresholds"] = values


def set_budget(model: nn.Module, budget: float) -> None:
    """Sets the thresholds that calibration found for an active fraction.

    Args:
        budget: the wanted mean share of FFN neurons that a token computes, in (0, 1]; 1.0 is exactly dense.
    """
    description = description_of(model)
    set_threshold(model, _budget_thresholds(description.budgets, budget, len(description.ffns)))


def set_request_budgets(model: nn.Module, budgets: Sequence[float] | None) -> None:
    """Gives each sequence of a batch its own budget.

    What a checkpoint stores, and `get_thresholds` returns, stays as `set_budget` or `set_threshold` left it; either of
    them then sets all sequences at once. A captured CUDA graph follows as long as the number of sequences stays.

    Args:
        budgets: B budgets as of `set_budget`, for calls of B sequences alone; None returns to one budget for all.
    """
    ffns = list(_sparse_ffns(model).values())
    if budgets is None:
        for ffn in ffns:
            ffn.set_request_thresholds(None)
        return
    table = description_of(model).budgets
    columns = [_budget_thresholds(table, budget, len(ffns)) for budget in budgets]
    if not columns:
        raise PrunePathError("Expected a budget for each sequence of a batch, got none.")
    for ffn, values in zip(ffns, zip(*columns, strict=True), strict=True):
        ffn.set_request_thresholds(values)


def _budget_thresholds(table: dict[float, list[float]], budget: float, num_ffns: int) -> list[float]:
    """Each FFN's threshold for a budget."""
    budget = check_fraction("budget", budget)
    if budget == 1.0:
        return [1.0] * num_ffns
    if not table:
        raise PrunePathError("This model has no calibrated budgets: convert it again, or use set_threshold.")
    return interpolate_thresholds(table, budget)


@contextlib.contextmanager
def record_counts(model: nn.Module) -> Iterator[CountRecord]:
    """Records how many experts each token runs, padding left out, inside a `with` block.

    Yields:
        A `CountRecord`, whose `active_fraction`, `per_layer` and `histogram` cover all calls so far.
    """
    with padding_masks(model), counting(_sparse_ffns(model).values()) as record:
        yield record


def install(model: nn.Module, description: SparseDescription, backend: str | None = None) -> dict[str, SparseFFN]:
    """Replaces the model's FFNs by sparse ones with untrained routers, as a checkpoint describes them."""
    config, shrinking = description.config, description.shrinking
    ffns = {
        site.path: site.install(
            config.num_experts,
            center=description.centered,
            min_experts=config.min_experts,
            max_experts=config.max_experts,
            backend=backend or config.backend,
        )
        for site in find_ffns(model)
    }
    if list(ffns) != list(sparse_ffns(model)):
        raise PrunePathError(f"Expected the FFNs {list(sparse_ffns(model))}, but installed {list(ffns)}.")
    if shrinking is not None:
        for ffn, left in zip(ffns.values(), shrinking.experts, strict=False):
            if not shrinking.padded:
                ffn.keep_experts(range(left))
            if shrinking.folded:
                ffn.removed_output = torch.zeros_like(ffn.router.weight[0])
            ffn.dense_experts = shrinking.dense_experts
    return ffns


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


def check_output_folder(out: str | os.PathLike) -> Path:
    """`out` as a path, if a folder can appear there: it does not exist or is empty, and its parent can be written."""
    out = Path(out)
    try:
        if out.is_dir() and any(out.iterdir()):
            raise PrunePathError(f"Expected an output folder that is new or empty, but {out} has files in it.")
        if out.exists() and not out.is_dir():
            raise PrunePathError(f"Expected an output folder, but {out} is a file.")
        existing = next(parent for parent in out.absolute().parents if parent.exists())
    except OSError as error:
        raise PrunePathError(f"Expected an output folder, but {out} cannot be read: {error}.") from error
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise PrunePathError(f"Expected an output folder in a place that can be written, but {existing} cannot.")
    return out


@contextlib.contextmanager
def whole_folder(out: str | os.PathLike, resume: str | None = None) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name when the block ends without an error, and else vanishes.

    What a killed process left there is removed. With `resume`, a text that names the work, the folder stays after an
    error too, and a later block of the same text finds what is in it.
    """
    out = check_output_folder(out)
    temporary = out.absolute().with_name(f".{out.name}.partial")
    with contextlib.ExitStack() as stack:
        try:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir(exist_ok=True)
            handle = os.open(temporary, os.O_RDONLY)
            stack.callback(os.close, handle)
            # The system gives the lock up with its process, however that ends.
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(handle), os.stat(temporary)):
                raise BlockingIOError
            work = temporary / ".work"
            if resume is None or not work.is_file() or work.read_text(encoding="utf-8") != resume:
                for entry in temporary.iterdir():
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
                if resume is not None:
                    work.write_text(resume, encoding="utf-8")
        except (BlockingIOError, FileNotFoundError):
            raise PrunePathError(f"Expected to be alone in writing {out}, but another process does as well.") from None
        except OSError as error:
            raise PrunePathError(f"Expected a place where the folder {out} can be written, but: {error}.") from error
        try:
            yield temporary
            work.unlink(missing_ok=True)
            os.replace(temporary, out)
        except BaseException:
            if resume is None:
                shutil.rmtree(temporary, ignore_errors=True)
            raise


def save(model: nn.Module, tokenizer: Any | None, out: str | os.PathLike) -> None:
    """Writes model and tokenizer into the folder `out`, which appears whole or not at all.

    Raises:
        PrunePathError: if `out` has something in it, or cannot be written.
    """
    with whole_folder(out) as folder:
        try:
            model.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        except (OSError, safetensors.SafetensorError) as error:
            raise PrunePathError(f"Expected to write the checkpoint {out}, but: {error}.") from error


def load(name: str | os.PathLike, *, dtype: Any = "auto", device: Any = None) -> tuple[nn.Module, Any]:
    """Loads a causal language model, sparse or dense, and its tokenizer.

    Args:
        name: a local folder or a hub name.
        dtype: as `from_pretrained` takes it; `auto` is the checkpoint's.
        device: where to put the model; None leaves it on the CPU.

    Returns:
        (model, tokenizer), the model in evaluation mode.

    Raises:
        PrunePathError: if there is no such model, or its checkpoint is truncated, inconsistent or from the future.
    """
    import transformers

    folder = Path(name)
    if not folder.exists() and (folder.is_absolute() or str(name).startswith(".") or str(name).count("/") > 1):
        raise PrunePathError(f"Expected a model folder or a hub name, but there is no folder {name}.")
    if folder.exists():
        read_model_config(folder)
    with _loading(name):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True)
    damaged = sorted(info["missing_keys"]) + sorted(str(k) for k in info["mismatched_keys"])
    if damaged:
        raise CheckpointError(
            f"Expected {name} to hold every weight of its {type(model).__name__} in its right shape, but "
            f"{len(damaged)} are missing or of another shape, {damaged[0]} among them."
        )
    if folder.exists():
        _check_dtypes(folder)
    tokenizer = load_tokenizer(name)
    return (model if device is None else model.to(device)), tokenizer


def _check_dtypes(folder: Path) -> None:
    """Raises CheckpointError if a weight is of whole numbers, which transformers would take for what they stand for."""
    sparsity = read_model_config(folder).get("quantization_config")
    if sparsity is not None and sparsity.get("quant_method") != QUANT_METHOD:
        return  # such weights are what another quantization makes
    for path in sorted(folder.glob("*.safetensors")):
        for name, entry in TensorFile(path).entries.items():
            if name.endswith((".weight", ".bias")) and not entry.dtype.startswith(("F", "BF")):
                raise CheckpointError(f"Expected {name} in {path} to be of a floating-point dtype, got {entry.dtype}.")


def load_tokenizer(name: str | os.PathLike) -> Any:
    """The tokenizer of a local folder or a hub name, as `load` loads it."""
    import transformers

    if Path(name).exists():
        read_model_config(Path(name))
    with _loading(name):
        return transformers.AutoTokenizer.from_pretrained(name)


@contextlib.contextmanager
def _loading(name: str | os.PathLike) -> Iterator[None]:
    """Turns whatever transformers, safetensors or tokenizers raise into one sentence."""
    try:
        yield
    except PrunePathError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise CheckpointError(
            f"Expected {name} to be a complete model and tokenizer that transformers loads, but: "
            f"{lines[0].removesuffix('.')}."
        ) from error


def read_model_config(folder: Path) -> dict[str, Any]:
    """The contents of a local model's config.json, whose `quantization_config` is checked if it is PrunePath's.

    Raises:
        PrunePathError: if there is none, or it cannot be read as one.
    """
    path = folder / "config.json"
    if not folder.is_dir() or not path.is_file():
        raise PrunePathError(f"Expected a model folder with a config.json, but {path} is not there.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"Expected {path} to be a model's configuration in JSON, but: {error}.") from error
    sparsity = config.get("quantization_config")
    if isinstance(sparsity, dict) and sparsity.get("quant_method") == QUANT_METHOD:
        SparseDescription.from_dict(sparsity)
    return config


def check_routers(model: nn.Module) -> None:
    """Raises CheckpointError if a router, or what is added to outputs, holds a value that is not finite."""
    for path, ffn in sparse_ffns(model).items():
        tensors = {"router.weight": ffn.router.weight, "router.bias": ffn.router.bias, "center": ffn.center}
        tensors["removed_output"] = ffn.removed_output
        for name, tensor in tensors.items():
            if tensor is not None and not math.isfinite(tensor.detach().float().sum().item()):
                raise CheckpointError(f"Expected finite numbers in {path}.{name}, but it has NaN or infinite ones.")
