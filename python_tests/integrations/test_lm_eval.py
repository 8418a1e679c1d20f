"""lm-eval's tasks run at a chosen budget, through its Python interface and its command line."""

import functools
import json
import math
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import prunepath
from prunepath.checkpoint.description import describe, description_of
from prunepath.errors import PrunePathError

pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'prunepath[eval]')")
adapter = pytest.importorskip("prunepath.integrations.lm_eval")

DOCUMENTS = [{"question": f"{i} birds and {i} more are", "choices": [f" {2 * i}", f" {3 * i}"]} for i in range(1, 9)]
TASK = """\
task: prunepath_birds
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, make_sparse):
    """A tiny random sparse model of one token a byte."""
    vocabulary = {token: i for i, token in enumerate(["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<end>", eos_token="<end>")
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=257, max_position_embeddings=128, initializer_range=0.2, **sizes))
    model = make_sparse(model.eval(), expert_width=8)
    description = description_of(model)
    description.budgets = {0.25: [0.3, 0.3]}
    describe(model, description)
    path = tmp_path_factory.mktemp("lm_eval") / "sparse"
    prunepath.save(model, tokenizer, path)
    return path


@pytest.fixture(autouse=True)
def _no_index_of_built_in_tasks(monkeypatch):
    """Reading lm-eval's thousands of task files takes most of a test's time."""
    manager = functools.partialmethod(adapter.TaskManager.__init__, include_defaults=False)
    monkeypatch.setattr(adapter.TaskManager, "__init__", manager)


@pytest.fixture
def task(tmp_path, monkeypatch):
    """The path of a task of 8 questions, whose data set is a local file."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "birds.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    path = tmp_path / "birds.yaml"
    path.write_text(TASK.format(data=data))
    return path


def score(model, tokenizer, text):
    """ln p of the last bytes of (context, continuation), by the model itself."""
    context, continuation = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in text)
    with torch.no_grad():
        logits = model(torch.tensor([context + continuation])).logits[0].log_softmax(-1)
    return sum(logits[len(context) + i - 1, token].item() for i, token in enumerate(continuation))


def test_a_row_a_budget_has_the_scores_and_the_active_fraction_of_the_model_at_that_budget(checkpoint, task):
    model, tokenizer = prunepath.load(checkpoint)
    prunepath.set_threshold(model, [0.5, 0.25])
    rows = adapter.evaluate(
        model, tokenizer, [str(task)], budgets=[1.0, 0.25], bootstrap_iters=0, log_samples=False, batch_size=1
    )
    assert prunepath.get_thresholds(model) == [0.5, 0.25]
    assert [row["budget"] for row in rows] == [1.0, 0.25]
    assert rows[0]["active_fraction"] == 1.0
    assert 0.125 <= rows[1]["active_fraction"] < 0.6
    for row in rows:
        prunepath.set_threshold(model, row["thresholds"])
        right = 0
        with prunepath.record_counts(model) as counts:
            for document in DOCUMENTS:
                scores = [score(model, tokenizer, (document["question"], choice)) for choice in document["choices"]]
                right += scores[0] >= scores[1]
        assert row["results"]["prunepath_birds"]["acc,none"] == pytest.approx(right / len(DOCUMENTS))
        # lm-eval leaves the last token of each sequence out.
        assert row["active_fraction"] == pytest.approx(counts.active_fraction, rel=0.1)


def test_thresholds_are_rows_too_and_generation_is_counted(checkpoint, task):
    model, tokenizer = prunepath.load(checkpoint)
    text = task.read_text()
    text = text.replace("multiple_choice", "generate_until").replace('doc_to_choice: "{{choices}}"\n', "")
    text = text.replace("doc_to_target: 0", 'doc_to_target: "{{choices[0]}}"').replace("acc", "exact_match")
    task.write_text(text + "generation_kwargs:\n  max_gen_toks: 4\n  until: []\n")
    rows = adapter.evaluate(model, tokenizer, [str(task)], thresholds=[1e-6], limit=2, bootstrap_iters=0)
    assert (rows[0]["budget"], rows[0]["threshold"]) == (None, 1e-6)
    assert rows[0]["active_fraction"] == pytest.approx(1 / 8)
    assert "exact_match,none" in rows[0]["results"]["prunepath_birds"]


def test_the_model_starts_without_counts_and_refuses_what_has_no_knob(checkpoint):
    model, tokenizer = prunepath.load(checkpoint)
    assert math.isnan(adapter.PrunePathLM(model, tokenizer=tokenizer).active_fraction)
    with pytest.raises(PrunePathError, match="got both"):
        adapter.PrunePathLM(model, tokenizer=tokenizer, budget=0.5, threshold=0.5)
    with pytest.raises(PrunePathError, match="either budgets or thresholds"):
        adapter.evaluate(model, tokenizer, ["any"])
    dense = LlamaForCausalLM(
        LlamaConfig(vocab_size=257, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(PrunePathError, match="dense LlamaForCausalLM"):
        adapter.PrunePathLM(dense, tokenizer=tokenizer, budget=0.5)


def run_command_line(monkeypatch, tmp_path, *options):
    """What lm-eval's command line writes of the model."""
    monkeypatch.setattr(sys, "argv", ["lm_eval", *map(str, options), "--output_path", str(tmp_path / "results")])
    adapter.main()
    (file,) = (tmp_path / "results").rglob("results_*.json")
    return json.loads(file.read_text())


def test_the_command_line_is_lm_evals_with_a_budget(checkpoint, task, tmp_path, monkeypatch):
    options = ("--model", "prunepath", "--model_args", f"pretrained={checkpoint},budget=0.25", "--tasks", task)
    found = run_command_line(monkeypatch, tmp_path, *options, "--device", "cpu", "--limit", "4")["config"]
    assert found["budget"] == 0.25
    assert 0.125 <= found["active_fraction"] < 0.6


def test_a_model_spread_over_devices_scores_as_a_whole_one(checkpoint, task, tmp_path, monkeypatch):
    results = []
    for name, extra in (("whole", ""), ("spread", f",parallelize=True,max_cpu_memory=80KB,offload_folder={tmp_path}")):
        options = ("--model", "prunepath", "--model_args", f"pretrained={checkpoint},budget=0.25{extra}")
        found = run_command_line(monkeypatch, tmp_path / name, *options, "--tasks", task, "--device", "cpu")
        results.append((found["results"]["prunepath_birds"]["acc,none"], found["config"]["active_fraction"]))
    assert results[0] == results[1]


def test_the_command_line_says_in_one_sentence_what_is_wrong(checkpoint, task, monkeypatch):
    arguments = ["--model", "prunepath", "--tasks", str(task), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments, "--model_args", f"pretrained={checkpoint},budget=7"])
    with pytest.raises(SystemExit, match=r"^Error: budget must be a number in \(0, 1\], got 7\.$"):
        adapter.main()
