import copy
import json
import os
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import prunepath


@pytest.fixture
def sparse(dense, token_texts, small_config):
    model = prunepath.convert(dense, None, token_texts, small_config)
    prunepath.set_budget(model, 0.4)
    return model


@pytest.fixture
def folder(llama, token_texts, small_config, tmp_path):
    model = prunepath.convert(llama, None, token_texts, small_config)
    prunepath.set_budget(model, 0.4)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(changes)
    path.write_text(json.dumps(config))


@torch.no_grad()
def test_save_and_load_keep_the_sparse_model(sparse, ids, tmp_path):
    expected = sparse(ids).logits
    prunepath.save(sparse, None, tmp_path / "model")
    assert torch.equal(sparse(ids).logits, expected), "saving must leave the model as it was"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(loaded) is type(sparse)
    assert prunepath.get_thresholds(loaded) == prunepath.get_thresholds(sparse)
    assert torch.equal(loaded(ids).logits, expected)
    prunepath.set_budget(loaded, 0.8)
    prunepath.set_budget(sparse, 0.8)
    assert torch.equal(loaded(ids).logits, sparse(ids).logits)


@torch.no_grad()
def test_a_loaded_model_saves_again(sparse, ids, tmp_path):
    sparse.save_pretrained(tmp_path / "first")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    prunepath.set_budget(loaded, 0.7)
    loaded.save_pretrained(tmp_path / "second")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    assert prunepath.get_thresholds(again) == prunepath.get_thresholds(loaded)
    assert torch.equal(again(ids).logits, loaded(ids).logits)


@torch.no_grad()
def test_the_headless_model_loads_sparse(sparse, ids, tmp_path):
    sparse.save_pretrained(tmp_path)
    headless = AutoModel.from_pretrained(tmp_path)
    assert prunepath.is_sparse(headless)
    assert torch.equal(headless(ids).last_hidden_state, sparse.base_model(ids).last_hidden_state)


@pytest.mark.parametrize("dense", ["llama", "opt"], indirect=True)
def test_without_prunepath_the_checkpoint_is_the_dense_model(dense, token_texts, small_config, ids, tmp_path):
    with torch.no_grad():
        expected = dense(ids).logits
    sparse = prunepath.convert(dense, None, token_texts, small_config)
    prunepath.set_budget(sparse, 0.25)
    sparse.save_pretrained(tmp_path / "model")
    torch.save(ids, tmp_path / "ids")
    script = (
        "import sys, torch, transformers\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'model')!r})\n"
        f"torch.save(model(torch.load({str(tmp_path / 'ids')!r})).logits, {str(tmp_path / 'logits')!r})\n"
        "assert 'prunepath' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    actual = torch.load(tmp_path / "logits")
    assert (actual - expected).norm() / expected.norm() < 1e-6


@torch.no_grad()
def test_copies_casts_and_training_mode_keep_the_model_usable(sparse, ids, tmp_path):
    expected = sparse(ids).logits
    twin = copy.deepcopy(sparse)
    assert torch.equal(twin(ids).logits, expected)
    half = copy.deepcopy(sparse).to(torch.bfloat16)
    assert prunepath.get_thresholds(half) == prunepath.get_thresholds(sparse)
    prunepath.set_budget(half, 1.0)  # rounding may change which experts run, and then the output, at lower budgets
    prunepath.set_budget(twin, 1.0)
    full = twin(ids).logits
    assert (half(ids).logits - full).norm() / full.norm() < 0.05
    prunepath.set_threshold(twin, prunepath.get_thresholds(sparse))
    twin.train()
    twin.save_pretrained(tmp_path / "training")
    torch.save(sparse, tmp_path / "pickle")
    thawed = torch.load(tmp_path / "pickle", weights_only=False)
    assert torch.equal(thawed(ids).logits, expected)
    thawed.save_pretrained(tmp_path / "thawed")
    for name in ("training", "thawed"):
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / name)(ids).logits, expected)


