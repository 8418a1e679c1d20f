"""Checkpoints saved and loaded: the same model, an ordinary one to all other tools, or one clear sentence."""

import copy
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import prunepath
from prunepath.checkpoint.packing import pack


@pytest.fixture(params=["llama", "llama_mlp_bias", "qwen3", "opt"])
def sparse(request, make_calibrated):
    return make_calibrated(request.param, expert_width=4)


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
    assert all(ffn.has_row_tables() for ffn in prunepath.sparse_ffns(loaded).values())
    assert torch.equal(loaded(ids).logits, expected)
    prunepath.set_budget(loaded, 0.8)
    prunepath.set_budget(sparse, 0.8)
    assert torch.equal(loaded(ids).logits, sparse(ids).logits)


@torch.no_grad()
def test_a_loaded_model_saves_again_with_the_thresholds_of_that_moment(sparse, ids, tmp_path):
    sparse.save_pretrained(tmp_path / "first")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    prunepath.set_budget(loaded, 0.7)
    loaded.save_pretrained(tmp_path / "second")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    assert prunepath.get_thresholds(again) == prunepath.get_thresholds(loaded) != prunepath.get_thresholds(sparse)
    assert torch.equal(again(ids).logits, loaded(ids).logits)


def test_models_of_one_configuration_do_not_describe_each_other(make_sparse, tmp_path):
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    first, second, dense = (LlamaForCausalLM(config) for _ in range(3))
    make_sparse(first)
    make_sparse(second)
    prunepath.set_threshold(first, 0.25)
    prunepath.set_threshold(second, 0.75)
    assert first.model.config is first.config
    dense.save_pretrained(tmp_path / "dense")
    assert not prunepath.is_sparse(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"))
    for model, threshold in ((first, 0.25), (second, 0.75)):
        model.save_pretrained(tmp_path / "sparse")
        assert prunepath.get_thresholds(AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")) == [threshold]


@torch.no_grad()
def test_a_loaded_model_casts_as_a_dense_one(folder, ids):
    model = AutoModelForCausalLM.from_pretrained(folder)
    prunepath.set_threshold(model, 1.0)
    expected = model(ids).logits
    assert not model.is_quantized
    casts = {
        torch.float16: lambda: model.half(),
        torch.float32: lambda: model.float(),
        torch.bfloat16: lambda: model.to(torch.bfloat16),
        torch.float64: lambda: model.to(device="cpu", dtype=torch.float64),
    }
    for dtype, cast in casts.items():
        assert cast() is model
        assert {p.dtype for p in model.parameters()} == {dtype}
        logits = model(ids).logits
        assert logits.dtype == dtype
        assert (logits - expected).norm() / expected.norm() < 0.05


def test_a_loaded_model_trains_as_a_dense_one(folder, ids, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = model.model.layers[0].mlp.down_proj.weight.detach().clone()
    data = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(tmp_path / "out", max_steps=2, report_to=[], use_cpu=True, save_strategy="no")
    Trainer(model, arguments, train_dataset=data).train()
    assert not torch.equal(model.model.layers[0].mlp.down_proj.weight, before)
    model.save_pretrained(tmp_path / "trained")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert prunepath.is_sparse(again)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)


@torch.no_grad()
def test_a_checkpoint_that_was_saved_while_routers_trained_is_the_same_model(folder, ids, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    prunepath.set_threshold(model, 0.5)
    expected = model(ids).logits
    prunepath.for_training(model).save_pretrained(tmp_path / "training")
    router = "model.layers.0.mlp.router.w_out"
    assert load_file(tmp_path / "training" / "model.safetensors")[router].dtype == torch.float32
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "training")
    assert all(ffn.router.is_packed for ffn in prunepath.sparse_ffns(again).values())
    assert torch.equal(again(ids).logits, expected)
    pack(tmp_path / "training", tmp_path / "packed")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "packed")(ids).logits, expected)


