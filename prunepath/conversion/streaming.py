"""Converting a checkpoint that does not fit into memory: one layer of it after another, from file to file."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from prunepath.calibration.fit import (
    BUDGETS,
    NODES,
    Calibration,
    FitFractions,
    budgets_of_nodes,
    nearest_fraction,
    router_quality,
)
from prunepath.checkpoint.description import SparseDescription, install, path_in_backbone
from prunepath.checkpoint.folders import check_output_folder, whole_folder
from prunepath.checkpoint.loading import INDEX, open_shards, read_model_config
from prunepath.checkpoint.tensor_file import NewTensor, TensorFile, write_tensor_file
from prunepath.config import PrunePathConfig
from prunepath.conversion.batches import Batch, backbone_inputs
from prunepath.conversion.checks import DTYPES, check_finite
from prunepath.conversion.convert import ConversionData, config_in_force, train_routers
from prunepath.conversion.experts import ExpertGrouping, reorder_neurons
from prunepath.errors import CheckpointError, PrunePathError
from prunepath.families import find_ffns
from prunepath.nn import SparseFFN
from prunepath.nn.observers import observing_hidden, observing_inputs
from prunepath.nn.thresholds import SMALLEST_THRESHOLD
from prunepath.train.router import RouterQuality, RouterTraining

_METADATA = {"format": "pt"}


def convert_streaming(
    folder: str | os.PathLike,
    out: str | os.PathLike,
    tokenizer: Any | None,
    texts: Iterable,
    config: PrunePathConfig | None = None,
    *,
    progress: bool = False,
) -> None:
    """Makes a sparse checkpoint from a dense one of any size, as `prunepath.convert` and `save` would.

    All calibration tokens go through one layer before the next is read. In memory at a time: a layer, what grouping its
    neurons takes, and the tokens' hidden states: `router_tokens` of them, and `calibration_tokens` for each calibrated
    budget. One thing differs from `convert`: each budget gives all FFNs the same active fraction.

    A run that was stopped goes on after the last layer it finished, when it is started again with the same arguments;
    until then its work lies beside `out`, in `.OUT.partial`. The result is the same.

    Args:
        folder: a local dense checkpoint of a decoder in safetensors, in one shard or several, all in one dtype.
        out: a folder that is new or empty; it appears whole at the end.
        tokenizer, texts: as for `prunepath.convert`; strings or token ids.
        config: as for `prunepath.convert`.
        progress: show a progress bar.

    Raises:
        PrunePathError: no such checkpoint, one that cannot be converted this way, or a place that cannot be written.
    """
    folder, config = Path(folder), config or PrunePathConfig()
    check_output_folder(out)
    entries = read_model_config(folder)
    if entries.get("quantization_config") is not None:
        raise PrunePathError(f"Expected a dense checkpoint without quantization, but {folder} has one.")
    stream = _Stream(folder, config)
    sizes = [ffn.intermediate_size for ffn in stream.ffns.values()]
    data = ConversionData.sample(stream.model, texts, tokenizer, config, sizes)
    with whole_folder(out, resume=_work(folder, stream.config, data)) as new:
        try:
            stream.convert(new, data, progress)
            stream.finish(new)
        except OSError as error:
            raise PrunePathError(
                f"Expected to write {out}, but: {error.strerror or error}; the same command goes on from there."
            ) from error


def _work(folder: Path, config: PrunePathConfig, data: ConversionData) -> str:
    """What has to be equal for a later run to go on."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(config)).encode())
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".json"):
            digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    for batch in (*data.training, *data.grouping, *data.calibration):
        digest.update(batch["input_ids"].numpy().tobytes())
    return digest.hexdigest()


