"""Calibration data as batches: inputs of one call of the model each, made from texts or handed over ready."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from prunepath.conversion.tokens import MIN_TOKENS, READ_AHEAD, sample_windows
from prunepath.errors import PrunePathError

Batch = dict[str, torch.Tensor]
"""Inputs of one call `model(**batch)`; with `labels` where the model computes a loss."""

_FORWARD_TOKENS = 1024
_IGNORED_LABEL = -100
_MASKED_SHARE = 0.15


def sample_batches(
    model: nn.Module, texts: Iterable, tokenizer: Any | None, sequence_length: int, num_tokens: int, seed: int
) -> list[Batch]:
    """A random sample, in random order, of about `num_tokens` tokens as batches on the model's device.

    Args:
        model: a transformers model. A causal language model gets whole windows, which are their own labels; a masked
            one windows of which 15 % of the tokens are masked (BERT, arXiv 1810.04805, section 3.1) and are the labels;
            an encoder-decoder the first half of a window as input and the second half as labels; others no labels.
        texts: strings; or with `tokenizer` None integer tensors of token ids, or batches, which are taken as they are.
        tokenizer: the model's, for strings.
        sequence_length: tokens of a window.
        num_tokens: how many tokens are wanted; padding does not count.
        seed: of the sample and the masking.

    Raises:
        PrunePathError: for data of another kind or too little of it, batches without token ids, or ids that the model
            does not know.
    """
    if not isinstance(texts, Iterable):
        raise PrunePathError(f"Expected texts, or batches, to convert or calibrate with, got {type(texts).__name__}.")
    if tokenizer is not None and not callable(tokenizer):
        raise PrunePathError(
            "Expected a tokenizer of transformers, or None for texts that are token ids, got "
            f"{type(tokenizer).__name__}."
        )
    first, texts = _peek(texts)
    if isinstance(first, Mapping):
        return _checked(model, [_complete(model, batch) for batch in _sample_ready(texts, num_tokens, seed)])
    windows = sample_windows(texts, tokenizer, sequence_length, num_tokens, seed)
    rows = max(1, min(_FORWARD_TOKENS // windows.shape[1], len(windows) // 8))  # several batches of little data too
    generator = torch.Generator().manual_seed(seed)
    parts = windows.split(rows)
    return _checked(model, [_complete(model, _from_windows(model, tokenizer, part, generator)) for part in parts])


def _checked(model: nn.Module, batches: list[Batch]) -> list[Batch]:
    """The batches, whose token ids the model's embedding table has, if the model says which that is."""
    try:
        rows = len(model.get_input_embeddings().weight)
    except NotImplementedError:
        return batches
    for name in ("input_ids", "decoder_input_ids"):
        ids = [batch[name] for batch in batches if name in batch]
        lowest, highest = (min(t.min() for t in ids), max(t.max() for t in ids)) if ids else (0, 0)
        if lowest < 0 or highest >= rows:
            raise PrunePathError(
                f"Expected token ids from 0 to {rows - 1}, the rows of the model's embedding table, got {name} from "
                f"{int(lowest)} to {int(highest)}: is the tokenizer another model's?"
            )
    return batches


def count_tokens(batch: Batch) -> int:
    """Tokens of a batch, padding left out."""
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())


def merge(batches: Sequence[Batch]) -> Batch:
    """One batch of all rows; shorter rows are padded at the end, which their masks say."""
    names = batches[0].keys()
    if any(batch.keys() != names for batch in batches):
        raise PrunePathError(f"Expected batches with the same inputs, {', '.join(names)} as in the first.")
    lengths = {batch["input_ids"].shape[1] for batch in batches}
    if len(lengths) > 1 and "attention_mask" not in names:
        batches = [{**batch, "attention_mask": torch.ones_like(batch["input_ids"])} for batch in batches]
    merged = {}
    for name in batches[0]:
        tensors = [batch[name] for batch in batches]
        if tensors[0].dim() >= 2:
            longest = max(tensor.shape[1] for tensor in tensors)
            fill = _IGNORED_LABEL if name == "labels" else 0
            rest = (0, 0) * (tensors[0].dim() - 2)
            tensors = [F.pad(t, (*rest, 0, longest - t.shape[1]), value=fill) for t in tensors]
        merged[name] = torch.cat(tensors)
    return merged


def backbone_inputs(batch: Batch) -> Batch:
    """What the model without its head takes."""
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[Batch]) -> float | None:
    """The model's loss, batches weighed by their labels; None for a model or batches that have none."""
    total = weight = 0.0
    for batch in batches:
        labels = batch.get("labels")
        loss = None if labels is None else getattr(model(**batch), "loss", None)
        if loss is None:
            return None
        count = (labels != _IGNORED_LABEL).sum().double()  # the device is waited for once, at the end
        total = total + loss.double() * count
        weight = weight + count
    return float(total / weight)


