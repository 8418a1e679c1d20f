"""Tasks of the quality benchmark: public data sets in a folder, their splits, and how a model is scored on each.

Sizes in parentheses are of the whole test split. Nothing of a test split is in a training or validation split.

- bits per byte: `wikitext` (WikiText-2), `dolly` (200 instructions), `gsm8k` (1,319 questions)
- ROUGE-L: `e2e` (630 meanings)
- accuracy of a trained head: `mr` (sentiment), `subj` (subjectivity), `banking77` (3,080 of 77 intents)
- accuracy without training: `piqa` (1,838), `winogrande` (1,267), `boolq` (3,270)
- exact match, and how long answers are: `answers` (100 of GSM8K and 100 of Dolly)
"""

from tasks.answers import Answers
from tasks.base import Example, Task
from tasks.choice import BoolQ, Piqa, Winogrande
from tasks.classification import MR, Banking77, Subj
from tasks.e2e import E2E
from tasks.language import GSM8K, Dolly, WikiText

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (WikiText, Dolly, GSM8K, E2E, MR, Subj, Banking77, Piqa, Winogrande, BoolQ, Answers)
}

__all__ = ["TASKS", "Example", "Task"]
