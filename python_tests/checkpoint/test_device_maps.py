"""Models that accelerate spreads over memory and disk load and compute as whole ones do."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import prunepath
from prunepath.checkpoint.packing import pack

pytest.importorskip("accelerate")

LAYERS = {f"model.layers.{layer}": where for layer, where in enumerate(("cpu", "disk"))}
MAPS = {
    "limit": {"device_map": "auto", "max_memory": {"cpu": "80KB"}},
    "one device": {"device_map": "cpu"},
    "a layer on disk": {
        "device_map": {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        | LAYERS
    },
    "all layers on disk": {
        "device_map": {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        | dict.fromkeys(LAYERS, "disk")
    },
}


@pytest.mark.parametrize("where", MAPS)
@torch.no_grad()
def test_an_offloaded_model_gives_the_whole_models_output(where, folder, ids, tmp_path):
    whole = AutoModelForCausalLM.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, offload_folder=tmp_path / "offload", **MAPS[where])
    on_disk = any(parameter.is_meta for parameter in model.parameters())
    assert on_disk == (where != "one device")
    assert prunepath.get_thresholds(model) == prunepath.get_thresholds(whole)
    for budget in (0.4, 0.8, 1.0):
        prunepath.set_budget(model, budget)
        prunepath.set_budget(whole, budget)
        expected = whole(ids).logits
        with prunepath.record_counts(model) as counts:
            actual = model(ids).logits
        assert (actual - expected).norm() / expected.norm() < 1e-6
        assert (counts.active_fraction < 1.0) == (budget < 1.0)
    prompt = ids[:, :4]
    assert torch.equal(
        model.generate(prompt, max_new_tokens=8, do_sample=False),
        whole.generate(prompt, max_new_tokens=8, do_sample=False),
    )
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(ids).logits, expected)


def test_a_packed_checkpoint_is_not_offloaded_to_disk(folder, ids, tmp_path):
    pack(folder, tmp_path / "packed")
    with pytest.raises(prunepath.CheckpointError, match="load the checkpoint that it was packed from"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "packed", offload_folder=tmp_path / "offload", **MAPS["a layer on disk"]
        )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", device_map="cpu")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, AutoModelForCausalLM.from_pretrained(folder)(ids).logits)
