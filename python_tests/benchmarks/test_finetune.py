"""The fine-tuning benchmark: a dense and a sparse model of one shape, trained side by side."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
if not (BENCHMARKS / "finetune.py").is_file():
    pytest.skip("needs the source tree's benchmarks", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import finetune  # noqa: E402

TINY = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.mark.parametrize("options", [(), ("--lora-rank", "2", "--passes", "2", "--gradient-checkpointing")])
def test_both_train(options, tmp_path, monkeypatch):
    monkeypatch.setitem(finetune.MODELS, "tiny", TINY)
    out = tmp_path / "rows.json"
    sizes = ["--windows", "2", "--length", "16", "--steps", "4", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--device", "cpu", "--model", "tiny", *sizes, *options])
    finetune.main()
    rows = json.loads(out.read_text())["rows"]
    assert [row["kind"] for row in rows] == ["dense, distilled", "any budget"]
    assert all(row["tokens_per_second"] > 0 for row in rows)
