"""The quality benchmark: tasks without leaks, one harness for all methods, cells that are not computed twice."""

import argparse
import json
import lzma
import math
import os
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
if not (BENCHMARKS / "quality.py").is_file():
    pytest.skip("the benchmarks are not here", allow_module_level=True)
sys.path.append(str(BENCHMARKS))  # where the benchmarks import each other from; prunepath itself is not there

import quality  # noqa: E402
from tasks import HUB_TASKS, TASKS, build_task  # noqa: E402
from tasks.base import SPLITS, package_texts  # noqa: E402
from tasks.functions import Functions, functions  # noqa: E402
from tasks.models import _corrupted, fuse_norms, new_model  # noqa: E402

from prunepath.families import find_ffns  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer():
    return quality.load_tokenizer()


@pytest.fixture(scope="module")
def tiny(tokenizer):
    return {name: build_task(name, tokenizer, size="tiny") for name in TASKS}


@pytest.mark.parametrize("name", TASKS)
def test_splits_share_no_example(tiny, name):
    rows = {
        split: {tuple(row) for row in examples["input_ids"].tolist()} for split, examples in tiny[name].splits.items()
    }
    assert all(rows.values())
    assert not rows["train"] & rows["test"]
    assert not rows["train"] & rows["validation"]
    assert not rows["validation"] & rows["test"]


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_the_same_each_time(tiny, tokenizer, name):
    assert build_task(name, tokenizer, size="tiny").fingerprint() == tiny[name].fingerprint()


@pytest.mark.parametrize("name", TASKS)
def test_inputs_give_the_logits_of_the_whole_batch(tiny, tokenizer, name):
    task = tiny[name]
    end = tokenizer.eos_token_id
    model = new_model(task.family, len(tokenizer), end, labels=len(task.labels), tiny=task.family != "llama").eval()
    batch = task.batch("test", slice(2))
    with torch.no_grad():
        assert torch.equal(model(**task.inputs(batch)).logits, model(**batch).logits)


def test_bytes_are_those_of_the_scored_labels(tiny, tokenizer):
    for name in ("lm-llama", "instruct"):
        task = tiny[name]
        batch = task.batch("test", slice(None))
        scored = task.scored_positions(batch["labels"])
        for row, mask, size in zip(batch["labels"], scored, task.sizes, strict=True):
            ids = row[1:][mask[:-1]]
            text = tokenizer.decode(ids[ids != tokenizer.eos_token_id], clean_up_tokenization_spaces=False)
            ends = int((ids == tokenizer.eos_token_id).sum())
            counted = len(text.encode()) + (ends if name == "instruct" else ends * len("<|endoftext|>"))
            assert counted == pytest.approx(size, abs=2)  # a window may cut a character


def test_a_blank_hides_the_call(tiny, tokenizer):
    task = tiny["nlu"]
    for row, label in zip(task.splits["test"]["input_ids"], task.splits["test"]["labels"].tolist(), strict=True):
        text = tokenizer.decode(row.long())
        assert "____(" in text
        assert 0 <= label < len(task.labels)


def test_functions_come_without_their_docstring():
    source = '''
class A:
    def area(self, w):
        """Return the area.  And more."""
        if w < 0:
            raise ValueError("negative")
        return w * w
'''
    ((code, summary, raised),) = functions(source)
    assert summary == "Return the area."
    assert raised == ["ValueError"]
    assert code.startswith("def area(self, w):\n    if w < 0:") and "Return" not in code


def test_functions_nearly_as_in_an_earlier_split_are_left_out():
    def source(prefix):
        return "def f(x):\n    " + "\n    ".join(f"{prefix}{i} = x + {i} * y{i}" for i in range(20)) + "\n"

    found = Functions()
    assert len(found.of([source("a")])) == 1
    assert len(found.of([source("a").replace("a3 ", "b3 ")])) == 0
    assert len(found.of([source("b")])) == 1


def test_packages_are_split_by_folders():
    texts = {split: set(package_texts(split)) for split in SPLITS}
    assert min(len(each) for each in texts.values()) > 10
    assert not texts["test"] & (texts["train"] | texts["validation"]) - {""}


def test_a_corrupted_span_can_be_put_back():
    stream = torch.arange(1000, 1400, dtype=torch.int16)
    batch = next(_corrupted(stream, 40, 3, vocab_size=4096))
    for inputs, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        restored = []
        for token in inputs:
            if token >= 4096:
                at = labels.index(token)
                restored += labels[at + 1 : at + 5]
            else:
                restored.append(token)
        assert restored == list(range(restored[0], restored[0] + 40))


