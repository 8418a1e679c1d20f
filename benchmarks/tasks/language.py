"""Language modelling, of running text and of answers in chat format: bits per byte."""

from __future__ import annotations

import json
import math
import re

import numpy as np
from torch import nn

from prunepath.errors import PrunePathError
from tasks.base import Example, Task, losses

WINDOW = 512
LONGEST_CHAT = 2048  # tokens; OPT has no more positions


class LanguageTask(Task):
    """Bits that the model needs for a byte of the scored text."""

    metric = "bits_per_byte"

    def evaluate(self, model: nn.Module, heads: nn.ModuleDict | None = None) -> dict:
        nats = losses(model, [(example.ids, example.scored_from) for example in self.test_examples])
        sizes = [example.size for example in self.test_examples]
        return {"value": sum(nats) / math.log(2) / sum(sizes), "scores": nats, "sizes": sizes}


class WikiText(LanguageTask):
    """WikiText-2 in windows of 512 tokens, each its own sequence; training also on plain Wikipedia articles.

    The first token of a window is the tokenizer's beginning-of-sequence token, where it has one; it is not scored.
    """

    name = "wikitext"

    def read(self, split: str) -> list[Example]:
        names = {
            "train": ("wikitext2-train-1MB.txt", "wikipedia-plain.txt"),
            "validation": ("wikitext2-valid.txt",),
            "test": ("wikitext2-test-raw.txt",),
        }[split]
        examples = []
        for name in names:
            # Articles of the plain text come between tags.
            text = re.sub(r"^</?doc\b.*>\n?", "", self.path(f"lm/{name}").read_text("utf-8"), flags=re.MULTILINE)
            examples += windows(text, self.tokenizer)
        return examples


def windows(text: str, tokenizer) -> list[Example]:
    """All of a text, cut in sequences of 512 tokens."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, ends = encoded["input_ids"], [end for _, end in encoded["offset_mapping"]]
    if not ids:
        return []
    ends[-1] = len(text)
    # A character that several tokens spell, maybe of two windows, counts with its first token.
    bytes_before = np.concatenate([[0], np.cumsum([len(character.encode()) for character in text])])
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    unscored = 1 - len(begin)
    step = WINDOW - len(begin)
    examples = []
    for start in range(0, len(ids), step):
        stop = min(start + step, len(ids))
        first = start + unscored
        if first < stop:
            before = ends[first - 1] if first else 0
            size = int(bytes_before[ends[stop - 1]] - bytes_before[before])
            examples.append(Example(begin + ids[start:stop], 1, size))
    return examples


class ChatTask(LanguageTask):
    """Answers to questions in the tokenizer's chat format. The end of the turn is scored, its bytes are not counted.

    Of a question too long, the beginning is cut.
    """

    def pairs(self, split: str) -> list[tuple[str, str]]:
        """(question, answer)"""
        raise NotImplementedError

    def read(self, split: str) -> list[Example]:
        pairs = [(question, answer.strip()) for question, answer in self.pairs(split)]
        turns = [chat_turn(self.tokenizer, *pair) for pair in pairs]
        # A chat template writes the special tokens itself.
        special = False if getattr(self.tokenizer, "chat_template", None) else None
        prompts = self.encode([prompt for prompt, _ in turns], special)
        replies = self.encode([reply for _, reply in turns], special=False)
        prompts = [prompt[-max(1, LONGEST_CHAT - len(reply)) :] for prompt, reply in zip(prompts, replies, strict=True)]
        return [
            Example(prompt + reply, len(prompt), len(answer.encode()))
            for prompt, reply, (_, answer) in zip(prompts, replies, pairs, strict=True)
        ]


def chat_turn(tokenizer, question: str, answer: str) -> tuple[str, str]:
    """(prompt, answer with the end of its turn) as text; without a chat template, two paragraphs and the end token."""
    if not getattr(tokenizer, "chat_template", None):
        return f"{question}\n\n", f"{answer}{tokenizer.eos_token}"
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    if not whole.startswith(f"{prompt}{answer}"):
        raise PrunePathError(
            "Expected a chat template that puts an answer after its prompt as it is; this one does not."
        )
    return prompt, whole.removeprefix(prompt).rstrip("\n")


class Dolly(ChatTask):
    """Instructions of Databricks Dolly: the last 200 are the test, the 100 before them validation."""

    name = "dolly"

    def pairs(self, split: str) -> list[tuple[str, str]]:
        rows = json.loads(self.path("instruct/dolly-2k.json").read_text("utf-8"))
        part = {"train": slice(-300), "validation": slice(-300, -200), "test": slice(-200, None)}[split]
        return [
            ("\n\n".join(filter(None, (row["instruction"].strip(), row["input"].strip()))), row["output"])
            for row in rows[part]
        ]


class GSM8K(ChatTask):
    """Worded arithmetic with worked answers; the last 200 of training are validation."""

    name = "gsm8k"

    def pairs(self, split: str) -> list[tuple[str, str]]:
        rows = self.json_lines(f"instruct/gsm8k-{'test' if split == 'test' else 'train'}.jsonl")
        part = {"train": slice(-200), "validation": slice(-200, None), "test": slice(None)}[split]
        return [(row["question"], row["answer"]) for row in rows[part]]
