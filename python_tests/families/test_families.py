"""Every supported family, as tiny random models of transformers' own classes: dense at threshold 1, saved, loaded,
trained, generating."""

import copy
import json
import subprocess
import sys

import pytest
import torch
import transformers
from transformers.trainer_utils import set_seed

import prunepath
from prunepath.checkpoint.packing import pack
from prunepath.families import find_ffns

VOCABULARY = 97
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
GEMMA = {**GROUPED, "head_dim": 8}
OPT = {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.2}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "initializer_factor": 1.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
# name: (configuration class, its arguments, model class, auto class, sparse FFNs)
FAMILIES = {
    "llama": ("LlamaConfig", GROUPED, "LlamaForCausalLM", "AutoModelForCausalLM", 2),
    "mistral": ("MistralConfig", GROUPED, "MistralForCausalLM", "AutoModelForCausalLM", 2),
    "qwen2": ("Qwen2Config", GROUPED, "Qwen2ForCausalLM", "AutoModelForCausalLM", 2),
    "qwen3": ("Qwen3Config", GEMMA, "Qwen3ForCausalLM", "AutoModelForCausalLM", 2),
    "gemma": ("GemmaConfig", GEMMA, "GemmaForCausalLM", "AutoModelForCausalLM", 2),
    "gemma2": ("Gemma2Config", GEMMA, "Gemma2ForCausalLM", "AutoModelForCausalLM", 2),
    "gemma3": ("Gemma3TextConfig", GEMMA, "Gemma3ForCausalLM", "AutoModelForCausalLM", 2),
    "phi3": ("Phi3Config", GROUPED, "Phi3ForCausalLM", "AutoModelForCausalLM", 2),
    "opt": ("OPTConfig", {**SMALL, **OPT}, "OPTForCausalLM", "AutoModelForCausalLM", 2),
    "gpt2": ("GPT2Config", {**SMALL, "n_inner": 64}, "GPT2LMHeadModel", "AutoModelForCausalLM", 2),
    "gpt_neox": ("GPTNeoXConfig", SMALL, "GPTNeoXForCausalLM", "AutoModelForCausalLM", 2),
    "bert": ("BertConfig", SMALL, "BertModel", "AutoModel", 2),
    "bert_mlm": ("BertConfig", SMALL, "BertForMaskedLM", "AutoModelForMaskedLM", 2),
    "bert_tanh": ("BertConfig", {**SMALL, "hidden_act": "gelu_fast"}, "BertModel", "AutoModel", 2),
    "roberta": ("RobertaConfig", SMALL, "RobertaModel", "AutoModel", 2),
    "roberta_classifier": (
        "RobertaConfig",
        {**SMALL, "num_labels": 3},
        "RobertaForSequenceClassification",
        "AutoModelForSequenceClassification",
        2,
    ),
    "t5": ("T5Config", T5, "T5ForConditionalGeneration", "AutoModelForSeq2SeqLM", 4),
    "flan_t5": (
        "T5Config",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        "T5ForConditionalGeneration",
        "AutoModelForSeq2SeqLM",
        4,
    ),
    "t5_encoder": ("T5Config", T5, "T5EncoderModel", "T5EncoderModel", 2),
}
GENERATING = [
    name for name, family in FAMILIES.items() if family[3] in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
]


def make_dense(name):
    set_seed(0)
    config_class, arguments, model_class, _, _ = FAMILIES[name]
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**arguments)).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def inputs(model, length, seed=0):
    ids = torch.randint(2, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(seed))
    if model.config.is_encoder_decoder:
        return {"input_ids": ids, "decoder_input_ids": ids.flip(0)}
    return {"input_ids": ids}


def output(model, length=12):
    result = model(**inputs(model, length))
    return result[0]  # logits, or the last hidden state of a headless model


def loss(model, seed=0):
    batch = inputs(model, 16, seed)
    labels = batch["input_ids"]
    if "SequenceClassification" in type(model).__name__:
        labels = torch.tensor([0, 2])
    elif model.get_output_embeddings() is None:
        return model(**batch)[0].square().mean()
    batch.pop("decoder_input_ids", None)
    return model(**batch, labels=labels).loss


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def make_sparse(make_sparse):
    """A sparse copy of a dense model, with routers that at threshold 1 must not matter."""
    return lambda dense, **config: make_sparse(copy.deepcopy(dense), **config)


@pytest.fixture(params=[{"router_rank": 8}, {"expert_width": 8}], ids=["n1-rank8", "n8-full-rank"])
def experts(request):
    return request.param