@pytest.mark.parametrize("family", ["llama", "opt", "bert", "t5"])
def test_small_models_have_equal_ffns(family):
    torch.manual_seed(0)
    model = new_model(family, 4096, 0, labels=16)
    assert {site.intermediate_size for site in find_ffns(model)} == {1024}
    assert 5e6 < sum(parameter.numel() for parameter in model.parameters()) < 12e6


def hub_rows(name: str, split: str, count: int) -> list[dict]:
    """Rows as the hub's data set has them, with what its task does not read."""
    hidden = name.startswith("glue") and split == "test"
    makers = {
        "glue-sst2": lambda text, i: {"sentence": text},
        "glue-mrpc": lambda text, i: {"sentence1": text, "sentence2": f"again {i}"},
        "glue-qnli": lambda text, i: {"question": text, "sentence": f"so {i}"},
        "squad": lambda text, i: {
            **{"id": f"{i}", "title": "t", "question": f"Which {i}?", "context": text},
            "answers": {"text": [f"the {i}", "x"], "answer_start": [0, 4]},
        },
        "xsum": lambda text, i: {"document": text, "summary": f"It is {i}.", "id": f"{i}"},
    }
    rows = [makers[name](f"{split} text {i} of {name}", i) for i in range(count)]
    if name.startswith("glue"):
        rows = [{**row, "label": -1 if hidden else i % 2, "idx": i} for i, row in enumerate(rows)]
    return rows


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The data sets' names, in the current folder: `datasets` looks there first."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed (pip install 'prunepath[data]')")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    for name in HUB_TASKS:
        dataset, _, config = name.partition("-")
        splits = ("train", "validation") if name == "squad" else SPLITS
        lines = [f"- config_name: {config or 'default'}", "  data_files:"]
        for split in splits:
            path = Path(config or "data", f"{split}.parquet")
            rows = datasets.Dataset.from_list(hub_rows(name, split, 80 if split == "train" else 30))
            if config:
                rows = rows.cast_column("label", datasets.ClassLabel(names=["no", "yes"]))
            Path(dataset, path).parent.mkdir(parents=True, exist_ok=True)
            rows.to_parquet(Path(dataset, path))
            lines += [f"  - split: {split}", f"    path: {path}"]
        readme = Path(dataset, "README.md")
        before = readme.read_text().removesuffix("---\n") if readme.exists() else "---\nconfigs:\n"
        readme.write_text(before + "\n".join(lines) + "\n---\n")


@pytest.mark.parametrize("name", HUB_TASKS)
def test_tasks_of_the_hub(hub, tokenizer, tmp_path, name):
    args = settings(tmp_path, tasks=[name], methods=["dense"])
    quality.prepare_data(args)
    task = quality.load_task(tmp_path, name, "cpu")
    rows = {split: tokenizer.decode(rows["input_ids"][3].long()) for split, rows in task.splits.items()}
    # The answers of GLUE's and SQuAD's test splits are not public.
    source = dict(zip(SPLITS, SPLITS if name == "xsum" else ("train", "train", "validation"), strict=True))
    assert all(f"{source[split]} text" in text for split, text in rows.items())
    first = {"glue-mrpc": "sentence1", "glue-qnli": "question"}.get(name)
    if first:
        pair = hub_rows(name, "validation", 4)[3]
        assert f"{pair[first]}\n{pair['sentence2' if name == 'glue-mrpc' else 'sentence']}" in rows["test"]
    if task.metric == "accuracy":
        assert task.labels == ("0", "1") and task.splits["test"]["labels"].tolist()[:4] == [0, 1, 0, 1]
    elif name == "squad":
        row = task.splits["test"]
        scored = row["labels"][3] != -100
        assert tokenizer.decode(row["input_ids"][3][scored].long()) == "the 3" + tokenizer.eos_token
        assert task.sizes[3] == len("the 3") + 1
    else:
        assert task.references[3] == "It is 3."
    quality.make_dense(args, name)
    quality.run_cell(args, name, "dense", 0)
    assert quality.cell_path(args, name, "dense", 0).exists()


def settings(out: Path, **changes) -> argparse.Namespace:
    values = dict(
        stage="cells",
        out=out,
        size="tiny",
        device="cpu",
        jobs=1,
        tasks=["nlu"],
        methods=["dense", "prunepath", "static-flap"],
    )
    values |= dict(seeds=[0], steps=3, batch_size=8, expert_width=4, router_rank=8, time_limit=None)
    return argparse.Namespace(**(values | changes))


