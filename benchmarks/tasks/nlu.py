"""Classification: which call was taken out of a passage of code."""

from __future__ import annotations

import re

import torch

from tasks.base import SPLITS, Task, padded, texts_of

LENGTH = 96
CALLS = (
    "len",
    "isinstance",
    "str",
    "int",
    "list",
    "range",
    "super",
    "append",
    "join",
    "get",
    "format",
    "split",
    "open",
    "assertEqual",
    "assertRaises",
    "assertTrue",
)
BLANK = "____"
_CALL = re.compile(rf"\b({'|'.join(CALLS)})\(")
_CONTEXT = 160


def build(name: str, tokenizer, *, tiny: bool) -> Task:
    """Passages of about 300 characters around a call whose name is replaced by a blank; the label is the name.

    Passages of a file do not overlap, each name is at most a seventh of a split, and no passage of a split is in
    another.
    """
    splits, seen = {}, set()
    for split in reversed(SPLITS):
        passages: list[tuple[str, int]] = []
        counts = [0] * len(CALLS)
        for text in texts_of(split, tiny):
            last = -_CONTEXT
            for match in _CALL.finditer(text):
                label = CALLS.index(match.group(1))
                if match.start() < last + _CONTEXT or counts[label] > 20 + len(passages) / 7:
                    continue
                passage = f"{text[max(0, match.start() - _CONTEXT) : match.start()]}{BLANK}("
                passage += text[match.end() : match.end() + _CONTEXT]
                key = re.sub(r"\s+", "", passage)
                if key not in seen:
                    seen.add(key)
                    passages.append((passage, label))
                    counts[label] += 1
                    last = match.end()
        step = max(1, len(passages) // (48 if tiny else 30000 if split == "train" else 2000))
        passages = passages[::step]
        ids = tokenizer([passage for passage, _ in passages], add_special_tokens=False)["input_ids"]
        rows = padded([_around_blank(row, tokenizer) for row in ids], LENGTH, -1)
        splits[split] = {
            "input_ids": rows.clamp(min=0),
            "attention_mask": (rows >= 0).to(torch.int16),
            "labels": torch.tensor([label for _, label in passages], dtype=torch.int16),
        }
    return Task(name, "bert", "accuracy", splits, labels=CALLS)


def _around_blank(ids: list[int], tokenizer) -> list[int]:
    """The end-of-text token, which stands for the whole passage, and at most `LENGTH` − 1 tokens around the middle."""
    start = max(0, (len(ids) - (LENGTH - 1)) // 2)
    return [tokenizer.eos_token_id, *ids[start : start + LENGTH - 1]]