@torch.no_grad()
def test_dense_at_threshold_1_on_both_paths(family, make_sparse, experts):
    dense = make_dense(family)
    sparse = make_sparse(dense, **experts)
    ffns = prunepath.sparse_ffns(sparse)
    assert len(ffns) == FAMILIES[family][4]
    few, many = output(dense), output(dense, 100)
    with prunepath.record_counts(sparse) as record:
        assert relative_error(output(sparse), few) < 1e-6
    assert record.active_fraction == 1.0
    assert all(ffn.has_row_tables() for ffn in ffns.values()), "few tokens are served by the kernels"
    assert relative_error(output(sparse, 100), many) < 1e-6
    with torch.enable_grad():
        assert relative_error(output(sparse), few) < 1e-6


@torch.no_grad()
def test_converts(family, token_texts, small_config, tmp_path):
    dense = make_dense(family)
    sparse = prunepath.convert(copy.deepcopy(dense), None, token_texts, small_config)
    assert relative_error(output(sparse), output(dense)) < 1e-6
    assert relative_error(output(sparse, 100), output(dense, 100)) < 1e-6
    assert_same_weights(sparse, dense)
    prunepath.set_budget(sparse, 0.5)
    with prunepath.record_counts(sparse) as record:
        for seed in range(8):
            sparse(**inputs(sparse, 100, seed))
    assert abs(record.active_fraction - 0.5) < 0.07
    sparse.save_pretrained(tmp_path)
    loaded = getattr(transformers, FAMILIES[family][3]).from_pretrained(tmp_path)
    assert torch.equal(output(loaded), output(sparse))


def assert_same_weights(sparse, dense):
    """Every weight of the dense model, to the bit."""
    weights = dict(sparse.named_parameters(remove_duplicate=False))
    for name, parameter in dense.named_parameters(remove_duplicate=False):
        assert torch.equal(weights[name], parameter), name


def test_kernels_and_autograd_skip_the_same_experts(family, make_sparse, experts):
    sparse = make_sparse(make_dense(family), **experts)
    with torch.no_grad():
        dense = output(sparse)
        prunepath.set_threshold(sparse, 0.7)
        kernels = output(sparse)
    assert relative_error(kernels, dense) > 1e-3
    assert relative_error(output(sparse), kernels) < 1e-5


@torch.no_grad()
def test_weights_never_move_in_calls(family, make_sparse):
    dense = make_dense(family)
    sparse = make_sparse(dense)
    before = {name: (p.data_ptr(), p.stride(), p._version) for name, p in sparse.named_parameters()}
    prunepath.set_threshold(sparse, 0.5)
    output(sparse)
    output(sparse, 100)
    sparse.train()
    sparse.state_dict()
    sparse.eval()
    copy.deepcopy(sparse)
    assert {name: (p.data_ptr(), p.stride(), p._version) for name, p in sparse.named_parameters()} == before
    assert_same_weights(sparse, dense)
    prunepath.for_training(sparse)
    assert all(p.is_contiguous() for p in sparse.parameters())
    assert_same_weights(sparse, dense)
    prunepath.for_inference(sparse)
    assert all(ffn.has_row_tables() for ffn in prunepath.sparse_ffns(sparse).values())
    assert_same_weights(sparse, dense)


@torch.no_grad()
def test_saved_and_loaded_by_its_auto_class(family, make_sparse, tmp_path):
    sparse = make_sparse(make_dense(family))
    prunepath.set_threshold(sparse, 0.7)
    expected = output(sparse)
    prunepath.save(sparse, None, tmp_path / "model")
    auto = getattr(transformers, FAMILIES[family][3])
    loaded = auto.from_pretrained(tmp_path / "model")
    assert type(loaded) is type(sparse)
    assert prunepath.get_thresholds(loaded) == prunepath.get_thresholds(sparse)
    assert torch.equal(output(loaded), expected)


@torch.no_grad()
def test_without_prunepath_every_family_loads_dense(make_sparse, tmp_path):
    """One process loads all of them, because importing transformers takes its time."""
    expected = {}
    for name in FAMILIES:
        dense = make_dense(name)
        expected[name] = output(dense)
        sparse = make_sparse(dense)
        prunepath.set_threshold(sparse, 0.5)
        output(sparse)
        sparse.save_pretrained(tmp_path / name)
        torch.save(inputs(dense, 12), tmp_path / name / "inputs")
    autos = json.dumps({name: family[3] for name, family in FAMILIES.items()})
    script = (
        "import json, sys, torch, transformers\n"
        f"for name, auto in json.loads({autos!r}).items():\n"
        "    model = getattr(transformers, auto).from_pretrained(name)\n"
        "    with torch.no_grad():\n"
        "        torch.save(model(**torch.load(f'{name}/inputs'))[0], f'{name}/output')\n"
        "assert 'prunepath' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    for name, dense in expected.items():
        assert relative_error(torch.load(tmp_path / name / "output"), dense) < 1e-6, name


def test_trains(family, make_sparse):
    sparse = make_sparse(make_dense(family))
    prunepath.set_threshold(sparse, 0.8)
    sparse.train()
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.02)
    losses = []
    for _ in range(8):
        set_seed(1)  # the same dropout each time, so that the loss falls
        value = loss(sparse)
        losses.append(value.item())
        optimizer.zero_grad()
        value.backward()
        for path, ffn in prunepath.sparse_ffns(sparse).items():
            for name in ffn.layout.projections:
                gradient = ffn.projection(name).weight.grad
                assert gradient.isfinite().all() and gradient.abs().sum() > 0, (path, name)
        torch.nn.utils.clip_grad_norm_(sparse.parameters(), 1.0)
        optimizer.step()
    assert losses[-1] < losses[0]
    sparse.eval()
    with torch.no_grad():
        kernels = output(sparse)
    assert relative_error(output(sparse), kernels) < 1e-5