def test_cells_hold_every_budget_and_are_computed_once(tmp_path):
    args = settings(tmp_path, tasks=["lm-opt", "nlu"])
    quality.prepare_data(args)
    args.tasks = ["nlu"]
    quality.run_jobs(args)
    assert quality.all_jobs(args) == []
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    quality.run_jobs(args)
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    data = json.loads(lzma.decompress((tmp_path / "cells.json.xz").read_bytes()))
    assert {cell["method"] for cell in data["cells"]} == set(args.methods)
    for cell in data["cells"]:
        wanted = {"dense": {1.0}, "prunepath": {1.0, *quality.BUDGETS}}.get(cell["method"], set(quality.BUDGETS))
        for finetuned in (False, True):
            assert {r["budget"] for r in cell["results"] if r["finetuned"] == finetuned} == wanted
        for result in cell["results"]:
            assert len(result["nll"]) == len(result["correct"]) == data["tasks"]["nlu"]["examples"]["test"]
            assert result["active_fraction"] == pytest.approx(result["budget"], abs=0.05)


def test_jobs_come_in_the_order_in_which_a_time_limit_leaves_most(tmp_path):
    args = settings(tmp_path, tasks=["lm-opt", "nlu"], methods=["random", "lte", "dense", "prunepath"], seeds=[0, 1])
    jobs = [str(job) for job in quality.all_jobs(args)]
    assert jobs == [
        *("dense nlu", "dense lm-opt"),
        *("nlu dense seed 0", "lm-opt dense seed 0", "nlu prunepath seed 0", "lm-opt prunepath seed 0"),
        *("nlu lte seed 0", "lm-opt lte seed 0", "nlu random seed 0", "lm-opt random seed 0"),
        *("nlu dense seed 1", "lm-opt dense seed 1", "nlu prunepath seed 1", "lm-opt prunepath seed 1"),
        *("nlu lte seed 1", "lm-opt lte seed 1"),
        *("nlu random seed 1", "lm-opt random seed 1"),
    ]


def test_a_cell_that_would_not_end_in_time_does_not_begin(tmp_path, capsys):
    args = settings(tmp_path, methods=["dense"], seeds=[0, 1], time_limit=100.0)
    quality.prepare_data(args)
    quality.write_whole(quality.cell_path(args, "nlu", "dense", 0), b'{"seconds": 1000.0}')
    quality.make_dense(args, "nlu")
    quality.run_jobs(args)
    assert not quality.cell_path(args, "nlu", "dense", 1).exists()
    assert "not finished: nlu dense seed 1" in capsys.readouterr().out


def test_fused_norms_are_those_of_the_models(monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    norms = [kind(32) for kind in (LlamaRMSNorm, T5LayerNorm)]
    x = 3.0 * torch.randn(4, 5, 32)
    for norm in norms:
        torch.nn.init.normal_(norm.weight)
    before = [norm(x) for norm in norms]
    for kind in (LlamaRMSNorm, T5LayerNorm):
        monkeypatch.setattr(kind, "forward", kind.forward)  # puts it back after the test
    fuse_norms()
    for norm, wanted in zip(norms, before, strict=True):
        torch.testing.assert_close(norm(x), wanted)


@pytest.mark.parametrize("best,tried", [(2e-4, 3), (1e-4, 3), (5e-5, 4), (8e-4, 5), (1e-6, 5), (1.0, 7)])
def test_the_search_for_a_learning_rate_goes_on_until_the_best_has_neighbours(best, tried):
    losses = {}
    while (rate := quality.next_rate(losses)) is not None:
        assert rate not in losses
        losses[rate] = abs(math.log(rate / best))
        losses = json.loads(json.dumps({f"{r:g}": loss for r, loss in losses.items()}))  # as it is kept
        losses = {float(r): loss for r, loss in losses.items()}
    assert len(losses) == tried
    low, high = quality.RATE_LIMITS
    assert min(losses, key=losses.get) == pytest.approx(min(max(best, low), high))


def test_nothing_runs_on_after_the_time_limit(tmp_path):
    args = settings(tmp_path, time_limit=0.0)
    quality.prepare_data(args)
    quality.run_jobs(args)
    assert not (tmp_path / "dense").exists() and not (tmp_path / "cells").exists()


class _Breaking(quality.Job):
    """A job that fails as its method says."""

    def run(self, args):
        if self.method == "error":
            raise ValueError("no")
        if self.method == "exit":
            os._exit(3)


def test_a_failed_job_leaves_the_worker_to_the_next(tmp_path):
    worker = quality.Worker(settings(tmp_path), None)
    errors = []
    for method in ("error", "exit", "fine"):
        worker.begin(_Breaking("nlu", method))
        errors.append(worker.finish())
    worker.stop()
    assert errors == ["ValueError: no", "the process ended with exit code 3", None]
