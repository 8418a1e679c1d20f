"""Expert offloading on a GPU: the model's output without it, within the memory it was given, as simulated."""

import gc
import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

import prunepath
from prunepath.memory.offload import expert_bytes, offload_experts, simulate
from prunepath.checkpoint.packing import pack

pytestmark = pytest.mark.gpu

SIZES = {
    "vocab_size": 97,
    "hidden_size": 256,
    "intermediate_size": 16 * 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
KINDS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "biased": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, mlp_bias=True)),
    "fused": lambda: Phi3ForCausalLM(Phi3Config(**SIZES)),
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    torch.manual_seed(0)
    texts = [torch.randint(2, 97, (200,)) for _ in range(24)]
    config = prunepath.PrunePathConfig(
        num_experts=16,
        sequence_length=64,
        partition_tokens=256,
        router_tokens=1024,
        calibration_tokens=512,
        center=True,
    )
    model = prunepath.convert(KINDS[request.param]().eval(), None, texts, config)
    prunepath.set_budget(model, 0.3)
    path = tmp_path_factory.mktemp("offload") / request.param
    prunepath.save(model, None, path)
    return path


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def text(length):
    return torch.randint(2, 97, (1, length), generator=torch.Generator().manual_seed(4)).cuda()


def decode(model, ids):
    cache, logits = None, []
    for token in ids[0]:
        output = model(token[None, None], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits[0, -1])
    return torch.stack(logits)


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def size_of(model):
    return expert_bytes(next(iter(prunepath.sparse_ffns(model).values())))


@pytest.mark.parametrize("slots", [16, 24, 64])
@pytest.mark.parametrize("prefetch", [True, False])
@torch.inference_mode()
def test_the_output_is_that_without_offloading(folder, slots, prefetch):
    ids = text(64)
    plain = load(folder).cuda()
    with prunepath.record_counts(plain) as before:
        expected, prompt = decode(plain, ids), plain(text(150)).logits
    greedy = plain.generate(ids[:, :8], max_new_tokens=32, do_sample=False)
    del plain
    model = load(folder)
    for ffn in prunepath.sparse_ffns(model).values():
        ffn.pack()
    cache = offload_experts(model, slots * size_of(model), "cuda", prefetch=prefetch)
    cache.calls = []
    assert cache.slots == slots
    with prunepath.record_counts(model) as after:
        assert relative_error(decode(model, ids), expected) < 1e-4
        assert relative_error(model(text(150)).logits, prompt) < 1e-4
    assert [a.tolist() for a in after.histogram] == [b.tolist() for b in before.histogram]
    assert torch.equal(model.generate(ids[:, :8], max_new_tokens=32, do_sample=False), greedy)
    assert cache.statistics.misses > 0
    assert slots < 64 or cache.statistics.hits > 0
    assert (cache.statistics.prefetched > 0) == prefetch
    assert simulate(cache.calls, slots, cache.statistics.moved_bytes // sum_moved(cache)) == cache.statistics


def sum_moved(cache):
    return cache.statistics.misses + cache.statistics.prefetched


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_half_precision_agrees_too(folder, dtype):
    ids = text(32)
    expected = decode(load(folder, dtype).cuda(), ids)
    model = load(folder, dtype)
    offload_experts(model, 20 * size_of(model), "cuda")
    assert relative_error(decode(model, ids), expected) < 1e-1  # rounding may turn a choice of experts


def allocated():
    """Bytes of the GPU that something still uses, models in reference cycles left out; the peak begins there anew."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


@torch.inference_mode()
def test_the_experts_take_no_more_of_the_gpu_than_they_were_given(folder):
    before = allocated()
    plain = load(folder).cuda()
    everything = allocated() - before
    del plain
    model = load(folder)
    size = size_of(model)
    experts = sum(ffn.num_experts for ffn in prunepath.sparse_ffns(model).values()) * size
    limit = 18 * size
    assert everything > experts > limit
    before = allocated()
    offload_experts(model, limit, "cuda")
    assert torch.cuda.max_memory_allocated() - before <= everything - experts + limit + (1 << 20)
    for ffn in prunepath.sparse_ffns(model).values():
        weight = ffn.projection(ffn.layout.down).weight
        assert weight.device.type == "cpu" and weight.is_pinned()


@torch.inference_mode()
def test_busy_streams_do_not_mix_experts_up(folder):
    """Copies that come late, and computation that comes late, must not be overtaken."""
    ids = text(24)
    expected = decode(load(folder).cuda(), ids)
    model = load(folder)
    cache = offload_experts(model, 16 * size_of(model), "cuda")
    for delayed in (None, cache._stream):

        def slow(ffn, x, delayed=delayed):
            with torch.cuda.stream(delayed or torch.cuda.current_stream()):
                torch.cuda._sleep(2_000_000)

        for ffn in prunepath.sparse_ffns(model).values():
            ffn.observe_input = slow
        assert relative_error(decode(model, ids), expected) < 1e-4


@torch.inference_mode()
def test_a_packed_checkpoint_can_be_offloaded(folder, tmp_path):
    ids = text(24)
    expected = decode(load(folder).cuda(), ids)
    pack(folder, tmp_path / "packed")
    model = load(tmp_path / "packed")
    offload_experts(model, 20 * size_of(model), "cuda")
    assert relative_error(decode(model, ids), expected) < 1e-4
    model.cuda()  # as a whole: offloading ends
    assert all(ffn.run is None for ffn in prunepath.sparse_ffns(model).values())
    assert relative_error(decode(model, ids), expected) < 1e-4


def test_the_command_line_says_what_the_cache_did(tmp_path):
    from prunepath.demo.run import model_folder

    with model_folder() as path:
        dense, tokenizer = prunepath.load(path)
    config = prunepath.PrunePathConfig(
        num_experts=32, partition="weights", router_tokens=2048, partition_tokens=512, calibration_tokens=1024
    )
    lines = ["def main():\n    print('hello', 'world')\n" * 40 for _ in range(60)]
    prunepath.save(prunepath.convert(dense, tokenizer, lines, config), tokenizer, tmp_path / "sparse")
    command = [sys.executable, "-m", "prunepath.cli", "generate", tmp_path / "sparse", "def main(", "--budget", "0.25"]
    command += ["--max-new-tokens", "16", "--dtype", "float32", "--json"]
    plain = json.loads(subprocess.run([*command, "--device", "cuda"], capture_output=True, check=True).stdout)
    offloaded = json.loads(subprocess.run([*command, "--gpu-experts", "4MB"], capture_output=True, check=True).stdout)
    assert offloaded["text"] == plain["text"]
    found = offloaded["gpu_experts"]
    assert found["slots"] > 0 and found["hit_rate"] > 0 and found["hits"] > 0 and found["moved_bytes"] > 0