def test_dropout_in_training_is_the_dense_models(family, make_sparse):
    """At threshold 1 a training forward pass equals the dense model's with the same seed, dropout included."""
    dense = make_dense(family)
    sparse = make_sparse(dense)
    results = []
    for model in (dense, sparse):
        model.train()
        set_seed(3)
        results.append(output(model))
    assert relative_error(results[1], results[0]) < 1e-5
    with torch.no_grad():
        set_seed(3)
        assert relative_error(output(sparse), results[0]) < 1e-5
    if any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in dense.modules()):
        assert relative_error(output(dense.eval()), results[0]) > 1e-3


@pytest.mark.parametrize("family", GENERATING)
@torch.no_grad()
def test_generates(family, make_sparse):
    dense = make_dense(family)
    sparse = make_sparse(dense)
    ids = inputs(dense, 12)["input_ids"]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = dense.generate(ids, **options)
    assert torch.equal(sparse.generate(ids, **options), expected)
    prunepath.set_threshold(sparse, 0.5)
    with prunepath.record_counts(sparse) as record:
        assert sparse.generate(ids, **options).shape == expected.shape
    assert record.active_fraction < 1.0


@torch.no_grad()
def test_copies_and_casts_compute_the_same(family, make_sparse, tmp_path):
    sparse = make_sparse(make_dense(family))
    prunepath.set_threshold(sparse, 0.7)
    expected = output(sparse)
    torch.save(sparse, tmp_path / "pickle")
    for twin in (copy.deepcopy(sparse), torch.load(tmp_path / "pickle", weights_only=False)):
        assert torch.equal(output(twin), expected)
        for ffn in prunepath.sparse_ffns(twin).values():
            ffn.projection(ffn.layout.down).weight.zero_()  # its own weights, and no other model's
        assert relative_error(output(twin), expected) > 1e-3
        assert torch.equal(output(sparse), expected)
    prunepath.set_threshold(sparse, 1.0)
    expected = output(sparse)
    assert relative_error(output(sparse.to(torch.bfloat16)).float(), expected) < 0.1
    assert all(ffn.has_row_tables() for ffn in prunepath.sparse_ffns(sparse).values())


@pytest.mark.parametrize("family", ["phi3", "opt", "gpt2", "bert", "flan_t5"])
@torch.no_grad()
def test_compiles_as_one_graph(family, make_sparse):
    sparse = make_sparse(make_dense(family))
    prunepath.set_threshold(sparse, 0.7)
    expected = output(sparse)
    batch = inputs(sparse, 12)
    if family != "bert":
        batch["use_cache"] = False
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(**batch)[0], expected) < 1e-6
    prunepath.set_threshold(sparse, 0.4)
    with torch.compiler.set_stance("fail_on_recompile"):
        actual = compiled(**batch)[0]
    assert relative_error(actual, output(sparse)) < 1e-6
    assert relative_error(actual, expected) > 1e-3


@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
@torch.no_grad()
def test_generate_with_a_static_cache_compiles_without_graph_breaks(family, make_sparse):
    sparse = make_sparse(make_dense(family))
    ids = inputs(sparse, 12)["input_ids"]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = []
    for threshold in (0.7, 0.3):
        prunepath.set_threshold(sparse, threshold)
        expected.append(sparse.generate(ids, cache_implementation="static", **options))
    sparse.forward = torch.compile(sparse.forward, fullgraph=True, backend="aot_eager")
    for threshold, tokens, stance in zip((0.7, 0.3), expected, ("default", "fail_on_recompile"), strict=True):
        prunepath.set_threshold(sparse, threshold)
        with torch.compiler.set_stance(stance):
            assert torch.equal(sparse.generate(ids, cache_implementation="static", **options), tokens)


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("phi3", ["gate_up_proj", "down_proj"]),
        ("opt", ["fc1", "fc2"]),
        ("gpt2", ["c_fc", "c_proj"]),
        ("bert", ["intermediate.dense", "output.dense"]),
        ("flan_t5", ["wi_0", "wi_1", "wo"]),
    ],
)
def test_lora_layers_are_called_and_merge(family, targets, make_sparse):
    peft = pytest.importorskip("peft")
    sparse = make_sparse(make_dense(family))
    prunepath.set_threshold(sparse, 0.7)
    with torch.no_grad():
        before = output(sparse)
    set_seed(0)
    config = peft.LoraConfig(target_modules=targets, r=2, init_lora_weights=False, fan_in_fan_out=family == "gpt2")
    wrapped = peft.get_peft_model(sparse, config).eval()
    output(sparse).square().mean().backward()
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    assert all(parameter.grad.abs().sum() > 0 for parameter in trained)
    with torch.no_grad():
        adapted = output(sparse)
        assert relative_error(adapted, before) > 1e-3
        merged = wrapped.merge_and_unload()
        assert relative_error(output(merged), adapted) < 1e-5
    assert all(ffn.has_row_tables() for ffn in prunepath.sparse_ffns(merged).values())