@torch.no_grad()
def test_peft_works_on_a_loaded_model(folder, ids, tmp_path):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = model(ids).logits
    config = peft.LoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"], r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    changed = adapted(ids).logits
    assert not torch.allclose(changed, expected)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (again(ids).logits - changed).norm() / changed.norm() < 1e-5


@pytest.mark.parametrize("dense", ["llama", "opt"], indirect=True)
def test_without_prunepath_the_checkpoint_is_the_dense_model(dense, make_sparse, ids, tmp_path):
    with torch.no_grad():
        expected = dense(ids).logits
    sparse = make_sparse(dense)
    prunepath.set_threshold(sparse, 0.25)
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


def test_a_format_version_from_the_future_is_refused(folder):
    edit_config(folder, format_version=99)
    with pytest.raises(prunepath.CheckpointError, match=r"format version 3, got 99: upgrade prunepath"):
        prunepath.load(folder)
    with pytest.raises(prunepath.CheckpointError, match="got 99"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"thresholds": [0.5]}, "2 FFNs, got 1"),
        ({"thresholds": [0.5, -1.0]}, "-1.0"),
        ({"thresholds": [0.5, 10**400]}, r"threshold must be a number in \(0, 1\]"),
        ({"thresholds": [0.5, None]}, "got None"),
        ({"budgets": {"0.5": [0.5, 7.0]}}, "7.0"),
        ({"budgets": {"1e999": [0.5, 0.5]}}, "budget"),
        ({"budgets": [0.5]}, "wrong kind"),
        ({"config": {"num_experts": 0}}, "num_experts"),
        ({"config": {"expert_width": 10**400}}, "divide the intermediate size 64"),
        ({"config": {"expert_width": "4"}}, "expert_width"),
        ({"config": []}, "wrong kind"),
        ({"format_version": "3"}, "format version 3, got 3: convert it anew"),
        ({"format_version": 10**400}, "upgrade"),
        ({"format_version": True}, "format version"),
        ({"format_version": None}, "format version"),
        ({"ffns": ["layers.0.mlp", "layers.9.mlp"]}, r"layers\.9"),
        ({"ffns": None}, "wrong kind"),
        ({"calibration": 3}, "wrong kind"),
    ],
)
def test_a_tampered_description_is_refused(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(prunepath.PrunePathError, match=message):
        prunepath.load(folder)
    with pytest.raises(prunepath.PrunePathError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("missing", ["config", "ffns", "thresholds", "budgets", "calibration"])
def test_a_description_without_one_of_its_entries_is_refused(folder, missing):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"][missing]
    path.write_text(json.dumps(config))
    with pytest.raises(prunepath.CheckpointError, match=f"it has no entry '{missing}'"):
        prunepath.load(folder)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "null", '{"quantization_config": "all"}', "[" * 100_000, '{"hidden_size": 1' + "0" * 5000 + "}"],
)
def test_a_config_that_is_none_is_refused(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(prunepath.CheckpointError, match=r"config\.json to be a model's configuration in JSON"):
        prunepath.load(folder)


def test_a_missing_or_misshapen_or_infinite_router_is_refused(folder):
    file = folder / "model.safetensors"
    good = load_file(file)
    for name, value, message in [
        ("w_out", None, r"layers\.1\.mlp\.router\.w_out, but it is missing"),
        ("w_out", lambda w: w[:-1].clone(), r"router\.w_out of shape \[128, 4\] .*, got \[127, 4\]"),
        ("bias", torch.Tensor.long, r"router\.bias .*got I64"),
        ("bias", lambda b: b * float("nan"), "finite numbers in model.layers.1.mlp.router.bias"),
    ]:
        name = f"model.layers.1.mlp.router.{name}"
        tensors = {k: v for k, v in good.items() if k != name}
        if value is not None:
            tensors[name] = value(good[name])
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(prunepath.CheckpointError, match=message):
            AutoModelForCausalLM.from_pretrained(folder)


def test_missing_and_quantised_backbone_weights_are_refused(folder):
    file = folder / "model.safetensors"
    good = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    for value in (None, good[name].to(torch.int8)):
        tensors = {k: v for k, v in good.items() if k != name} | ({} if value is None else {name: value})
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(prunepath.CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj\.weight"):
            prunepath.load(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, -1000, -1])
def test_a_truncated_checkpoint_is_refused(folder, keep):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    for load in (prunepath.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(prunepath.CheckpointError, match=r"model\.safetensors to be a whole safetensors file"):
            load(folder)


@pytest.mark.parametrize(
    "weight_map",
    [
        {"a": "../outside.safetensors"},
        {"a": "/etc/passwd"},
        {"a": ".."},
        {"a": "..\\outside.safetensors"},
        {"a": ""},
        {"a": None},
        {"a": ["model.safetensors"]},
        {"a": 10**400},
        ["model.safetensors"],
        None,
    ],
)
def test_shards_outside_the_folder_are_not_opened(folder, weight_map):
    shutil.copy(folder / "model.safetensors", folder.parent / "outside.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(prunepath.CheckpointError, match=r"index\.json to say in which shard each weight is"):
        prunepath.load(folder)


def test_a_folder_that_is_no_model_is_named(tmp_path):
    with pytest.raises(prunepath.PrunePathError, match="no folder"):
        prunepath.load(tmp_path / "nothing")
    with pytest.raises(prunepath.PrunePathError, match=r"config\.json"):
        prunepath.load(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(prunepath.PrunePathError, match=r"config\.json"):
        prunepath.load(tmp_path / "weights.bin")
    with pytest.raises(prunepath.PrunePathError, match="too long"):
        prunepath.load("a" * 5000)


def test_a_model_quantised_by_a_missing_package_is_one_sentence(llama, tmp_path):
    llama.config.quantization_config = {"quant_method": "hqq", "quant_config": {}}
    llama.save_pretrained(tmp_path)
    with pytest.raises(prunepath.PrunePathError) as error:
        prunepath.load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.fixture
def gguf_file(llama, tmp_path):
    """The tiny Llama as a GGUF file."""
    gguf = pytest.importorskip("gguf")
    config = llama.config
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(chr(33 + i) for i in range(94)), "!!", '!"', '"!'])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(["! !", '! "', '" !'])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    parts |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    parts |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    for layer in range(config.num_hidden_layers):
        names |= {f"model.layers.{layer}.{name}": f"blk.{layer}.{part}" for name, part in parts.items()}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in llama.state_dict().items():
        owner = name.removesuffix(".weight")
        if (count := heads.get(owner.rpartition(".")[2])) is not None:  # GGUF interleaves the halves that rotate
            tensor = tensor.reshape(count, 2, config.head_dim // 2, -1).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"{names[owner]}.weight", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "model.gguf"


@torch.no_grad()
def test_a_gguf_file_loads_as_the_dense_model(llama, gguf_file, ids, make_sparse, tmp_path):
    model, tokenizer = prunepath.load(gguf_file)
    assert tokenizer.vocab_size == 97
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight.float(), llama.model.layers[0].mlp.down_proj.weight)
    expected = llama(ids).logits
    assert (model(ids).logits - expected).norm() / expected.norm() < 1e-5
    make_sparse(model).save_pretrained(tmp_path / "sparse")
    assert prunepath.is_sparse(AutoModelForCausalLM.from_pretrained(tmp_path / "sparse"))


def test_a_gguf_file_that_cannot_be_read_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for path in (tmp_path / "model.gguf", tmp_path / "none.gguf"):
        with pytest.raises(prunepath.PrunePathError) as error:
            prunepath.load(path)
        assert "\n" not in str(error.value)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(prunepath.PrunePathError, match="pip install gguf"):
        prunepath.load(tmp_path / "model.gguf")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_place_is_refused(llama, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(prunepath.PrunePathError, match="can be written"):
        prunepath.save(llama, None, tmp_path / "out")
