"""A task: examples of three splits, a model's score on the test split, and the passes of the model that it takes."""

from __future__ import annotations

import abc
import contextlib
import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from prunepath.errors import PrunePathError
from prunepath.nn.observers import padding_masks

LONGEST_TRAINING_EXAMPLE = 1024  # tokens; longer ones are left out of training
_BATCH_TOKENS = {"cuda": 32768, "cpu": 2048}  # of one forward pass, padding included
_GENERATED_ROWS = {"cuda": 1024, "cpu": 32}
_LOGITS = {"cuda": 2**27, "cpu": 2**24}  # that exist at once


@dataclass(frozen=True)
class Example:
    """One sequence of a split.

    Attributes:
        ids: token ids.
        scored_from: the labels are `ids[scored_from:]`, each predicted from what is before it; at least 1.
        size: UTF-8 bytes that `ids[scored_from:]` spell, special tokens not counted.
        head: the classification task whose head reads the last token's final hidden state. There is then no loss of
            the language model.
        label: the class, with a head.
    """

    ids: list[int]
    scored_from: int
    size: int = 0
    head: str | None = None
    label: int = 0

    @property
    def key(self) -> tuple[int, ...]:
        """What no two splits share: the prompt, or the whole text where there is none."""
        return tuple(self.ids[: self.scored_from] if self.scored_from > 1 else self.ids)


class Task(abc.ABC):
    """A data set as examples, and a model's score on it.

    Args:
        data: the folder that the sets are in.
        tokenizer: a fast tokenizer.
        limit: at most so many test examples, for small runs.

    Attributes:
        name: as tables call it.
        metric: `bits_per_byte` (lower is better), `accuracy` or `rouge_l` (in [0, 1], higher is better).
        num_classes: of a classification with a head.
    """

    name: str
    metric: str
    num_classes: int | None = None

    def __init__(self, data: Path, tokenizer, limit: int | None = None) -> None:
        self.data = Path(data)
        self.tokenizer = tokenizer
        self.limit = limit

    @abc.abstractmethod
    def read(self, split: str) -> list[Example]:
        """All examples of `train`, `validation` or `test` in the data's order. [] where there is no such split."""

    @abc.abstractmethod
    def evaluate(self, model: nn.Module, heads: nn.ModuleDict | None = None) -> dict:
        """The score on the test split of a causal language model of transformers, of any floating-point type.

        Returns:
            `value`, the metric over all test examples; `scores`, one an example (nats for `bits_per_byte`); `sizes`,
            each example's bytes, for `bits_per_byte`; and what a task adds.
        """

    def training_examples(self) -> list[Example]:
        """Without those of other splits, and without those too long to train on."""
        held_out = {example.key for example in (*self._all_test_examples, *self._all_validation_examples)}
        return [
            example
            for example in self.read("train")
            if example.key not in held_out and len(example.ids) <= LONGEST_TRAINING_EXAMPLE
        ]

    def validation_examples(self) -> list[Example]:
        """Held out from training, and not of the test split."""
        return list(self._all_validation_examples)

    @property
    def test_examples(self) -> list[Example]:
        return self._all_test_examples[: self.limit]

    @functools.cached_property
    def _all_test_examples(self) -> list[Example]:
        return self.read("test")

    @functools.cached_property
    def _all_validation_examples(self) -> list[Example]:
        test = {example.key for example in self._all_test_examples}
        return [example for example in self.read("validation") if example.key not in test]

    def path(self, name: str) -> Path:
        """A file of the data.

        Raises:
            PrunePathError: if it is not there.
        """
        path = self.data / name
        if not path.is_file():
            raise PrunePathError(
                f"Expected {name} of task {self.name} in the data folder {self.data}: it is not there."
            )
        return path

    def json_lines(self, name: str) -> list[dict]:
        with self.path(name).open(encoding="utf-8") as file:
            return [json.loads(line) for line in file if line.strip()]

    def encode(self, texts: list[str], special: bool | None = None) -> list[list[int]]:
        """Token ids of each text; the special tokens that the tokenizer adds of itself unless `special` is False."""
        options = {} if special is None else {"add_special_tokens": special}
        return self.tokenizer(texts, verbose=False, **options)["input_ids"] if texts else []


