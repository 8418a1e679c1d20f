"""The training data that all methods share: examples of every task, packed into rows of equal length."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence

import torch
from tasks import Example

LENGTH = 512
SHARES = {"wikitext": 4.0, "dolly": 2.0, "gsm8k": 2.0, "e2e": 1.0, "mr": 0.5, "subj": 0.5, "banking77": 0.5}
"""How the tokens of a step are divided among the tasks; what is not here is not trained on."""
IGNORED = -100


@dataclasses.dataclass
class Packed:
    """Rows of examples, one behind another, that do not see each other.

    Attributes:
        input_ids, position_ids: int64 [B, S]; positions count from 0 in every example.
        documents: int64 [B, S], which example of its row a token belongs to.
        labels: int64 [B, S], the next token where it is scored, else -100.
        heads: task -> (indices into the B·S tokens, classes), int64 [N] each, of examples with a classification head.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    documents: torch.Tensor
    labels: torch.Tensor
    heads: dict[str, tuple[torch.Tensor, torch.Tensor]]

    def to(self, device: torch.device | str) -> Packed:
        tensors = (t.to(device) for t in (self.input_ids, self.position_ids, self.documents, self.labels))
        heads = {name: (where.to(device), classes.to(device)) for name, (where, classes) in self.heads.items()}
        return Packed(*tensors, heads)

    def inputs(self) -> dict[str, torch.Tensor]:
        """What a decoder's forward pass takes; `attention_mask` is bool [B, 1, S, S], true where one sees another."""
        same = self.documents.unsqueeze(2) == self.documents.unsqueeze(1)
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "attention_mask": same.tril().unsqueeze(1),
        }


def pack(examples: Sequence[Example], fill: int, length: int = LENGTH) -> Packed:
    """One row of at most `length` tokens; what is left over is filled with unscored tokens `fill`."""
    ids: list[int] = []
    positions: list[int] = []
    documents: list[int] = []
    labels: list[int] = []
    heads: dict[str, tuple[list[int], list[int]]] = {}
    filler = Example([fill] * (length - sum(len(e.ids) for e in examples)), length + 1)
    for index, example in enumerate([*examples, filler]):
        ids += example.ids
        positions += range(len(example.ids))
        documents += [index] * len(example.ids)
        scored = example.head is None
        labels += [
            example.ids[i + 1] if scored and example.scored_from <= i + 1 < len(example.ids) else IGNORED
            for i in range(len(example.ids))
        ]
        if example.head is not None:
            where, classes = heads.setdefault(example.head, ([], []))
            where.append(len(ids) - 1)
            classes.append(example.label)
    tensors = (torch.tensor([values]) for values in (ids, positions, documents, labels))
    return Packed(*tensors, {name: (torch.tensor(w), torch.tensor(c)) for name, (w, c) in heads.items()})


def stack(rows: Sequence[Packed]) -> Packed:
    """Rows of one length as one batch."""
    names = dict.fromkeys(name for row in rows for name in row.heads)
    heads = {}
    for name in names:
        parts = [
            (row.heads[name][0] + i * row.input_ids.shape[1], row.heads[name][1])
            for i, row in enumerate(rows)
            if name in row.heads
        ]
        heads[name] = tuple(torch.cat(values) for values in zip(*parts, strict=True))
    fields = ("input_ids", "position_ids", "documents", "labels")
    return Packed(*(torch.cat([getattr(row, field) for row in rows]) for field in fields), heads)


class Mixture:
    """Batches without end, in which each task has its share of the tokens, whatever the lengths of its examples.

    Args:
        examples: task -> examples, of at most `LENGTH` tokens; longer ones are cut.
        fill: a token id for what is left of rows.
    """

    def __init__(self, examples: Mapping[str, Sequence[Example]], fill: int) -> None:
        self.examples = {
            name: [dataclasses.replace(e, ids=e.ids[:LENGTH]) for e in examples[name] if e.scored_from < LENGTH]
            for name in SHARES
            if examples.get(name)
        }
        self.fill = fill

    def rows(self, seed: int) -> Iterator[Packed]:
        draws = random.Random(seed)
        orders: dict[str, list[Example]] = {name: [] for name in self.examples}
        spent = dict.fromkeys(self.examples, 0.0)
        waiting: list[Example] = []
        used = 0
        while True:
            # The task that is furthest behind its share comes next.
            name = min(spent, key=spent.get)
            if not orders[name]:
                orders[name] = draws.sample(self.examples[name], len(self.examples[name]))
            example = orders[name].pop()
            spent[name] += len(example.ids) / SHARES[name]
            if used + len(example.ids) <= LENGTH:
                waiting.append(example)
                used += len(example.ids)
            elif used < len(example.ids):  # the longer part goes, so that little of a row is left over
                yield pack([example], self.fill)
            else:
                yield pack(waiting, self.fill)
                waiting, used = [example], len(example.ids)

    def batches(self, rows: int, seed: int) -> Iterator[Packed]:
        source = self.rows(seed)
        while True:
            yield stack([next(source) for _ in range(rows)])

    def plain_batches(self, count: int, rows: int, seed: int) -> list[dict]:
        """Batches as any causal model takes them, of language tasks alone: `input_ids`, `attention_mask`, `labels`."""
        names = [name for name, examples in self.examples.items() if not examples[0].head]
        language = Mixture({name: self.examples[name] for name in names}, self.fill)
        source = language.batches(rows, seed)
        ids = [next(source).input_ids for _ in range(count)]
        return [{"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows} for rows in ids]
