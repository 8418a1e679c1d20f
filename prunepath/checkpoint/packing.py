"""Packed checkpoints: experts as the kernels read them, each where a page begins, used from a memory map."""

from __future__ import annotations

import collections
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from prunepath.checkpoint.description import QUANT_METHOD, SparseDescription, install
from prunepath.checkpoint.folders import whole_folder
from prunepath.checkpoint.loading import read_model_config
from prunepath.checkpoint.tensor_file import PADDING, PAGE_BYTES, NewTensor, TensorFile, write_tensor_file
from prunepath.errors import CheckpointError, PrunePathError
from prunepath.nn import SparseFFN, SplitFFN, sparse_ffns

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
_METADATA = {"format": "pt"}
_EXPERTS_METADATA = {"format": "pt", "prunepath": "experts"}


def pack(folder: str | os.PathLike, out: str | os.PathLike) -> dict:
    """Writes a sparse checkpoint anew, its experts laid out for being used straight from the file.

    The second shard holds of every FFN its input weights, w_in [E, n, G, H] ([2, E, n, H] where gate and up are one
    matrix), under the name of the `up` projection, its output weights, w_out [E, n, H], under that of `down`, and for a
    centred one `mean_output`, float32 [H]. Each begins at a multiple of 4096 bytes, and so does each expert whose bytes
    are one. Shapes differ from the dense model's, so that without prunepath transformers refuses the checkpoint.
    In memory at a time: one FFN.

    Args:
        folder: a sparse checkpoint, whose FFNs and routers have one dtype.
        out: a folder that is new or empty; it appears whole at the end.

    Returns:
        `expert_bytes`, `other_bytes`, and `aligned`: whether every expert begins at a page.

    Raises:
        PrunePathError: no sparse checkpoint, a missing or damaged shard, mixed dtypes, or a place that cannot be
            written.
    """
    folder = Path(folder)
    description = read_description(folder)
    model = empty_model(folder)
    ffns = dict(zip(description.ffns, install(model, description).values(), strict=True))
    files = open_shards(folder)
    if any(is_expert_file(file) for file in files):
        raise PrunePathError(f"Expected a checkpoint to pack, but {folder} is packed already.")
    where = {name: file for file in files for name in file.entries}
    _check_weights(folder, ffns, where)
    means: dict[str, NewTensor] = {}
    experts: dict[str, NewTensor] = {}
    packed: set[str] = set()
    for path, ffn in ffns.items():
        up, down = weight_names(path, ffn)
        source = _Source(path, ffn, where)
        shapes = ffn.packed_shapes()
        dtype = where[up].tensor(up).dtype
        experts[up] = NewTensor.computed(dtype, shapes[0], source.w_in)
        experts[down] = NewTensor.computed(dtype, shapes[1], source.w_out)
        if ffn.center is not None:
            means[f"{path}.mean_output"] = NewTensor.computed(torch.float32, [ffn.hidden_size], source.mean_output)
        packed.update(_projection_weights(path, ffn).values())
    experts = means | experts  # what loading reads lies apart from what it must not
    others = {name: NewTensor.copied(file, name) for name, file in where.items() if name not in packed}
    with whole_folder(out) as new:
        try:
            for entry in folder.iterdir():
                if entry.is_file() and not entry.name.startswith(".") and ".safetensors" not in entry.name:
                    shutil.copyfile(entry, new / entry.name)
            write_tensor_file(new / SHARDS[0], others, _METADATA)
            write_tensor_file(new / SHARDS[1], experts, _EXPERTS_METADATA, align=PAGE_BYTES)
            sizes = [sum(tensor.size for tensor in tensors.values()) for tensors in (others, experts)]
            weight_map = {name: shard for names, shard in zip((others, experts), SHARDS, strict=True) for name in names}
            index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
            (new / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise PrunePathError(f"Expected to write {out}, but: {error.strerror or error}.") from error
    rows = {t.size // t.shape[0] for name, t in experts.items() if len(t.shape) > 1}
    return {"expert_bytes": sizes[1], "other_bytes": sizes[0], "aligned": all(row % PAGE_BYTES == 0 for row in rows)}


def read_description(folder: Path) -> SparseDescription:
    """What a local sparse checkpoint says of its sparsity.

    Raises:
        PrunePathError: if it is none.
    """
    sparsity = read_model_config(folder).get("quantization_config")
    if not isinstance(sparsity, dict) or sparsity.get("quant_method") != QUANT_METHOD:
        raise PrunePathError(f"Expected a sparse checkpoint, but {folder} is dense: convert it first.")
    return SparseDescription.from_dict(sparsity)


def empty_model(folder: Path) -> nn.Module:
    """The model of a local checkpoint, dense, without weights."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    name = (config.architectures or ["none"])[0]
    kind = getattr(transformers, name, None)
    if kind is None:
        raise CheckpointError(f"Expected {folder} to name a class of transformers as its architecture, got {name}.")
    with torch.device("meta"):
        return kind(config)


def open_shards(folder: Path) -> list[TensorFile]:
    """A local checkpoint's safetensors files.

    Raises:
        CheckpointError: if there is none, or one is missing or damaged.
    """
    index = folder / INDEX
    if not index.is_file():
        return [TensorFile(folder / "model.safetensors")]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"Expected {index} to say in which shard each weight is, but: {error}.") from error
    return [TensorFile(folder / name) for name in names]


def is_expert_file(file: TensorFile) -> bool:
    """Whether `file` is the shard of a packed checkpoint that holds its experts."""
    return file.metadata.get("prunepath") == _EXPERTS_METADATA["prunepath"]


def expert_file(files: Sequence[str | os.PathLike]) -> TensorFile | None:
    """The one of a checkpoint's files that holds packed experts; None for a checkpoint that is not packed."""
    opened = [TensorFile(file) for file in files if str(file).endswith(".safetensors")]
    return next((file for file in opened if is_expert_file(file)), None)


def weight_names(path: str, ffn: SparseFFN) -> tuple[str, str]:
    """What a packed checkpoint calls the input and the output weights of the FFN at the dotted path `path`."""
    names = _projection_weights(path, ffn)
    return names[ffn.layout.up], names[ffn.layout.down]


def _projection_weights(path: str, ffn: SparseFFN) -> dict[str, str]:
    owner = path.removesuffix(".mlp") if isinstance(ffn, SplitFFN) else path
    return {name: f"{owner}.{name}.weight" for name in ffn.layout.projections}


def prepare(model: nn.Module, paths: Sequence[str], ffns: Sequence[SparseFFN], file: TensorFile) -> None:
    """Takes the experts' weights out of a model that is to be loaded, since `attach` puts mapped ones there.

    Raises:
        CheckpointError: if the file does not hold them in the right shapes and the model's dtype.
    """
    expected = set()
    for path, ffn in zip(paths, ffns, strict=True):
        dtype = ffn.router.weight.dtype
        for name, shape in zip(weight_names(path, ffn), ffn.packed_shapes(), strict=True):
            tensor = file.tensor(name)
            if tuple(tensor.shape) != shape:
                raise CheckpointError(
                    f"Expected {name} of shape {list(shape)} in {file.path}, got {list(tensor.shape)}."
                )
            if tensor.dtype != dtype:
                raise CheckpointError(
                    f"Expected to load in {tensor.dtype}, since a packed checkpoint is used as it is on disk, got "
                    f"{dtype}."
                )
            expected.add(name)
        if ffn.center is not None:
            expected.add(f"{path}.mean_output")
            file.tensor(f"{path}.mean_output")
        ffn.drop_weights()
        for name in ffn.layout.projections:
            ffn.projection(name)._is_hf_initialized = True  # or transformers would fill what is not there
    ignored = {f"^{re.escape(name)}$" for name in expected} | {f"^{re.escape(PADDING)}"}
    model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | ignored


def attach(paths: Sequence[str], ffns: Sequence[SparseFFN], file: TensorFile) -> None:
    """Gives the FFNs of a loaded model their weights: on the map where the model is on the CPU, else copied."""
    names = {ffn: weight_names(path, ffn) for path, ffn in zip(paths, ffns, strict=True)}
    pages = {ffn: ExpertPages(file, names[ffn], ffn.layout.is_fused) for ffn in ffns}  # before anything is read
    for path, ffn in zip(paths, ffns, strict=True):
        device = ffn.router.weight.device
        mean_output = None if ffn.center is None else file.tensor(f"{path}.mean_output").to(device, copy=True)
        ffn.use_packed(*(file.tensor(name).to(device) for name in names[ffn]), mean_output)
        ffn.pages = pages[ffn] if ffn.is_mapped else None


class ExpertPages:
    """Where the experts of an FFN lie in a mapped file.

    Attributes:
        file: the file.
        expert_bytes: what an expert takes of it.
    """

    def __init__(self, file: TensorFile, names: Sequence[str], is_fused: bool) -> None:
        self.file = file
        entries = [file.entries[name] for name in names]
        tables = [(e.begin, e.end - e.begin, e.shape[0]) for e in entries]
        if is_fused:  # all gates lie before all ups
            begin, size, _ = tables.pop(0)
            tables += [(begin + half * size // 2, size // 2, entries[0].shape[1]) for half in (0, 1)]
        self._tables = [(begin, size // experts) for begin, size, experts in tables]
        self.expert_bytes = sum(size for _, size in self._tables)
        for begin, size, experts in tables:
            file.separate(begin, size // experts, experts)

    def read_ahead(self, expert: int) -> None:
        """Has the system begin to read an expert."""
        for begin, size in self._tables:
            self.file.read_ahead(begin + expert * size, begin + (expert + 1) * size)

    def release(self, expert: int) -> None:
        """Takes an expert out of this process's memory; using it again reads it."""
        for begin, size in self._tables:
            self.file.release(begin + expert * size, begin + (expert + 1) * size)


class ResidentExperts:
    """Keeps the mapped experts in memory within a limit, as the `fetch` hook of a packed model's FFNs.

    Those used longest ago leave first. What runs, and so the model's output, stays the same.

    Attributes:
        limit: bytes; exceeded only by a single call that needs more.
        hits, misses: experts that a call needed and that were in memory, or were not.
        bytes: in memory now.
        read_bytes: brought into memory so far.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.hits = self.misses = self.bytes = self.read_bytes = 0
        self._used: collections.OrderedDict[tuple[ExpertPages, int], int] = collections.OrderedDict()

    def __call__(self, ffn: SparseFFN, x: torch.Tensor) -> None:
        pages = ffn.pages
        if pages is None:
            return
        expert_ids, _, _ = ffn.route(x)
        needed = expert_ids.unique().tolist()
        for expert in needed[needed[:1] == [-1] :]:
            key = (pages, expert)
            if key in self._used:
                self.hits += 1
                self._used.move_to_end(key)
            else:
                self.misses += 1
                self._used[key] = pages.expert_bytes
                self.bytes += pages.expert_bytes
                self.read_bytes += pages.expert_bytes
                pages.read_ahead(expert)
        while self.bytes > self.limit and len(self._used) > len(needed):
            (former, expert), size = self._used.popitem(last=False)
            former.release(expert)
            self.bytes -= size


def limit_resident_experts(model: nn.Module, limit: int) -> ResidentExperts:
    """Keeps at most `limit` bytes of a packed model's experts in memory, from now on.

    Raises:
        PrunePathError: for a model whose experts are not used from a file.
    """
    ffns = [ffn for ffn in sparse_ffns(model).values() if ffn.pages is not None]
    if not ffns:
        raise PrunePathError(
            "Expected a packed checkpoint on the CPU, whose experts can leave memory: make one by prunepath pack."
        )
    resident = ResidentExperts(limit)
    for ffn in ffns:
        for expert in range(ffn.num_experts):
            ffn.pages.release(expert)
        ffn.fetch = resident
    return resident


def resident_limit(model: nn.Module, budget: float) -> int | None:
    """Bytes that suit a packed model at a budget: twice its share of the dense model's experts.

    Tokens that follow each other run different experts, which half as much would have to bring in anew for each.

    Returns:
        None for a model whose experts are not used from a file, and where that is all of them.
    """
    ffns = [ffn for ffn in sparse_ffns(model).values() if ffn.pages is not None]
    limit = int(2 * budget * sum(ffn.dense_experts * ffn.pages.expert_bytes for ffn in ffns))
    everything = sum(ffn.num_experts * ffn.pages.expert_bytes for ffn in ffns)
    return limit if limit < everything else None


def _check_weights(folder: Path, ffns: dict[str, SparseFFN], where: dict[str, TensorFile]) -> None:
    """Raises CheckpointError unless all FFN weights and routers are there, in their shapes and in one dtype."""
    dtypes: dict[str, str] = {}
    for path, ffn in ffns.items():
        names = {target: ffn.projection(name).weight for name, target in _projection_weights(path, ffn).items()}
        for name, parameter in {**names, f"{path}.router.weight": ffn.router.weight}.items():
            if name not in where:
                raise CheckpointError(f"Expected {folder} to hold {name}, but none of its shards does.")
            entry = where[name].entries[name]
            where[name].tensor(name)
            if entry.shape != tuple(parameter.shape):
                raise CheckpointError(
                    f"Expected {name} of shape {list(parameter.shape)} in {where[name].path}, got {list(entry.shape)}."
                )
            dtypes.setdefault(entry.dtype, name)
    if len(dtypes) > 1:
        found = ", ".join(f"{name} in {dtype}" for dtype, name in dtypes.items())
        raise CheckpointError(f"Expected FFNs and routers of one dtype to pack, got {found}.")


class _Source:
    """One FFN of a checkpoint, read and laid out once it is to be written."""

    def __init__(self, path: str, ffn: SparseFFN, where: dict[str, TensorFile]) -> None:
        self.path = path
        self.ffn = ffn
        self.where = where
        self._packed: tuple[torch.Tensor, torch.Tensor] | None = None

    def mean_output(self) -> torch.Tensor:
        return self.ffn.mean_output(self._read()[1])

    def w_in(self) -> torch.Tensor:
        self._packed = self._read()
        return self._packed[0]

    def w_out(self) -> torch.Tensor:
        w_out, self._packed = self._packed[1], None
        return w_out

    def _read(self) -> tuple[torch.Tensor, torch.Tensor]:
        ffn, path = self.ffn, self.path
        for name, weight in _projection_weights(path, ffn).items():
            linear = ffn.projection(name)
            linear.weight = nn.Parameter(self._tensor(weight))
            if linear.bias is not None:
                linear.bias = nn.Parameter(self._tensor(weight.removesuffix("weight") + "bias"))
        ffn.router.weight = nn.Parameter(self._tensor(f"{path}.router.weight"))
        if ffn.center is not None:
            ffn.center = self._tensor(f"{path}.center")
        if ffn.removed_output is not None:
            ffn.removed_output = self._tensor(f"{path}.removed_output")
        packed = ffn.expert_major()
        ffn.drop_weights()
        for file in {id(file): file for file in self.where.values()}.values():
            file.release()
        return packed

    def _tensor(self, name: str) -> torch.Tensor:
        if name not in self.where:
            raise CheckpointError(f"Expected the checkpoint to hold {name}, but none of its shards does.")
        return self.where[name].tensor(name)