@contextlib.contextmanager
def evaluating(model: nn.Module, called: nn.Module) -> Iterator[None]:
    """Inside the `with` block nothing is trained, and sparse FFNs know the padding of `called`, the model or its base.

    Not `torch.inference_mode`: what a model keeps from a pass could then not be trained with later.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), padding_masks(called):
            yield
    finally:
        model.train(was_training)


def hidden_states(model: nn.Module, rows: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Final hidden states of sequences, in batches of similar lengths, the longest first.

    Args:
        model: a causal language model of transformers.
        rows: token ids of each sequence, none of them empty.

    Yields:
        (numbers of the B sequences in `rows`, their states [B, L, H]), padded on the right.
    """
    base, device = model.base_model, model.get_input_embeddings().weight.device
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number]))
    done = 0
    with evaluating(model, base):
        while done < len(order):
            length = len(rows[order[done]])
            batch = order[done : done + max(1, _of_device(_BATCH_TOKENS, device) // length)]
            done += len(batch)
            ids = torch.zeros(len(batch), length, dtype=torch.int64)
            attention = torch.zeros_like(ids)
            for i, number in enumerate(batch):
                ids[i, : len(rows[number])] = torch.tensor(rows[number])
                attention[i, : len(rows[number])] = 1
            output = base(input_ids=ids.to(device), attention_mask=attention.to(device), use_cache=False)
            yield batch, output.last_hidden_state


def last_states(model: nn.Module, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """The final hidden state of each sequence's last token, [N, H] in the order of `rows`; see `hidden_states`."""
    order, states = [], []
    for numbers, hidden in hidden_states(model, rows):
        last = hidden.new_tensor([len(rows[number]) - 1 for number in numbers]).long()
        states.append(hidden.take_along_dim(last[:, None, None], dim=1).squeeze(1))
        order += numbers
    found = torch.cat(states)
    return torch.empty_like(found).index_copy_(0, torch.tensor(order, device=found.device), found)


def losses(model: nn.Module, sequences: Sequence[tuple[list[int], int]]) -> list[float]:
    """Negative log-likelihood, in nats, of `ids[scored_from:]` given what is before, for each (ids, scored_from).

    Sequences that differ only in their last token share a pass. Logits exist at scored positions only, a chunk at a
    time, and are float32 in the softmax.
    """
    sharing: dict[tuple[int, ...], list[int]] = {}
    for owner, (ids, _) in enumerate(sequences):
        sharing.setdefault(tuple(ids[:-1]), []).append(owner)
    rows = list(sharing)
    totals = torch.zeros(len(sequences), dtype=torch.float64)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)  # Gemma's
    lm_head = model.get_output_embeddings()
    for numbers, hidden in hidden_states(model, rows):
        places, targets, owners = [], [], []
        for i, number in enumerate(numbers):
            for owner in sharing[rows[number]]:
                ids, scored_from = sequences[owner]
                places += range(i * hidden.shape[1] + scored_from - 1, i * hidden.shape[1] + len(ids) - 1)
                targets += ids[scored_from:]
                owners += [owner] * (len(ids) - scored_from)
        places, targets = (torch.tensor(each, device=hidden.device) for each in (places, targets))
        states = hidden.flatten(0, 1)[places]
        chunk = max(1, _of_device(_LOGITS, hidden.device) // model.config.get_text_config().vocab_size)
        nats = []
        for start in range(0, len(states), chunk):
            logits = lm_head(states[start : start + chunk]).float()
            if cap is not None:
                logits = cap * torch.tanh(logits / cap)
            nats.append(F.cross_entropy(logits, targets[start : start + chunk], reduction="none"))
        totals.index_add_(0, torch.tensor(owners), torch.cat(nats).double().cpu())
    return totals.tolist()


def continuations(
    model: nn.Module, prompts: Sequence[list[int]], new_tokens: int, end: int, rows: int | None = None
) -> list[list[int]]:
    """Greedy continuations of prompts, of up to `new_tokens` tokens; the `end` token is the last of one that has it.

    Args:
        rows: prompts of a batch, which are padded on the left; None suits the device.
    """
    device = model.get_input_embeddings().weight.device
    size = rows or _of_device(_GENERATED_ROWS, device)
    found = []
    with evaluating(model, model):
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            length = max(map(len, batch))
            ids = torch.full((len(batch), length), end)
            attention = torch.zeros_like(ids)
            for i, prompt in enumerate(batch):
                ids[i, length - len(prompt) :] = torch.tensor(prompt)
                attention[i, length - len(prompt) :] = 1
            output = model.generate(
                input_ids=ids.to(device),
                attention_mask=attention.to(device),
                max_new_tokens=new_tokens,
                do_sample=False,
                num_beams=1,
                eos_token_id=end,
                pad_token_id=end,
            )
            for row in output[:, length:].tolist():
                found.append(row[: row.index(end) + 1] if end in row else row)
    return found


def _of_device(table: dict[str, int], device: torch.device) -> int:
    return table.get(device.type, table["cpu"])
