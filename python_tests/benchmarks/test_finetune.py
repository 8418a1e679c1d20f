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


def test_a_teacher_with_shared_weights_is_the_original(monkeypatch):
    peft = pytest.importorskip("peft")
    import argparse

    import torch

    monkeypatch.setitem(finetune.MODELS, "tiny", TINY)
    args = argparse.Namespace(model="tiny", layers=None, dtype="float32", device="cpu")
    model, teacher = (finetune.prepare(args, sparse=False) for _ in range(2))
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.zero_()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    finetune.share(adapted.get_base_model(), teacher)
    ids = torch.arange(12)[None]
    with adapted.disable_adapter():
        torch.testing.assert_close(teacher(ids).logits, adapted(ids).logits)
    assert not torch.equal(teacher(ids).logits, adapted(ids).logits)
