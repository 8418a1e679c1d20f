"""The decoding benchmark's models do the work that its tables say they do."""

import sys
from pathlib import Path

import pytest
import torch

import prunepath

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
if not (BENCHMARKS / "decode.py").is_file():
    pytest.skip("needs the benchmarks folder of the source tree", allow_module_level=True)
sys.path.append(str(BENCHMARKS))  # where the benchmarks import each other from; prunepath itself is not there

import decode  # noqa: E402

SPARSITY = prunepath.PrunePathConfig(expert_width=16, router_rank=8)
SPEC = {
    "device": "cpu",
    "model": "tiny",
    "layers": 2,
    "dtype": "float32",
    "threads": 1,
    "prompt": 20,
    "tokens": 30,
    "seed": 0,
    "sparsity": None,
    "setting": "eager",
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    sizes = {"hidden_size": 64, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    monkeypatch.setitem(decode.MODELS, "tiny", {**decode.QWEN, "vocab_size": 300, **sizes})
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_the_sparse_model_has_the_dense_models_weights():
    expected = decode.Worker(SPEC).run(keep_logits=True)[1]
    sparse = decode.Worker({**SPEC, "sparsity": SPARSITY})
    spent, logits = sparse.run(keep_logits=True)
    assert spent > 0
    assert logits.shape == (30, 300)
    assert (logits - expected).norm() < 1e-5 * expected.norm()
    sparse.activate(0.25)
    assert (sparse.run(keep_logits=True)[1] - expected).norm() > 1e-3 * expected.norm()


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 1.0])
def test_the_active_fraction_is_the_one_asked_for_and_varies_from_token_to_token(fraction):
    sparse = decode.Worker({**SPEC, "sparsity": SPARSITY})
    found = sparse.activate(fraction)
    assert abs(found["active"] - fraction) < 0.01
    router, ffn = 8 * 64 + 32 * 8 + 32, 3 * 64 * 512
    assert found["read"] == pytest.approx(found["active"] + router / ffn)
    if fraction < 1:
        assert found["least"] < found["active"] < found["most"]
    with prunepath.record_counts(sparse.model) as record:
        sparse.run()
    tokens = sum(histogram.sum().item() for histogram in record.histogram) / 2
    assert tokens == SPEC["prompt"] + SPEC["tokens"] - 1, "the timed run feeds the prompt and every token but the last"


def test_prepacked_linears_compute_the_same():
    expected = decode.Worker({**SPEC, "dtype": "bfloat16"}).run(keep_logits=True)[1]
    try:
        packed = decode.Worker({**SPEC, "dtype": "bfloat16", "setting": "prepacked", "sparsity": SPARSITY})
    except (AttributeError, RuntimeError) as error:
        pytest.skip(f"oneDNN packs no bfloat16 here: {error}")
    linears = [module for module in packed.model.modules() if isinstance(module, decode.PrepackedLinear)]
    assert len(linears) == 2 * 4 + 1, "attention and the head, and no projection of a sparse FFN"
    assert (packed.run(keep_logits=True)[1] - expected).norm() < 3e-2 * expected.norm()
