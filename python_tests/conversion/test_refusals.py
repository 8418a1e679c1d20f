"""What cannot be converted is one sentence, before anything is touched."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

import prunepath
from prunepath.conversion.checks import quantization_of


@pytest.fixture
def refused(token_texts, small_config):
    """Checks that a model is refused with a sentence, and left as it was: (model, match, texts=, **config)."""

    def check(model, match, texts=None, **config):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items() if not tensor.is_meta}
        modules = [type(module) for module in model.modules()]
        with pytest.raises(prunepath.PrunePathError, match=match) as raised:
            prunepath.convert(model, None, texts or token_texts, dataclasses.replace(small_config, **config))
        assert str(raised.value).count("\n") == 0
        assert [type(module) for module in model.modules()] == modules
        state = model.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in before.items())

    return check


def test_experts_that_do_not_divide_the_width(llama, refused):
    refused(llama, r"num_experts to divide the intermediate size 64, got 7; nearest valid: 4 and 8", num_experts=7)
    refused(llama, r"expert_width to divide the intermediate size 64, got 9; nearest valid: 8 and 16", expert_width=9)


def test_a_model_without_known_ffns(refused):
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(n_layer=1, hidden_size=8, n_head=1, vocab_size=97))
    refused(model, r"LlamaMLP.*OPTDecoderLayer.*BloomForCausalLM")


def test_a_sparse_model(make_sparse, refused):
    refused(make_sparse("llama"), "Expected a dense model")


class Quantised(nn.Linear):
    """Stands for a package's module, whose weight need not look like one of ours."""


@pytest.mark.parametrize(
    ("package", "name"),
    [("bitsandbytes.nn.modules", "bitsandbytes"), ("optimum.quanto.nn", "quanto"), ("torchao.quantization", "torchao")],
)
def test_modules_of_quantising_packages(llama, refused, package, name, monkeypatch):
    monkeypatch.setattr(Quantised, "__module__", package)
    llama.model.layers[1].mlp.up_proj.__class__ = Quantised
    refused(llama, f"quantised by {name}: load it unquantised")
    llama.model.layers[1].mlp.up_proj.__class__ = nn.Linear
    llama.model.layers[0].self_attn.q_proj.__class__ = Quantised  # the FFNs alone are plain
    refused(llama, f"quantised by {name}: load it unquantised")


def test_weights_that_are_quantised_tensors(llama, refused, monkeypatch):
    class Tensor(torch.Tensor):
        __module__ = "torchao.dtypes"

    projection = llama.model.layers[0].mlp.gate_proj
    projection.weight = nn.Parameter(projection.weight.data.as_subclass(Tensor), requires_grad=False)
    assert quantization_of(llama) == "torchao"


@pytest.mark.parametrize("declared", [{"quant_method": "gptq", "bits": 4}, "object"])
def test_a_configuration_that_declares_quantisation(llama, refused, declared):
    if declared == "object":
        from transformers import BitsAndBytesConfig

        declared = BitsAndBytesConfig(load_in_8bit=True)
    llama.config.quantization_config = declared
    refused(llama, "quantised by (gptq|bitsandbytes): load it unquantised")


def test_a_dense_model_made_from_a_sparse_ones_configuration_converts(
    make_sparse, make_model, token_texts, small_config
):
    dense = make_model("llama")
    dense.config.quantization_config = make_sparse("llama").config.quantization_config
    assert prunepath.is_sparse(prunepath.convert(dense, None, token_texts, small_config))


def test_offloaded_weights(llama, refused, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(llama, torch.device("cpu"))
    refused(llama, r"weights are all in memory, but .* is not: it is offloaded")


def test_weights_that_were_never_loaded(refused, make_model):
    refused(make_model("llama").to("meta"), "weights are all in memory")


def test_weights_made_in_inference_mode(refused, make_model):
    with torch.inference_mode():
        model = copy.deepcopy(make_model("llama"))
    refused(model, "made outside torch.inference_mode")


def test_another_dtype(refused, make_model):
    refused(make_model("llama").double(), r"float32, bfloat16 or float16, got torch.float64 at model.layers.0.mlp")


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_adapters_on_ffns(make_model, refused, family):
    peft = pytest.importorskip("peft")
    targets = ["down_proj"] if family == "llama" else ["fc1"]
    adapted = peft.get_peft_model(make_model(family), peft.LoraConfig(target_modules=targets))
    refused(adapted, r"without adapters, got a Linear at .*(down_proj|fc1): call merge_and_unload\(\)")
    merged = adapted.merge_and_unload()
    assert not any(hasattr(module, "base_layer") for module in merged.modules())


@pytest.mark.parametrize(("low", "high"), [(2, 200), (-3, 50)])
def test_token_ids_beyond_the_embedding_table(llama, refused, low, high):
    texts = [torch.randint(low, high, (150,)) for _ in range(24)]
    refused(llama, r"token ids from 0 to 96, the rows of the model's embedding table, got input_ids from", texts=texts)


def test_batches_with_labels_beyond_a_decoders_table(refused):
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(**sizes, pad_token_id=0, decoder_start_token_id=0))
    ids = torch.randint(2, 97, (4, 32))
    refused(model, "got decoder_input_ids", texts=[{"input_ids": ids, "labels": ids + 97}] * 2)


def test_data_that_is_too_short(llama, refused):
    refused(llama, "at least 64 tokens, got 63", texts=[torch.ones(63, dtype=torch.long)])


def test_calibrating_a_dense_model(llama, token_texts):
    with pytest.raises(prunepath.PrunePathError, match="converted by prunepath, got a dense LlamaForCausalLM"):
        prunepath.calibrate(llama, None, token_texts)
    with pytest.raises(prunepath.PrunePathError, match="converted by prunepath, got a dense LlamaForCausalLM"):
        prunepath.set_budget(llama, 0.5)
