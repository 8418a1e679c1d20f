"""Classification by a trained head that reads the final hidden state of a short text's last token: accuracy."""

from __future__ import annotations

import csv
import random
import zipfile

import torch
from torch import nn

from prunepath.errors import PrunePathError
from tasks.base import Example, Task, last_states

SEED = 0


class ClassificationTask(Task):
    """The share of test examples whose largest output of the head is the label's."""

    metric = "accuracy"
    prompt: str

    def rows(self, split: str) -> list[tuple[str, int]]:
        """(text, label)"""
        raise NotImplementedError

    def read(self, split: str) -> list[Example]:
        rows = self.rows(split)
        encoded = self.encode([self.prompt.format(text) for text, _ in rows])
        return [
            Example(ids, len(ids), head=self.name, label=label) for ids, (_, label) in zip(encoded, rows, strict=True)
        ]

    def evaluate(self, model: nn.Module, heads: nn.ModuleDict | None = None) -> dict:
        """As `Task.evaluate`. `heads[name]` maps states [B, H] of its own type to [B, classes].

        Raises:
            PrunePathError: without a head of this task.
        """
        if heads is None or self.name not in heads:
            raise PrunePathError(f"Expected a trained head for task {self.name}, got none.")
        head, examples = heads[self.name], self.test_examples
        dtype = next(head.parameters()).dtype
        states = last_states(model, [example.ids for example in examples])
        with torch.no_grad():
            predicted = head(states.to(dtype)).float().argmax(-1).tolist()
        scores = [float(label == example.label) for label, example in zip(predicted, examples, strict=True)]
        return {"value": sum(scores) / len(scores), "scores": scores}


class TwoFiles(ClassificationTask):
    """Sentences of two classes, a file each in an archive; a seeded split of 80, 10 and 10 percent."""

    num_classes = 2
    archive: str
    files: tuple[str, str]

    def rows(self, split: str) -> list[tuple[str, int]]:
        labels: dict[str, int] = {}  # a sentence that is there twice counts once
        with zipfile.ZipFile(self.path(self.archive)) as archive:
            for label, name in enumerate(self.files):
                for line in archive.read(name).decode("utf-8").split("\n"):
                    if line.strip():
                        labels.setdefault(line.strip(), label)
        rows = list(labels.items())
        random.Random(SEED).shuffle(rows)
        tenth = len(rows) // 10
        part = {"train": slice(2 * tenth, None), "validation": slice(tenth, 2 * tenth), "test": slice(tenth)}[split]
        return rows[part]


class MR(TwoFiles):
    """Pang and Lee's sentences of film reviews: negative or positive."""

    name = "mr"
    prompt = "Review: {}\nSentiment:"
    archive = "nlu/sentence_polarity.zip"
    files = ("sentence_polarity/rt-polarity.neg", "sentence_polarity/rt-polarity.pos")


class Subj(TwoFiles):
    """Pang and Lee's sentences on films: of plots (objective) or of reviews (subjective)."""

    name = "subj"
    prompt = "Sentence: {}\nObjective or subjective:"
    archive = "nlu/subjectivity.zip"
    files = ("subjectivity/plot.tok.gt9.5000", "subjectivity/quote.tok.gt9.5000")


class Banking77(ClassificationTask):
    """Questions to a bank and what is meant by each; a seeded tenth of training is validation."""

    name = "banking77"
    num_classes = 77
    prompt = "Query: {}\nIntent:"

    def rows(self, split: str) -> list[tuple[str, int]]:
        texts = {
            name: [(row["text"].strip(), row["category"]) for row in self._csv(name)] for name in ("train", "test")
        }
        classes = sorted({category for _, category in texts["train"]})
        rows = texts["test"]
        if split != "test":
            rows = sorted(set(texts["train"]))  # a question that is there twice would be in two splits
            random.Random(SEED).shuffle(rows)
            tenth = len(rows) // 10
            rows = rows[:tenth] if split == "validation" else rows[tenth:]
        return [(text, classes.index(category)) for text, category in rows]

    def _csv(self, name: str) -> list[dict[str, str]]:
        with self.path(f"nlu/banking77-{name}.csv").open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
