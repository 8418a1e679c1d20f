"""Packed checkpoints: weights lie in the file as the kernels read them, and are used from its memory map."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from prunepath.checkpoint.description import QUANT_METHOD, SparseDescription, install
from prunepath.checkpoint.folders import whole_folder
from prunepath.checkpoint.loading import WEIGHTS, open_shards, read_model_config
from prunepath.checkpoint.tensor_file import PAGE_BYTES, NewTensor, TensorFile, write_tensor_file
from prunepath.errors import CheckpointError, PrunePathError
from prunepath.nn import SparseFFN, SplitFFN

_METADATA = {"format": "pt", "prunepath": "packed"}


def pack(folder: str | os.PathLike, out: str | os.PathLike) -> dict[str, int]:
    """Writes a sparse checkpoint anew, so that it opens without being read: weights come into memory as they are used.

    transformers maps weights into memory as they lie in the file, but down projections [H, D] have to be transposed for
    the kernels. A packed checkpoint holds them as [D, H]: without prunepath, transformers refuses it for that shape.
    Every tensor begins at a page. In memory at a time: one tensor.

    Args:
        folder: a local sparse checkpoint in safetensors.
        out: a folder that is new or empty; it appears whole at the end.

    Returns:
        `ffn_bytes` and `other_bytes`, what weights take of the file.

    Raises:
        PrunePathError: no sparse checkpoint, a missing or damaged shard, or a place that cannot be written.
    """
    folder = Path(folder)
    description = _read_description(folder)
    files = open_shards(folder)
    if any(is_packed(file) for file in files):
        raise PrunePathError(f"Expected a checkpoint to pack, but {folder} is packed already.")
    where = {name: file for file in files for name in file.entries}
    ffns = install(_empty_model(folder), description.config)
    check_routers_in(where, ffns)
    tensors = {name: NewTensor.copied(file, name) for name, file in where.items()}
    ffn_bytes = 0
    for path, ffn in ffns.items():
        for name in ffn.layout.projections:
            weight = _weight_name(path, ffn, name)
            shape = ffn.projection(name).weight.shape
            _file_of(where, weight).require(weight, shape)
            if shape[0] == shape[1]:
                raise PrunePathError(
                    f"Expected FFNs wider than the hidden size to pack, got {weight} of {list(shape)}."
                )
            if ffn.is_column_major(name):
                tensors[weight] = _transposed(where[weight], weight)
            ffn_bytes += tensors[weight].size
    with whole_folder(out) as new:
        try:
            for entry in folder.iterdir():
                if entry.is_file() and not entry.name.startswith(".") and ".safetensors" not in entry.name:
                    shutil.copyfile(entry, new / entry.name)
            write_tensor_file(new / WEIGHTS, tensors, _METADATA, align=PAGE_BYTES)
        except OSError as error:
            raise PrunePathError(f"Expected to write {out}, but: {error.strerror or error}.") from error
    return {"ffn_bytes": ffn_bytes, "other_bytes": sum(tensor.size for tensor in tensors.values()) - ffn_bytes}


def _transposed(file: TensorFile, name: str) -> NewTensor:
    def read() -> torch.Tensor:
        transposed = file.tensor(name).t().contiguous()
        file.release()
        return transposed

    tensor = file.tensor(name)
    return NewTensor.computed(tensor.dtype, tensor.shape[::-1], read)


def _read_description(folder: Path) -> SparseDescription:
    sparsity = read_model_config(folder).get("quantization_config")
    if sparsity is None or sparsity.get("quant_method") != QUANT_METHOD:
        raise PrunePathError(f"Expected a sparse checkpoint, but {folder} is dense: convert it first.")
    return SparseDescription.from_dict(sparsity)


def _empty_model(folder: Path) -> nn.Module:
    """The model of a local checkpoint, dense, without weights."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    name = (config.architectures or ["none"])[0]
    kind = getattr(transformers, name, None)
    if kind is None:
        raise CheckpointError(f"Expected {folder} to name a class of transformers as its architecture, got {name}.")
    with torch.device("meta"):
        return kind(config)


def is_packed(file: TensorFile) -> bool:
    """Whether `file` is of a packed checkpoint."""
    return file.metadata.get("prunepath") == _METADATA["prunepath"]


def check_routers_in(where: Mapping[str, TensorFile], ffns: Mapping[str, SparseFFN]) -> None:
    """Raises CheckpointError unless the files hold each FFN's router, in its shape, with or without the head's prefix.

    A router whose tables were saved while they trained gets such tables.

    Args:
        where: tensor name -> file.
        ffns: by path.
    """
    for path, ffn in ffns.items():
        table = _stored_name(where, f"{path}.router.w_out")
        if _file_of(where, table).entries[table].dtype != "U8":
            ffn.router.unpack()
        for name, tensor in ffn.router.tensors().items():
            found = _stored_name(where, f"{path}.router.{name}")
            _file_of(where, found).require(found, tensor.shape, packed=not tensor.is_floating_point())


def _stored_name(where: Mapping[str, TensorFile], name: str) -> str:
    """What a tensor is called in the files, with or without the head's prefix; `name` if it is in none."""
    return next((stored for stored in where if f".{stored}".endswith(f".{name}")), name)


def _file_of(where: Mapping[str, TensorFile], name: str) -> TensorFile:
    if name not in where:
        raise CheckpointError(f"Expected the checkpoint to hold {name}, but it is missing.")
    return where[name]


def _weight_name(path: str, ffn: SparseFFN, projection: str) -> str:
    owner = path.removesuffix(".mlp") if isinstance(ffn, SplitFFN) else path
    return f"{owner}.{projection}.weight"


def transpose_packed(ffns: Iterable[SparseFFN]) -> None:
    """Gives the empty weights of FFNs the shapes that a packed checkpoint holds, or loaded ones their own again."""
    for ffn in ffns:
        for name in ffn.layout.projections:
            if ffn.is_column_major(name):
                weight = ffn.projection(name).weight
                weight.data = weight.data.t()