def _peek(texts: Iterable) -> tuple[Any, Iterable]:
    if isinstance(texts, str):
        return texts, texts
    iterator = iter(texts)
    first = next(iterator, None)
    return first, itertools.chain([] if first is None else [first], iterator)


def _sample_ready(batches: Iterable[Batch], num_tokens: int, seed: int) -> list[Batch]:
    read, kept = 0, []
    for batch in batches:
        _check_batch(batch)
        kept.append(dict(batch))
        read += count_tokens(batch)
        if read >= READ_AHEAD * num_tokens:
            break
    if read < MIN_TOKENS or len(kept) < 2:
        raise PrunePathError(
            f"Expected calibration data of {MIN_TOKENS} tokens in 2 or more batches, got {read} in {len(kept)}."
        )
    random.Random(seed).shuffle(kept)
    sizes = itertools.accumulate(map(count_tokens, kept))
    return kept[: max(2, 1 + sum(size < num_tokens for size in sizes))]


def _check_batch(batch: Any) -> None:
    """Raises PrunePathError unless `batch` is a dict of tensors with input_ids [B, S]."""
    if not isinstance(batch, Mapping):
        raise PrunePathError(f"Expected batches to be dicts like the first, got {type(batch).__name__}.")
    texts = [name for name, value in batch.items() if isinstance(value, str)]
    if texts and "input_ids" not in batch:
        raise PrunePathError(
            f"Expected texts to be strings, got rows with the text under {texts[0]!r}: give (row[{texts[0]!r}] for row "
            "in rows)."
        )
    for name in ("input_ids", *batch):
        if not isinstance(batch.get(name), torch.Tensor):
            kind = type(batch[name]).__name__ if name in batch else "none"
            raise PrunePathError(
                f"Expected batches to be dicts of tensors with a tensor input_ids, as a data collator makes them, got "
                f"{kind} as {name}."
            )
    ids = batch["input_ids"]
    if ids.dim() != 2 or ids.is_floating_point():
        raise PrunePathError(
            f"Expected batches with whole numbers of shape [B, S] as input_ids, got {ids.dtype} of shape "
            f"{list(ids.shape)}."
        )


def _from_windows(model: nn.Module, tokenizer: Any | None, windows: torch.Tensor, generator: torch.Generator) -> Batch:
    from transformers.models.auto import modeling_auto

    name = type(model).__name__
    if model.config.is_encoder_decoder:
        half = windows.shape[1] // 2
        return {"input_ids": windows[:, :half], "labels": windows[:, half:].contiguous()}  # T5 views its labels
    if name in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
        masked = torch.rand(windows.shape, generator=generator) < _MASKED_SHARE
        mask_id = getattr(tokenizer, "mask_token_id", None)
        # Without a mask token, any other token of the data stands for it.
        noise = windows.flatten()[torch.randperm(windows.numel(), generator=generator)].view_as(windows)
        inputs = torch.where(masked, noise if mask_id is None else mask_id, windows)
        return {"input_ids": inputs, "labels": torch.where(masked, windows, _IGNORED_LABEL)}
    if name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return {"input_ids": windows, "labels": windows}
    return {"input_ids": windows}


def _complete(model: nn.Module, batch: Batch) -> Batch:
    """The batch on the model's device, with the decoder's inputs that an encoder-decoder's backbone needs."""
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    labels = batch.get("labels")
    if model.config.is_encoder_decoder and labels is not None and "decoder_input_ids" not in batch:
        batch["decoder_input_ids"] = _shift_right(model, labels)
        if (labels == _IGNORED_LABEL).any():
            batch["decoder_attention_mask"] = (labels != _IGNORED_LABEL).long()
    if getattr(model, "get_output_embeddings", lambda: None)() is None and model.config.is_encoder_decoder:
        batch.pop("labels", None)  # the model without its head takes none
    return batch


def _shift_right(model: nn.Module, labels: torch.Tensor) -> torch.Tensor:
    config = model.config
    start = config.decoder_start_token_id
    start = config.pad_token_id if start is None else start
    shifted = labels.roll(1, dims=1)
    shifted[:, 0] = start
    return shifted.masked_fill(shifted == _IGNORED_LABEL, config.pad_token_id or 0)


def split_held_out(batches: Sequence[Batch], held_out_tokens: int) -> tuple[list[Batch], list[Batch]]:
    """(held out, the rest): the first batches with about `held_out_tokens` tokens, and at least one batch of each."""
    sizes = itertools.accumulate(map(count_tokens, batches))
    held_out = min(max(1, sum(size <= held_out_tokens for size in sizes)), len(batches) - 1)
    return list(batches[:held_out]), list(batches[held_out:])


def first_tokens(batches: Sequence[Batch], num_tokens: int) -> Iterator[Batch]:
    """The first batches with about `num_tokens` tokens, at least one."""
    done = 0
    for batch in batches:
        if done and done + count_tokens(batch) > num_tokens:
            return
        yield batch
        done += count_tokens(batch)
