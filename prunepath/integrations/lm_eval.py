"""Any task of lm-evaluation-harness at any budget (pip install 'prunepath[eval]').

    python -m prunepath.integrations.lm_eval --model prunepath --model_args pretrained=OUT,budget=0.25 --tasks …

is lm-eval's own command line with the model `prunepath` added: `hf` with `budget` or `threshold` among its arguments.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from prunepath.budgets import get_thresholds, set_budget, set_threshold
from prunepath.errors import PrunePathError
from prunepath.nn import is_sparse, sparse_ffns
from prunepath.nn.observers import CountRecord, observing_counts, padding_masks

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    missing = f"Expected lm-evaluation-harness, but it is not installed whole ({error}): pip install 'prunepath[eval]'."
    if __name__ == "__main__":
        sys.exit(f"Error: {missing}")
    raise PrunePathError(missing) from error


@register_model("prunepath")
class PrunePathLM(HFLM):
    """A sparse model at one budget or threshold, for lm-eval.

    Args:
        pretrained: a sparse checkpoint's folder or hub name, or a sparse model.
        budget: active fraction to aim for, in (0, 1]; or
        threshold: probability mass to cover in every FFN, in (0, 1]. Without either, the checkpoint's own thresholds.
        options: as lm-eval's `HFLM` takes them.

    Raises:
        PrunePathError: for a dense model, both knobs at once, or one out of range.
    """

    def __init__(
        self, pretrained: Any, budget: float | None = None, threshold: float | None = None, **options: Any
    ) -> None:
        if budget is not None and threshold is not None:
            raise PrunePathError("Expected budget or threshold, got both.")
        super().__init__(pretrained, **options)
        if not is_sparse(self.model):
            raise PrunePathError(f"Expected a sparse checkpoint, got a dense {type(self.model).__name__}: convert it.")
        if budget is not None:
            set_budget(self.model, budget)
        if threshold is not None:
            set_threshold(self.model, threshold)
        self._knob = {"budget": budget, "threshold": threshold}
        self._record = CountRecord(sparse_ffns(self.model).values())

    @property
    def active_fraction(self) -> float:
        """The share of FFN neurons computed so far; NaN before the first token.

        lm-eval pads the sequences of a batch and does not tell the model: padding counts where `batch_size` is above 1.
        """
        return self._record.active_fraction

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into the results of the model: also the knob, and the active fraction obtained."""
        return super().get_model_info() | self._knob | {"active_fraction": self.active_fraction}

    @contextlib.contextmanager
    def _counting(self) -> Iterator[None]:
        with padding_masks(self.model), observing_counts(sparse_ffns(self.model).values(), self._record.add):
            yield

    def _model_call(self, *args: Any, **kwargs: Any) -> Any:
        with self._counting():
            return super()._model_call(*args, **kwargs)

    def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
        with self._counting():
            return super()._model_generate(*args, **kwargs)


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Any],
    *,
    budgets: Sequence[float] | None = None,
    thresholds: Sequence[float] | None = None,
    batch_size: int = 1,
    **options: Any,
) -> list[dict[str, Any]]:
    """Runs lm-eval's tasks at several budgets or thresholds.

    Args:
        model: a sparse model; afterwards it has its thresholds from before again.
        tokenizer: its tokenizer.
        tasks: as `lm_eval.simple_evaluate` takes them: names, paths of YAML files, dicts, tasks.
        budgets: active fractions to aim for, or else
        thresholds: thresholds for all layers alike. Exactly one of the two.
        batch_size: sequences of one forward pass; above 1, active fractions count lm-eval's padding too.
        options: more arguments of `lm_eval.simple_evaluate`, such as `limit`, `num_fewshot` or `task_manager`.

    Returns:
        One dict a point: `budget`, `threshold` (one of them None), `thresholds` (one an FFN), `active_fraction`, and
        `results`: for each task and group of tasks lm-eval's metrics.

    Raises:
        PrunePathError: for a dense model, a knob out of range, or not exactly one knob.
    """
    if (budgets is None) == (thresholds is None):
        raise PrunePathError("Expected either budgets or thresholds.")
    before = get_thresholds(model)
    knob = "budget" if thresholds is None else "threshold"
    rows = []
    if options.get("task_manager") is None:
        options["task_manager"] = TaskManager(metadata=options.get("metadata"))  # it reads thousands of files
    try:
        for value in budgets if thresholds is None else thresholds:
            lm = PrunePathLM(model, tokenizer=tokenizer, batch_size=batch_size, **{knob: value})
            results = simple_evaluate(lm, tasks=list(tasks), **options)
            rows.append(
                lm._knob
                | {
                    "thresholds": get_thresholds(model),
                    "active_fraction": lm.active_fraction,
                    "results": results["results"],
                }
            )
    finally:
        set_threshold(model, before)
    return rows


def main() -> None:
    """lm-eval's command line."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except PrunePathError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
