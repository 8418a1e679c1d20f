"""Functions and what their authors say of them: summaries (NLG) and questions in chat format (instruction data)."""

from __future__ import annotations

import ast
import random
import re
import textwrap
from collections import Counter, defaultdict

import torch

from tasks.base import IGNORED, SPLITS, Task, package_texts, padded, texts_of

SOURCE_LENGTH, SUMMARY_LENGTH = 160, 32
CHAT_LENGTH = 192
_SUMMARY = "Summarise this function in one sentence."
_EXCEPTIONS = "Which exceptions belong in the blanks?"
_NEXT_LINE = "What is the next line?"
_EXCEPTION = re.compile(r"\b[A-Z]\w*(?:Error|Exception|Warning|Exit|Interrupt|Iteration)\b")


def functions(text: str) -> list[tuple[str, str | None, list[str]]]:
    """(source without docstring, first sentence of the docstring, exceptions raised) of each function in a module."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return []
    lines = text.split("\n")
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or node.end_lineno - node.lineno < 2:
            continue
        documented = ast.get_docstring(node)
        kept = list(range(node.lineno - 1, node.end_lineno))
        if documented is not None:
            first = node.body[0]
            kept = [i for i in kept if not first.lineno - 1 <= i < first.end_lineno]
        source = textwrap.dedent("\n".join(lines[i] for i in kept))
        summary = None
        if documented:
            summary = re.split(r"(?<=[.!?])\s|\n\s*\n", " ".join(documented.split("\n\n")[0].split()))[0]
        raised = []
        for child in ast.walk(node):
            if isinstance(child, ast.Raise) and child.exc is not None:
                name = _EXCEPTION.search(ast.unparse(child.exc))
                if name and name.group() not in raised:
                    raised.append(name.group())
        found.append((source, summary, raised))
    return found


class Functions:
    """The functions of one split after another, without those that a split before had, or nearly had.

    Two bodies are nearly the same where their runs of five words have a Jaccard index over 0.8
    (arXiv 2107.06499).
    """

    def __init__(self) -> None:
        self._bodies: set[str] = set()
        self._holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
        self._sizes: list[int] = []

    def of(self, texts: list[str]) -> list[tuple[str, str | None, list[str]]]:
        unique, runs = [], []
        for text in texts:
            for function in functions(text):
                words = re.findall(r"\w+|[^\w\s]", function[0].partition("\n")[2])
                body = "".join(words)
                run = set(zip(*(words[i:] for i in range(5)), strict=False))
                if len(body) >= 40 and body not in self._bodies and not self._nearly_held(run):
                    self._bodies.add(body)
                    unique.append(function)
                    runs.append(run)
        for run in runs:
            for words in run:
                self._holders[words].append(len(self._sizes))
            self._sizes.append(len(run))
        return unique

    def _nearly_held(self, run: set[tuple[str, ...]]) -> bool:
        shared = Counter(holder for words in run for holder in self._holders.get(words, ()))
        return any(5 * n > 4 * (len(run) + self._sizes[holder] - n) for holder, n in shared.items())


def build_nlg(name: str, tokenizer, *, tiny: bool) -> Task:
    """Function source to the first sentence of its docstring."""
    splits, references, found = {}, [], Functions()
    end = tokenizer.eos_token_id
    for split in reversed(SPLITS):  # a function that is in several splits is taken out of training
        texts = texts_of(split, tiny) + ([] if tiny else package_texts(split))
        pairs = [(source, summary) for source, summary, _ in found.of(texts) if _is_summary(summary)]
        pairs = pairs[: 24 if tiny else None]
        sources = tokenizer([source for source, _ in pairs], add_special_tokens=False)["input_ids"]
        summaries = tokenizer([summary for _, summary in pairs], add_special_tokens=False)["input_ids"]
        inputs = padded([[*ids[: SOURCE_LENGTH - 1], end] for ids in sources], SOURCE_LENGTH, -1)
        labels = padded([[*ids[: SUMMARY_LENGTH - 1], end] for ids in summaries], SUMMARY_LENGTH, IGNORED)
        splits[split] = {
            "input_ids": inputs.clamp(min=0),
            "attention_mask": (inputs >= 0).to(torch.int16),
            "labels": labels,
        }
        if split == "test":
            references = [summary for _, summary in pairs]
    sizes = [len(reference.encode()) for reference in references]
    return Task(name, "t5", "rouge_l", splits, sizes=sizes, references=references)


def _is_summary(summary: str | None) -> bool:
    return summary is not None and 3 <= len(summary.split()) <= 24 and summary.isascii()


def build_instruct(name: str, tokenizer, *, tiny: bool) -> Task:
    """Questions on functions in chat format; the loss is on the answers."""
    splits, sizes, found = {}, [], Functions()
    assistant = tokenizer("\nAssistant: ", add_special_tokens=False)["input_ids"]
    next_line = tokenizer(_asked(_NEXT_LINE), add_special_tokens=False)["input_ids"]
    for split in reversed(SPLITS):
        rng = random.Random(0)
        chats = [chat for function in found.of(texts_of(split, tiny)) for chat in _chats(*function, rng)]
        rng.shuffle(chats)
        chats = chats[: 24 if tiny else (1200 if split == "test" else None)]
        parts = [tokenizer(list(column), add_special_tokens=False)["input_ids"] for column in zip(*chats, strict=True)]
        inputs, labels, bytes_ = [], [], []
        for question, code, answer, (_, _, text) in zip(*parts, chats, strict=True):
            head, tail = [tokenizer.eos_token_id, *question], [*assistant, *answer, tokenizer.eos_token_id]
            room = CHAT_LENGTH - len(head) - len(tail)
            if room < CHAT_LENGTH // 4:
                continue
            head += code[-room:] if question == next_line else code[:room]
            inputs.append([*head, *tail])
            labels.append([*[IGNORED] * (len(head) + len(assistant)), *tail[len(assistant) :]])
            bytes_.append(len(text.encode()) + 1)
        rows = padded(inputs, CHAT_LENGTH, -1)
        splits[split] = {
            "input_ids": rows.clamp(min=0),
            "attention_mask": (rows >= 0).to(torch.int16),
            "labels": padded(labels, CHAT_LENGTH, IGNORED),
        }
        if split == "test":
            sizes = bytes_
    return Task(name, "llama", "bits_per_byte", splits, sizes=sizes)


def _chats(source: str, summary: str | None, raised: list[str], rng: random.Random) -> list[tuple[str, str, str]]:
    """(question, code, answer) triples about a function."""
    chats = []
    if _is_summary(summary):
        chats.append((_SUMMARY, source, summary))
    if raised:
        # The names of the exceptions are hidden, so that the answer is not copied.
        hidden = re.sub("|".join(map(re.escape, raised)), "____", source)
        chats.append((_EXCEPTIONS, hidden, ", ".join(raised)))
    lines = source.split("\n")
    if len(lines) >= 5:
        cut = rng.randrange(2, len(lines))
        if lines[cut].strip():
            chats.append((_NEXT_LINE, "\n".join(lines[:cut]), lines[cut].strip()))
    return [(_asked(question), code, answer) for question, code, answer in chats]


def _asked(question: str) -> str:
    return f"User: {question}\n"
