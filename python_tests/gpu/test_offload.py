"""FFNs in the host's memory that a GPU computes: the whole model's output, within the memory it was given."""

import gc
import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

import prunepath
from prunepath.checkpoint.packing import pack
from prunepath.eval.decode import with_cache
from prunepath.memory.offload import offload_experts

pytestmark = pytest.mark.gpu

LAYERS, H, D = 4, 256, 1024
SIZES = {
    "vocab_size": 97,
    "hidden_size": H,
    "intermediate_size": D,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
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
FFN = 3 * H * D * 4  # bytes


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory, make_sparse):
    torch.manual_seed(0)
    model = make_sparse(KINDS[request.param]().eval(), router_rank=32)
    prunepath.set_threshold(model, 0.5)
    path = tmp_path_factory.mktemp("offload") / request.param
    prunepath.save(model, None, path)
    return path


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def text(length):
    return torch.randint(2, 97, (1, length), generator=torch.Generator().manual_seed(4)).cuda()


def decode(model, ids):
    cached, logits = with_cache(model), []
    for token in ids[0]:
        output = model(token[None, None], **cached)
        logits.append(output.logits[0, -1])
    return torch.stack(logits)


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def is_on_host(weight):
    """Whether what a GPU's tensor shows is pinned memory: no allocation of torch's on the GPU has its address."""
    begin = weight.untyped_storage().data_ptr()
    segments = torch.cuda.memory_snapshot()
    return not any(s["address"] <= begin < s["address"] + s["total_size"] for s in segments)


def down_projections(model):
    return [ffn.projection(ffn.layout.down).weight for ffn in prunepath.sparse_ffns(model).values()]


@pytest.mark.parametrize("kept", [0, 1, LAYERS])
@torch.inference_mode()
def test_the_output_is_that_without_offloading(folder, kept):
    ids = text(64)
    plain = load(folder).cuda()
    with prunepath.record_counts(plain) as before:
        expected, prompt = decode(plain, ids), plain(text(150)).logits
    greedy = plain.generate(ids[:, :8], max_new_tokens=32, do_sample=False)
    model = load(folder)
    offloading = offload_experts(model, kept * FFN + FFN // 2)
    assert (offloading.gpu_bytes, offloading.host_bytes) == (kept * FFN, (LAYERS - kept) * FFN)
    assert [is_on_host(weight) for weight in down_projections(model)] == [i >= kept for i in range(LAYERS)]
    with prunepath.record_counts(model) as after:
        assert relative_error(decode(model, ids), expected) < 1e-5
        assert relative_error(model(text(150)).logits, prompt) < 1e-4
    assert before.active_fraction < 0.9
    for a, b in zip(after.histogram, before.histogram, strict=True):
        assert (a - b).abs().sum() <= 4, "rounding of long products may turn a choice"
    assert torch.equal(model.generate(ids[:, :8], max_new_tokens=32, do_sample=False), greedy)
    prunepath.set_threshold(model, 1.0)
    prunepath.set_threshold(plain, 1.0)
    assert relative_error(model(ids).logits, plain(ids).logits) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_half_precision_gives_the_same(folder, dtype):
    ids = text(32)
    expected = decode(load(folder, dtype).cuda(), ids)
    model = load(folder, dtype)
    offload_experts(model, 0)
    assert torch.equal(decode(model, ids), expected)


def allocated():
    """Bytes of the GPU that something still uses, models in reference cycles left out; the peak begins there anew."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


@torch.inference_mode()
def test_the_ffns_take_no_more_of_the_gpu_than_they_were_given(folder):
    ids = text(150)
    before = allocated()
    plain = load(folder).cuda()
    everything = allocated() - before
    plain(ids)
    call = torch.cuda.max_memory_allocated() - before - everything
    del plain
    before = allocated()
    model = load(folder)
    offload_experts(model, FFN)
    assert torch.cuda.max_memory_allocated() - before <= everything - (LAYERS - 1) * FFN + (1 << 16)
    model(ids)
    assert torch.cuda.max_memory_allocated() - before <= everything - (LAYERS - 1) * FFN + call + FFN + (1 << 20)


@torch.inference_mode()
def test_it_is_captured_and_runs_on_any_stream_and_thread(folder):
    model = load(folder)
    offload_experts(model, FFN)
    (*_, ffn) = prunepath.sparse_ffns(model).values()
    x = torch.randn(4, H, device="cuda")
    expected = ffn(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other = ffn(x)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(other, expected)
    graph = torch.cuda.CUDAGraph()
    inputs = torch.zeros_like(x)
    try:
        with torch.cuda.graph(graph):
            outputs = ffn(inputs)
    except RuntimeError as error:
        if prunepath.ops.resolve_backend(x.device).name != "reference":
            raise
        pytest.skip(f"the reference cannot be captured: {error}")
    inputs.copy_(x)
    model.state_dict()
    graph.replay()
    assert torch.equal(outputs, expected)


@torch.inference_mode()
def test_moving_casting_copying_and_saving_give_ordinary_models(folder, tmp_path):
    ids = text(24)
    plain = load(folder).cuda()
    expected = decode(plain, ids)
    model = load(folder)
    offload_experts(model, 0)
    prunepath.save(model, None, tmp_path / "saved")
    assert torch.equal(decode(load(tmp_path / "saved").cuda(), ids), expected)
    for weight, original in zip(down_projections(model), down_projections(plain), strict=True):
        assert torch.equal(weight, original)
    model.to("cpu")
    ffns = prunepath.sparse_ffns(model).values()
    assert all(ffn.executor is None for ffn in ffns)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    model.cuda()
    assert not any(map(is_on_host, down_projections(model)))
    assert torch.equal(decode(model, ids), expected)


def test_it_trains(folder):
    ids = text(24)
    models = [load(folder).cuda(), load(folder)]
    offload_experts(models[1], 0)
    losses = []
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert all(map(is_on_host, down_projections(models[1])))


@torch.inference_mode()
def test_a_packed_checkpoint_can_be_offloaded(folder, tmp_path):
    ids = text(24)
    expected = decode(load(folder).cuda(), ids)
    pack(folder, tmp_path / "packed")
    model = load(tmp_path / "packed")
    offload_experts(model, FFN)
    assert torch.equal(decode(model, ids), expected)


def generated(folder, *options):
    command = [sys.executable, "-m", "prunepath.cli", "generate", folder, "def main(", "--max-new-tokens", "16"]
    run = subprocess.run([*command, "--dtype", "float32", "--json", *options], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_the_command_line_says_where_ffns_are(make_sparse, tmp_path):
    from prunepath.demo.run import model_folder

    with model_folder() as path:
        dense, tokenizer = prunepath.load(path)
    model = make_sparse(dense)
    prunepath.set_threshold(model, 0.5)
    prunepath.save(model, tokenizer, tmp_path / "sparse")
    plain = generated(tmp_path / "sparse", "--device", "cuda")
    offloaded = generated(tmp_path / "sparse", "--gpu-experts", "4MB")
    assert offloaded["text"] == plain["text"]
    assert 0 < offloaded["gpu_experts"]["gpu_bytes"] <= 4_000_000 < offloaded["gpu_experts"]["host_bytes"]