@pytest.mark.parametrize("family", ["t5", "flan_t5"])
@torch.no_grad()
def test_t5_in_half_precision_keeps_wo_in_float32(family, make_sparse, tmp_path):
    dense = make_dense(family)
    sparse = make_sparse(dense)
    dense.save_pretrained(tmp_path / "dense")
    sparse.save_pretrained(tmp_path / "sparse")
    auto = getattr(transformers, FAMILIES[family][3])
    dense = auto.from_pretrained(tmp_path / "dense", dtype=torch.float16)
    sparse = auto.from_pretrained(tmp_path / "sparse", dtype=torch.float16)
    ffn = next(iter(prunepath.sparse_ffns(sparse).values()))
    assert ffn.projection(ffn.layout.up).weight.dtype == torch.float16
    assert ffn.projection(ffn.layout.down).weight.dtype == torch.float32
    expected, actual = output(dense), output(sparse)
    assert actual.dtype == expected.dtype
    assert relative_error(actual.float(), expected.float()) < 1e-3


@pytest.fixture(scope="module")
def gemma3_with_vision():
    set_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config={**GEMMA, "model_type": "gemma3_text"},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    return transformers.Gemma3ForConditionalGeneration(config).eval()


def test_vision_towers_are_left_alone(gemma3_with_vision):
    paths = [site.path for site in find_ffns(gemma3_with_vision)]
    assert len(paths) == 2 and all("language_model" in path for path in paths)
    assert any("vision" in name and name.endswith("fc1") for name, _ in gemma3_with_vision.named_modules())


def test_mixtures_of_experts_are_refused():
    config = transformers.MixtralConfig(**GROUPED, num_local_experts=4)
    model = transformers.MixtralForCausalLM(config)
    with pytest.raises(
        prunepath.PrunePathError, match="MixtralForCausalLM, whose FFNs are mixtures of experts already"
    ):
        find_ffns(model)


def test_an_activation_without_a_kernel_is_refused():
    model = transformers.BertModel(transformers.BertConfig(**{**SMALL, "hidden_act": "quick_gelu"}))
    with pytest.raises(prunepath.PrunePathError, match="got QuickGELUActivation"):
        find_ffns(model)


def test_a_class_of_a_known_name_and_another_shape_is_refused():
    class GPTNeoXMLP(torch.nn.Module):
        def __init__(self, up, down):
            super().__init__()
            self.dense_h_to_4h, self.dense_4h_to_h, self.act = up, down, torch.nn.GELU()

    linear = torch.nn.Linear
    with pytest.raises(prunepath.PrunePathError, match=r"lead from H to D and back, got .*\[64, 32\], \[16, 64\]"):
        find_ffns(torch.nn.Sequential(GPTNeoXMLP(linear(32, 64), linear(64, 16))))
    with pytest.raises(prunepath.PrunePathError, match="GPTNeoXMLP with the projections dense_h_to_4h, dense_4h_to_h"):
        find_ffns(torch.nn.Sequential(GPTNeoXMLP(linear(32, 64), None)))


@torch.no_grad()
def test_packed_checkpoints_are_the_same_model(family, make_sparse, tmp_path):
    sparse = make_sparse(make_dense(family))
    prunepath.save(sparse, None, tmp_path / "sparse")
    pack(tmp_path / "sparse", tmp_path / "packed")
    auto = getattr(transformers, FAMILIES[family][3])
    expected, packed = (auto.from_pretrained(tmp_path / name).eval() for name in ("sparse", "packed"))
    assert all(ffn.has_row_tables() for ffn in prunepath.sparse_ffns(packed).values())
    for threshold in (0.4, 1.0):
        prunepath.set_threshold(expected, threshold)
        prunepath.set_threshold(packed, threshold)
        assert torch.equal(output(packed), output(expected))
