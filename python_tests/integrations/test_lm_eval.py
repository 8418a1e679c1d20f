"""lm-eval's tasks run at a chosen budget, through its Python interface and its command line."""

import json
import math
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import prunepath
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
def checkpoint(tmp_path_factory):
    """A tiny random sparse model of one token a byte."""
    vocabulary = {token: i for i, token in enumerate(["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<end>", eos_token="<end>")
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=257, max_position_embeddings=128, initializer_range=0.2, **sizes))
    config = prunepath.PrunePathConfig(
        num_experts=8, sequence_length=32, partition_tokens=256, router_tokens=512, calibration_tokens=256
    )
    texts = [f"{i} birds of a feather and {i * i} others.\n" for i in range(60)]
    path = tmp_path_factory.mktemp("lm_eval") / "sparse"
    prunepath.save(prunepath.convert(model, tokenizer, texts, config), tokenizer, path)
    return path


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


def test_the_command_line_is_lm_evals_with_a_budget(checkpoint, task, tmp_path):
    command = [sys.executable, "-m", "prunepath.integrations.lm_eval", "--model", "prunepath", "--tasks", str(task)]
    command += ["--model_args", f"pretrained={checkpoint},budget=0.25", "--device", "cpu", "--limit", "4"]
    command += ["--output_path", str(tmp_path / "results")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "prunepath_birds" in result.stdout
    (file,) = (tmp_path / "results").rglob("results_*.json")
    found = json.loads(file.read_text())["config"]
    assert found["budget"] == 0.25
    assert 0.125 <= found["active_fraction"] < 0.6


def test_the_command_line_says_in_one_sentence_what_is_wrong(checkpoint, task, monkeypatch):
    arguments = ["--model", "prunepath", "--tasks", str(task), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments, "--model_args", f"pretrained={checkpoint},budget=7"])
    with pytest.raises(SystemExit, match=r"^Error: budget must be a number in \(0, 1\], got 7\.$"):
        adapter.main()
