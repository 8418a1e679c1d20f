"""GLUE, SQuAD and XSum through the `datasets` package, in the shapes of the tasks made here."""

from __future__ import annotations

import torch

from tasks.base import IGNORED, SPLITS, Task, padded
from tasks.functions import CHAT_LENGTH, SOURCE_LENGTH, SUMMARY_LENGTH

HUB_TASKS = ("glue-sst2", "glue-mrpc", "glue-qnli", "squad", "xsum")
GLUE_LENGTH = 96
_FIELDS = {
    "glue-sst2": ("sentence",),
    "glue-mrpc": ("sentence1", "sentence2"),
    "glue-qnli": ("question", "sentence"),
}
_LIMITS = {"train": 30000, "validation": 600, "test": 1200}


def rows_of(name: str, tiny: bool) -> dict[str, list[dict]]:
    """The examples of each split.

    GLUE and SQuAD keep the answers of their test split to themselves: their validation split is the test here, and the
    last twentieth of training is held out in its place.
    """
    try:
        import datasets
    except ImportError as error:
        raise SystemExit(f"expected the package datasets for {name}: pip install '.[data]'.") from error
    source = ("glue", name.removeprefix("glue-")) if name in _FIELDS else {"squad": ("squad",), "xsum": ("xsum",)}[name]
    parts = datasets.load_dataset(*source)
    if name == "xsum":
        found = {split: parts[split] for split in SPLITS}
    else:
        held_out = max(1, len(parts["train"]) // 20)
        train = len(parts["train"]) - held_out
        found = {
            "train": parts["train"].select(range(train)),
            "validation": parts["train"].select(range(train, train + held_out)),
            "test": parts["validation"],
        }
    limits = dict.fromkeys(SPLITS, 24) if tiny else _LIMITS
    return {split: list(rows.select(range(min(len(rows), limits[split])))) for split, rows in found.items()}


def build(name: str, tokenizer, *, tiny: bool) -> Task:
    rows = rows_of(name, tiny)
    if name in _FIELDS:
        return _classification(name, tokenizer, rows)
    return (_answers if name == "squad" else _summaries)(name, tokenizer, rows)


def _ids(tokenizer, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _inputs(rows: list[list[int]], length: int) -> dict[str, torch.Tensor]:
    inputs = padded(rows, length, -1)
    return {"input_ids": inputs.clamp(min=0), "attention_mask": (inputs >= 0).to(torch.int16)}


def _classification(name: str, tokenizer, rows: dict[str, list[dict]]) -> Task:
    splits = {}
    for split, examples in rows.items():
        texts = ["\n".join(example[field] for field in _FIELDS[name]) for example in examples]
        labels = torch.tensor([example["label"] for example in examples], dtype=torch.int16)
        encoded = [[tokenizer.eos_token_id, *ids] for ids in _ids(tokenizer, texts)]
        splits[split] = {**_inputs(encoded, GLUE_LENGTH), "labels": labels}
    classes = 1 + max(int(split["labels"].max()) for split in splits.values())
    return Task(name, "bert", "accuracy", splits, labels=tuple(str(i) for i in range(classes)))


def _answers(name: str, tokenizer, rows: dict[str, list[dict]]) -> Task:
    """Questions on a passage in chat format; the loss is on the first of the answers that annotators gave."""
    end, splits, sizes = tokenizer.eos_token_id, {}, []
    assistant = _ids(tokenizer, ["\nAssistant: "])[0]
    for split, examples in rows.items():
        questions = _ids(tokenizer, [f"User: {example['question']}\n" for example in examples])
        passages = _ids(tokenizer, [example["context"] for example in examples])
        answers = [example["answers"]["text"][0] for example in examples]
        inputs, labels, bytes_ = [], [], []
        for question, passage, answer, text in zip(questions, passages, _ids(tokenizer, answers), answers, strict=True):
            head, tail = [end, *question], [*assistant, *answer, end]
            room = CHAT_LENGTH - len(head) - len(tail)
            if room < CHAT_LENGTH // 4:
                continue
            head += passage[:room]
            inputs.append([*head, *tail])
            labels.append([*[IGNORED] * (len(head) + len(assistant)), *answer, end])
            bytes_.append(len(text.encode()) + 1)
        splits[split] = {**_inputs(inputs, CHAT_LENGTH), "labels": padded(labels, CHAT_LENGTH, IGNORED)}
        if split == "test":
            sizes = bytes_
    return Task(name, "llama", "bits_per_byte", splits, sizes=sizes)


def _summaries(name: str, tokenizer, rows: dict[str, list[dict]]) -> Task:
    end, splits = tokenizer.eos_token_id, {}
    for split, examples in rows.items():
        sources = _ids(tokenizer, [example["document"] for example in examples])
        summaries = _ids(tokenizer, [example["summary"] for example in examples])
        splits[split] = {
            **_inputs([[*ids[: SOURCE_LENGTH - 1], end] for ids in sources], SOURCE_LENGTH),
            "labels": padded([[*ids[: SUMMARY_LENGTH - 1], end] for ids in summaries], SUMMARY_LENGTH, IGNORED),
        }
    references = [example["summary"] for example in rows["test"]]
    sizes = [len(reference.encode()) for reference in references]
    return Task(name, "t5", "rouge_l", splits, sizes=sizes, references=references)
