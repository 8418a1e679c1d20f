"""Choices of two answers without training, with the prompts and metrics of lm-evaluation-harness 0.4: accuracy."""

from __future__ import annotations

import functools

from torch import nn

from tasks.base import Example, Task, losses


class ChoiceTask(Task):
    """The share of rows where the right answer is the likelier one.

    The data are test only, so that no split has examples. `log_likelihoods` are those of each row's answers, in nats.
    """

    metric = "accuracy"
    file: str
    by_length = False  # lm-eval's `acc_norm`: log-likelihood by character of the answer

    def requests(self, row: dict) -> list[tuple[str, str]]:
        """(context, continuation) of each answer: what lm-eval asks of a model."""
        raise NotImplementedError

    def read(self, split: str) -> list[Example]:
        return []

    def rows(self) -> list[dict]:
        return self.json_lines(self.file)[: self.limit]

    def evaluate(self, model: nn.Module, heads: nn.ModuleDict | None = None) -> dict:
        rows = self.rows()
        nats = iter(losses(model, self.encoded))
        likelihoods = [[-next(nats) for _ in self.requests(row)] for row in rows]
        scores = [self._right(values, row) for values, row in zip(likelihoods, rows, strict=True)]
        extra = {}
        if self.by_length:
            extra["accuracy_by_sum"] = sum(scores) / len(scores)
            values = [
                [value / len(answer) for value, answer in zip(each, row["choices"], strict=True)]
                for each, row in zip(likelihoods, rows, strict=True)
            ]
            scores = [self._right(each, row) for each, row in zip(values, rows, strict=True)]
        return {"value": sum(scores) / len(scores), "scores": scores, "log_likelihoods": likelihoods, **extra}

    @functools.cached_property
    def encoded(self) -> list[tuple[list[int], int]]:
        """All rows' requests, encoded once for all that are evaluated."""
        return self.encode_requests([pair for row in self.rows() for pair in self.requests(row)])

    def encode_requests(self, requests: list[tuple[str, str]]) -> list[tuple[list[int], int]]:
        """(ids, where the continuation begins), cut as lm-eval cuts: both texts are tokenized as one."""
        contexts = self.encode([context for context, _ in requests])
        wholes = self.encode([context + continuation for context, continuation in requests])
        return [(whole, len(context)) for whole, context in zip(wholes, contexts, strict=True)]

    @staticmethod
    def _right(values: list[float], row: dict) -> float:
        return float(values.index(max(values)) == row["gold"])


class Piqa(ChoiceTask):
    """PIQA: how one does something. `value` is lm-eval's `acc_norm`, `accuracy_by_sum` its `acc`."""

    name = "piqa"
    file = "choice/piqa.jsonl"
    by_length = True

    def requests(self, row: dict) -> list[tuple[str, str]]:
        return [(f"{row['query']}Answer:", f" {choice}") for choice in row["choices"]]


class Winogrande(ChoiceTask):
    """WinoGrande: whom a sentence means, by the likelihood of the same ending after either."""

    name = "winogrande"
    file = "choice/winogrande.jsonl"

    def requests(self, row: dict) -> list[tuple[str, str]]:
        return [(context, f" {row['continuation']}") for context in row["context_options"]]


class BoolQ(ChoiceTask):
    """BoolQ: yes or no to a question on a passage."""

    name = "boolq"
    file = "nlu/boolq.jsonl"

    def requests(self, row: dict) -> list[tuple[str, str]]:
        context = f"{row['query'].removeprefix('Passage: ').rstrip()}\nAnswer:"
        return [(context, f" {choice}") for choice in row["choices"]]