class _Stream:
    """A checkpoint's model, of which the layer that is worked on has weights, and what is outside of layers mapped."""

    def __init__(self, folder: Path, config: PrunePathConfig) -> None:
        import transformers

        self.folder = folder
        self.model_config = transformers.AutoConfig.from_pretrained(folder)
        self.files = open_shards(folder)
        self.where = {name: file for file in self.files for name in file.entries}
        with _without_weights():
            self.model = transformers.AutoModelForCausalLM.from_config(self.model_config).eval()
        self.dtype = self.model_config.dtype or torch.float32
        if self.dtype not in DTYPES:
            raise PrunePathError(
                f"Expected a checkpoint of float32, bfloat16 or float16, got {self.dtype} in {folder}."
            )
        self.config = config_in_force(config, find_ffns(self.model))
        self.ffns = install(self.model, self.config)
        self.prefix, self.layers = self._find_layers()
        self._place_the_rest()

    def _find_layers(self) -> tuple[str, nn.ModuleList]:
        lists = {path: module for path, module in self.model.named_modules() if isinstance(module, nn.ModuleList)}
        for path, layers in lists.items():
            if [f.split(".")[: path.count(".") + 2] for f in self.ffns] == [
                [*path.split("."), str(i)] for i in range(len(layers))
            ]:
                return path, layers
        raise PrunePathError(
            f"Expected a decoder with one FFN a layer to convert layer by layer, got {type(self.model).__name__}."
        )

    def _place_the_rest(self) -> None:
        """Puts the backbone's weights outside of layers on the map: of the embeddings, few rows will be read."""
        backbone = self.model.base_model
        base = next(path for path, module in self.model.named_modules() if module is backbone)
        for name, parameter in list(backbone.named_parameters()):
            full = f"{base}.{name}" if base else name
            if not full.startswith(f"{self.prefix}."):
                owner, _, leaf = name.rpartition(".")
                tensor = self._tensor(full, parameter.shape)
                backbone.get_submodule(owner)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)

    def _tensor(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        if name not in self.where:
            raise CheckpointError(f"Expected {self.folder} to hold {name}, but none of its shards does.")
        tensor = self.where[name].tensor(name)
        if tuple(tensor.shape) != tuple(shape):
            raise CheckpointError(
                f"Expected {name} of shape {list(shape)} in {self.where[name].path}, got {list(tensor.shape)}."
            )
        if tensor.dtype != self.dtype:
            raise CheckpointError(
                f"Expected {name} in {self.where[name].path} to be {self.dtype} like its model, got {tensor.dtype}."
            )
        return tensor

    @torch.no_grad()
    def convert(self, new: Path, data: ConversionData, progress: bool) -> None:
        training = _Tokens(self, max(data.training, data.grouping, key=len))
        calibrated = {budget: _Tokens(self, data.calibration) for budget in (1.0, *NODES)}
        self.thresholds: list[dict[str, float]] = []
        self.routers: list[RouterQuality] = []
        precision = contextlib.nullcontext()
        if self.config.autocast != "none":
            precision = torch.autocast("cpu", getattr(torch, self.config.autocast))
        with precision:
            for index, ffn in enumerate(tqdm(self.ffns.values(), desc="Layers", disable=not progress)):
                done = new / f"done-{index}.json"
                if done.is_file():
                    found = json.loads(done.read_text(encoding="utf-8"))
                    self._load(index, TensorFile(new / self._shard(index)))
                    training.advance(index)
                    self._calibrate(index, ffn, calibrated, found["thresholds"])
                else:
                    self._load(index, None)
                    self._group_and_train(index, ffn, training, data)
                    found = self._calibrate(index, ffn, calibrated, None)
                    self._write(new / self._shard(index), self._layer_tensors(index))
                    _write_text(done, json.dumps(found))
                self.thresholds.append(found["thresholds"])
                self.routers.append(RouterQuality(**found["router"]))
                self._release(index)

    def _load(self, index: int, converted: TensorFile | None) -> None:
        """Gives a layer weights: of the dense checkpoint with empty routers, or those that were written before."""
        layer, ffn = self.layers[index], list(self.ffns.values())[index]
        added = {id(tensor) for tensor in ffn.router.tensors().values()}
        read = {id(p) for name in ffn.layout.projections for p in ffn.projection(name).parameters()}
        for name, place in layer.state_dict(keep_vars=True).items():
            full = f"{self.prefix}.{index}.{name}"
            owner, _, leaf = name.rpartition(".")
            if converted is not None:
                tensor = converted.tensor(full).clone()
            elif id(place) in added:
                tensor = torch.zeros(place.shape, dtype=self.dtype if place.is_floating_point() else place.dtype)
            else:
                tensor = self._tensor(full, place.shape).clone()
                if id(place) in read:
                    check_finite(full, tensor)
            module = layer.get_submodule(owner)
            if leaf in module._buffers:
                module._buffers[leaf] = tensor
            else:
                module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        ffn.threshold = 1.0

    def _release(self, index: int) -> None:
        self.layers[index].to("meta")
        gc.collect()  # optimisers are in reference cycles, and hold memory until then
        for file in self.files:
            file.release()
        return_freed_memory()

    def _group_and_train(self, index: int, ffn: SparseFFN, tokens: _Tokens, data: ConversionData) -> None:
        if ffn.expert_width > 1:
            with observing_inputs({ffn: ExpertGrouping(self.config, reorder_neurons)}):
                tokens.run_merged(index, len(data.grouping))
        training = RouterTraining(ffn, self.config.router_learning_rate, self.config.seed + index)
        count = len(data.training)
        for position in range(len(tokens)):
            if position < count:
                part = (position / count, (position + 1) / count)
                train_routers({ffn: training}, part, lambda p=position: tokens.advance_one(index, p))
            else:
                tokens.advance_one(index, position)
        training.finish()

    def _calibrate(
        self, index: int, ffn: SparseFFN, calibrated: dict[float, _Tokens], thresholds: dict[str, float] | None
    ) -> dict:
        """Sends the held-out tokens of each budget on, through the layer at the threshold that obtains it."""
        found: dict[str, float] = {}
        qualities: list[RouterQuality] = []

        def measure(ffn: SparseFFN, x: torch.Tensor, hidden: torch.Tensor) -> None:
            qualities.append(router_quality(ffn, x, hidden))

        with observing_hidden({ffn: measure}):
            calibrated[1.0].advance_merged(index)
        lowest = SMALLEST_THRESHOLD
        for node, budgets in budgets_of_nodes().items():
            fit = FitFractions({budget: nearest_fraction(ffn, budget) for budget in budgets}, node)
            if thresholds is not None:
                ffn.threshold = thresholds[f"{node:g}"]
            with observing_inputs({ffn: fit} if thresholds is None else {}):
                calibrated[node].advance_merged(index)
            for budget in budgets:
                fitted = fit.thresholds[budget].item() if thresholds is None else thresholds[f"{budget:g}"]
                found[f"{budget:g}"] = lowest = max(fitted, lowest)
        ffn.threshold = 1.0
        return {"thresholds": found, "router": dataclasses.asdict(qualities[0])}

    def _shard(self, index: int) -> str:
        return f"model-{index + 1:05d}-of-{len(self.layers) + 1:05d}.safetensors"

    def _layer_tensors(self, index: int) -> dict[str, NewTensor]:
        tensors = self.layers[index].state_dict(prefix=f"{self.prefix}.{index}.")
        return {n: NewTensor.computed(t.dtype, t.shape, lambda t=t: t) for n, t in tensors.items()}

    def _write(self, path: Path, tensors: dict[str, NewTensor]) -> None:
        partial = path.with_suffix(".partial")
        write_tensor_file(partial, tensors, _METADATA)
        os.replace(partial, path)

    def finish(self, new: Path) -> None:
        """Writes all that is not in layers, and makes the shards a checkpoint."""
        shards = {self._shard(i): TensorFile(new / self._shard(i)) for i in range(len(self.layers))}
        layers = tuple(f"{self.prefix}.{i}." for i in range(len(self.layers)))
        rest = {n: NewTensor.copied(f, n) for n, f in self.where.items() if not n.startswith(layers)}
        last = self._shard(len(self.layers))
        self._write(new / last, rest)
        shards[last] = TensorFile(new / last)
        weight_map = {name: shard for shard, file in shards.items() for name in file.entries}
        size = sum(e.end - e.begin for file in shards.values() for e in file.entries.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        _write_text(new / INDEX, json.dumps(index, indent=2) + "\n")
        for entry in self.folder.iterdir():
            copied = entry.suffix in (".json", ".model", ".txt", ".jinja") and entry.name not in ("config.json", INDEX)
            if copied and entry.is_file() and not entry.name.startswith("."):
                shutil.copyfile(entry, new / entry.name)
        description = SparseDescription(
            self.config,
            ffns=[path_in_backbone(self.model, path) for path in self.ffns],
            thresholds=[1.0] * len(self.ffns),
            budgets={b: [found[f"{b:g}"] for found in self.thresholds] for b in BUDGETS},
            calibration=Calibration({}, None, None, None, self.routers).to_dict(),
        )
        config = self.model_config.to_dict() | {"quantization_config": description.to_dict()}
        config["dtype"] = str(self.dtype).removeprefix("torch.")
        config["architectures"] = [type(self.model).__name__]
        _write_text(new / "config.json", json.dumps(config, indent=2) + "\n")
        for done in new.glob("done-*.json"):
            done.unlink()


class _Tokens:
    """The hidden states of calibration batches on their way through the layers."""

    def __init__(self, stream: _Stream, batches: Sequence[Batch]) -> None:
        self._stream = stream
        self._hidden = [_record(stream, batch)[0][0] for batch in batches]
        self._arguments: dict[tuple[int, int], list[tuple[tuple, dict]]] = {}

    def __len__(self) -> int:
        return len(self._hidden)

    def advance(self, index: int) -> None:
        """Takes all of them through a layer, batch by batch."""
        for position in range(len(self)):
            self.advance_one(index, position)

    def advance_one(self, index: int, position: int) -> None:
        """Takes one batch through a layer."""
        self._hidden[position] = self._run(index, self._hidden[position])

    def advance_merged(self, index: int) -> None:
        """Takes all of them through a layer in one call."""
        self._hidden = list(self._run(index, torch.cat(self._hidden)).split([len(h) for h in self._hidden]))

    def run_merged(self, index: int, count: int) -> None:
        """Runs a layer on the first `count` batches in one call."""
        self._run(index, torch.cat(self._hidden[:count]))

    def _run(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        shape = tuple(hidden.shape[:2])
        if shape not in self._arguments:  # positions and masks depend on the shape alone
            ids = torch.zeros(shape, dtype=torch.int64)
            self._arguments[shape] = [call[1:] for call in _record(self._stream, {"input_ids": ids})]
        args, kwargs = self._arguments[shape][index]
        output = self._stream.layers[index](hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output


class _Recorded(Exception):
    pass


class _Recorder(nn.Module):
    """Stands for a layer, and notes what it was called with."""

    def __init__(self, layer: nn.Module, calls: list, last: bool) -> None:
        super().__init__()
        self._layer, self._calls, self._last = (layer,), calls, last

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"][0], name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._calls.append((hidden_states, args, kwargs))
        if self._last:
            raise _Recorded
        return hidden_states


def _record(stream: _Stream, batch: Batch) -> list[tuple[torch.Tensor, tuple, dict]]:
    """(hidden states, other arguments, keyword arguments) of each layer; the first has the right hidden states."""
    calls: list = []
    layers = list(stream.layers)
    try:
        for i, layer in enumerate(layers):
            stream.layers[i] = _Recorder(layer, calls, i == len(layers) - 1)
        with contextlib.suppress(_Recorded):
            stream.model.base_model(**backbone_inputs(batch), use_cache=False)
    finally:
        for i, layer in enumerate(layers):
            stream.layers[i] = layer
    return calls


@contextlib.contextmanager
def _without_weights() -> Iterator[None]:
    """Modules made inside the `with` block have parameters without data, and buffers with theirs."""
    register = nn.Module.register_parameter

    def register_without_data(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register_without_data
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def return_freed_memory() -> None:
    """Has the C library return what was freed to the system.

    glibc keeps it for later allocations, which the layers' tensors, of many sizes, then fail to fit into: the process
    would grow by a share of each layer.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