def test_weights_exist_once(sparse):
    """Packed weights and parameters share their storage, so that a sparse model is as large as a dense one."""
    sparse.eval()
    for ffn in prunepath.sparse_ffns(sparse).values():
        assert ffn.pack()
        linears = [ffn.projection(name) for name in ffn.layout.projections]
        storages = {linear.weight.untyped_storage().data_ptr() for linear in linears}
        assert storages == {t.untyped_storage().data_ptr() for t in (ffn._packed.w_in, ffn._packed.w_out)}


def test_an_output_folder_with_something_in_it_is_refused(llama, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(prunepath.PrunePathError, match=r"out has files in it"):
        prunepath.save(llama, None, tmp_path / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "notes.txt"]


def test_a_failed_save_leaves_nothing(llama, tmp_path, monkeypatch):
    def fails_half_way(folder):
        (folder / "half").write_text("half")
        raise OSError("No space left on device")

    monkeypatch.setattr(llama, "save_pretrained", fails_half_way)
    with pytest.raises(prunepath.PrunePathError, match="No space left"):
        prunepath.save(llama, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_saved_folders_have_ordinary_permissions(llama, tmp_path):
    prunepath.save(llama, None, tmp_path / "out")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_format_version_from_the_future_is_refused(folder):
    edit_config(folder, format_version=99)
    with pytest.raises(prunepath.CheckpointError, match=r"format version 99.*upgrade prunepath"):
        prunepath.load(folder)
    with pytest.raises(prunepath.CheckpointError, match="format version 99"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"thresholds": [0.5]}, "2 FFNs, got 1"),
        ({"thresholds": [0.5, -1.0]}, "-1.0"),
        ({"budgets": {"0.5": [0.5, 7.0]}}, "7.0"),
        ({"config": {"num_experts": 0}}, "num_experts"),
        ({"format_version": "1"}, "format_version"),
        ({"ffns": ["model.layers.0.mlp", "model.layers.9.mlp"]}, "layers.9"),
        ({"ffns": None}, "wrong kind"),
    ],
)
def test_a_tampered_description_is_refused(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(prunepath.CheckpointError, match=message):
        prunepath.load(folder)


def test_a_missing_or_misshapen_or_infinite_router_is_refused(folder):
    file = folder / "model.safetensors"
    good = load_file(file)
    name = "model.layers.1.mlp.router.weight"
    for value, message in [
        (None, f"{name} of shape .*missing"),
        (good[name][:-1].clone(), rf"{name} of shape \[8, 32\], got \[7, 32\]"),
        (torch.full_like(good[name], float("nan")), "finite numbers in model.layers.1.mlp.router.weight"),
    ]:
        tensors = {k: v for k, v in good.items() if k != name}
        if value is not None:
            tensors[name] = value
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(prunepath.CheckpointError, match=message):
            AutoModelForCausalLM.from_pretrained(folder)


def test_a_missing_backbone_weight_is_refused(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(prunepath.CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj\.weight"):
        prunepath.load(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, -1000, -1])
def test_a_truncated_checkpoint_is_refused(folder, keep):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    with pytest.raises(prunepath.CheckpointError, match=r"model"):
        prunepath.load(folder)


def test_a_header_that_points_outside_the_file_is_refused(folder):
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[:8] = struct.pack("<Q", 1 << 60)
    file.write_bytes(bytes(data))
    with pytest.raises(prunepath.CheckpointError):
        prunepath.load(folder)


def test_a_folder_that_is_no_model_is_named(tmp_path):
    with pytest.raises(prunepath.PrunePathError, match="no folder"):
        prunepath.load(tmp_path / "nothing")
    with pytest.raises(prunepath.PrunePathError, match=r"config\.json"):
        prunepath.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(prunepath.CheckpointError, match="JSON"):
        prunepath.load(tmp_path)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_place_is_refused(llama, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(prunepath.PrunePathError, match="can be written"):
        prunepath.save(llama, None, tmp_path / "out")
