"""E2E NLG: what is said of a restaurant, from its data. ROUGE-L and BLEU against several references."""

from __future__ import annotations

import csv
import io
import zipfile

from torch import nn

from tasks.base import Example, Task, continuations

NEW_TOKENS = 64
VALIDATION_MEANINGS = 200


class E2E(Task):
    """Meanings in a plain format, and a reference of each.

    `value` is the mean over meanings of the best reference's ROUGE-L F-measure for a greedily generated text
    (`rouge-score` without stemming); `bleu` that of the corpus, in [0, 100] (sacrebleu's defaults). `predictions` are
    the texts.
    """

    name = "e2e"
    metric = "rouge_l"

    def rows(self, split: str) -> list[tuple[str, str]]:
        """(meaning, reference), a meaning with several references several times."""
        name = {"train": "trainset", "validation": "devset", "test": "testset_w_refs"}[split]
        with zipfile.ZipFile(self.path("nlg/e2e-dataset.zip")) as archive:
            text = archive.read(f"e2e-dataset/{name}.csv").decode("utf-8-sig")
        return [(row["mr"], row["ref"]) for row in csv.DictReader(io.StringIO(text, newline=""))]

    def references(self) -> dict[str, list[str]]:
        """The references of each test meaning."""
        references: dict[str, list[str]] = {}
        for meaning, reference in self.rows("test"):
            references.setdefault(meaning, []).append(reference)
        return references

    def read(self, split: str) -> list[Example]:
        rows = self.rows(split)
        if split != "train":  # one example a meaning
            rows = list({meaning: (meaning, reference) for meaning, reference in reversed(rows)}.values())[::-1]
        if split == "validation":
            rows = rows[:VALIDATION_MEANINGS]
        prompts = self.encode([f"Data: {meaning}\nText:" for meaning, _ in rows])
        if split == "test":
            return [Example(prompt, len(prompt)) for prompt in prompts]
        texts = self.encode([f" {reference}" for _, reference in rows], special=False)
        return [
            Example([*prompt, *text, self.tokenizer.eos_token_id], len(prompt), len(reference.encode()))
            for prompt, text, (_, reference) in zip(prompts, texts, rows, strict=True)
        ]

    def evaluate(self, model: nn.Module, heads: nn.ModuleDict | None = None) -> dict:
        predictions = self.generate(model, [example.ids for example in self.test_examples])
        return score(predictions, list(self.references().values())[: self.limit])

    def generate(self, model: nn.Module, prompts: list[list[int]]) -> list[str]:
        """Greedy continuations of up to 64 tokens."""
        answers = continuations(model, prompts, NEW_TOKENS, self.tokenizer.eos_token_id)
        return [text.strip() for text in self.tokenizer.batch_decode(answers, skip_special_tokens=True)]


def score(predictions: list[str], references: list[list[str]]) -> dict:
    """What `E2E.evaluate` returns, of one prediction and several references a meaning."""
    # Only here, so that the other tasks run without the extra `bench`.
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    scores = [
        scorer.score_multi(texts, prediction)["rougeL"].fmeasure
        for prediction, texts in zip(predictions, references, strict=True)
    ]
    # sacrebleu takes first references, second references, …; None where there are fewer.
    most = max(map(len, references))
    columns = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
    bleu = sacrebleu.corpus_bleu(predictions, columns).score
    return {"value": sum(scores) / len(scores), "scores": scores, "bleu": bleu, "predictions": predictions}
