"""Time to an answer: how many tokens a model needs, and whether it ends or runs on."""

from __future__ import annotations

import re
import time

from torch import nn

from tasks.base import Example, Task, continuations
from tasks.language import GSM8K, Dolly

PROMPTS = 100
NEW_TOKENS = 320
TIMED = 3
LONGEST_PERIOD = 32


class Answers(Task):
    """Greedy answers to the first 100 test questions of GSM8K and of Dolly each, of up to 320 tokens.

    `value` is the share of GSM8K's whose last number is the right one. `tokens` is the mean length of an answer,
    `ended` the share that end, `running` that of those that repeat themselves until they are cut. `seconds` is the mean
    time of the first three of each set, one at a time, with the KV cache.
    """

    name = "answers"
    metric = "exact_match"

    def read(self, split: str) -> list[Example]:
        if split != "test":
            return []
        tasks = (GSM8K(self.data, self.tokenizer), Dolly(self.data, self.tokenizer))
        count = min(PROMPTS, self.limit or PROMPTS)
        return [example for task in tasks for example in task.test_examples[:count]]

    @property
    def test_examples(self) -> list[Example]:
        return self._all_test_examples

    def evaluate(self, model: nn.Module, heads: nn.ModuleDict | None = None) -> dict:
        examples = self.test_examples
        prompts = [example.ids[: example.scored_from] for example in examples]
        references = self.tokenizer.batch_decode([e.ids[e.scored_from :] for e in examples], skip_special_tokens=True)
        end = self.tokenizer.eos_token_id
        answers = continuations(model, prompts, NEW_TOKENS, end)
        half = len(prompts) // 2
        texts = self.tokenizer.batch_decode(answers[:half], skip_special_tokens=True)
        pairs = zip(texts, references, strict=False)
        scores = [float(last_number(text) == last_number(reference)) for text, reference in pairs]
        first = [*prompts[:TIMED], *prompts[half : half + TIMED]]
        began = time.perf_counter()
        continuations(model, first, NEW_TOKENS, end, rows=1)
        seconds = (time.perf_counter() - began) / len(first)
        return {
            "value": sum(scores) / len(scores),
            "scores": scores,
            "tokens": sum(map(len, answers)) / len(answers),
            "ended": sum(answer[-1] == end for answer in answers) / len(answers),
            "running": sum(is_running(answer, end) for answer in answers) / len(answers),
            "seconds": seconds,
        }


def last_number(text: str) -> float | None:
    """The last number of a text; commas between digits do not count."""
    numbers = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
    return float(numbers[-1]) if numbers else None


def is_running(answer: list[int], end: int) -> bool:
    """Whether an answer was cut while its last tokens were some sequence of up to 32, three times over."""
    if answer[-1] == end:
        return False
    tails = (answer[-3 * period :] for period in range(1, LONGEST_PERIOD + 1) if 3 * period <= len(answer))
    return any(tail[: len(tail) // 3] * 3 == tail for tail in tails)
