"""Language modelling of unseen modules: windows of source text."""

from __future__ import annotations

import torch

from tasks.base import SPLITS, Task, padded, texts_of

LENGTH = 256
_TEST_WINDOWS = 400


def build(name: str, tokenizer, *, tiny: bool) -> Task:
    splits, sizes = {}, []
    for split in SPLITS:
        ids: list[int] = []
        for encoding in tokenizer(texts_of(split, tiny), add_special_tokens=False, verbose=False)["input_ids"]:
            ids += [tokenizer.eos_token_id, *encoding]
        length = 32 if tiny else LENGTH
        windows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
        limit = 24 if tiny else (_TEST_WINDOWS if split == "test" else len(windows))
        # Evenly spread, so that every module has its share.
        windows = [windows[i * len(windows) // limit] for i in range(min(limit, len(windows)))]
        rows = padded(windows, length, 0)
        splits[split] = {"input_ids": rows, "labels": rows}
        if split == "test":
            texts = tokenizer.batch_decode([window[1:] for window in windows], clean_up_tokenization_spaces=False)
            sizes = [len(text.encode()) for text in texts]
    return Task(name, name.removeprefix("lm-"), "bits_per_byte", splits, sizes=sizes)


def token_stream(task: Task) -> torch.Tensor:
    """All training tokens of a language-modelling task, in order."""
    return task.splits["train"]["input_ids"].flatten()
