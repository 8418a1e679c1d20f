"""Converting layer by layer: the checkpoint that converting in memory makes, and going on after being stopped."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel

import prunepath
from prunepath.conversion import streaming
from prunepath.conversion.streaming import convert_streaming

SIZES = dict(vocab_size=97, bos_token_id=0, eos_token_id=1, pad_token_id=1, initializer_range=0.2)
OTHERS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**SIZES, n_embd=32, n_layer=2, n_head=4, n_positions=128)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SIZES,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    ),
}


@pytest.fixture
def dense_folder(make_model, tmp_path):
    """Saves a tiny model in several shards: family -> folder."""

    def save(family, shard="20KB"):
        torch.manual_seed(0)
        model = OTHERS[family]().eval() if family in OTHERS else make_model(family)
        model.save_pretrained(tmp_path / "dense", max_shard_size=shard)
        return tmp_path / "dense"

    return save


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("family", ["llama", "llama_mlp_bias", "qwen3", "opt", "gpt2", "gemma3"])
@pytest.mark.parametrize("width", [1, 8])
@torch.no_grad()
def test_it_is_what_converting_in_memory_makes(family, width, dense_folder, token_texts, small_config, ids, tmp_path):
    folder = dense_folder(family)
    assert len(list(folder.glob("*.safetensors"))) > 1
    config = prunepath.PrunePathConfig(**{**vars(small_config), "expert_width": width, "router_rank": 8})
    expected = prunepath.convert(AutoModelForCausalLM.from_pretrained(folder), None, token_texts, config)
    convert_streaming(folder, tmp_path / "sparse", None, token_texts, config)
    actual = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    before = expected.state_dict()
    assert actual.state_dict().keys() == before.keys()
    for name, tensor in actual.state_dict().items():
        assert torch.allclose(tensor, before[name], rtol=1e-3, atol=1e-4), name
    said, expected_said = actual.config.quantization_config, expected.config.quantization_config
    assert (said["config"], said["ffns"]) == (expected_said["config"], expected_said["ffns"])
    assert said["budgets"].keys() == expected_said["budgets"].keys()
    with prunepath.record_counts(actual) as counts:
        prunepath.set_budget(actual, 0.4)
        actual(torch.cat([t[None, :128] for t in token_texts[:8]]))
    assert counts.active_fraction == pytest.approx(0.4, abs=0.05)
    prunepath.set_threshold(actual, 1.0)
    dense = AutoModelForCausalLM.from_pretrained(folder)
    error = (actual(ids).logits - dense(ids).logits).norm() / dense(ids).logits.norm()
    assert error < 1e-5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "sparse"]


@pytest.fixture
def stopped_after(monkeypatch):
    """Converts until a number of layers is done, when somebody presses Ctrl-C: (layers, folder, out, texts, config)."""

    def run(layers, *arguments):
        release = streaming._Stream._release

        def stop(stream, index):
            release(stream, index)
            if index + 1 == layers:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(streaming._Stream, "_release", stop)
            convert(*arguments)

    return run


def convert(folder, out, texts, config):
    convert_streaming(folder, out, None, texts, config)


KILLED = """
import os, random, signal, sys, time, torch, prunepath
from pathlib import Path
from prunepath.conversion.streaming import convert_streaming
from threading import RLock
from tqdm import tqdm
torch.set_num_threads(1)
tqdm.set_lock(RLock())  # tqdm's own is shared with forked processes, and one that is killed never gives it back
folder, base, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
texts = torch.load(sys.argv[4])
config = prunepath.PrunePathConfig(**torch.load(sys.argv[5]))

def begin(out):
    child = os.fork()
    if child == 0:
        convert_streaming(folder, out, None, texts, config)
        os._exit(0)
    return child

def wait_for_work(out):
    while not (base / f".{out.name}.partial" / ".work").exists():
        time.sleep(0.002)

child = begin(base / "whole")
wait_for_work(base / "whole")
start = time.perf_counter()
os.waitpid(child, 0)
duration = time.perf_counter() - start
draw = random.Random(0)
outcomes = {"old": 0, "new": 0, "left": 0, "went on": 0}
out = base / "out"
for kill in range(kills):
    if out.exists():
        for entry in out.iterdir():
            entry.unlink()
        out.rmdir()
    partial = base / ".out.partial"
    outcomes["went on"] += any(partial.glob("done-*.json"))
    child = begin(out)
    if not partial.exists():
        wait_for_work(out)
    time.sleep(draw.random() * 1.5 * duration)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    outcomes["new" if out.exists() else "old"] += 1
    outcomes["left"] += partial.exists()
    if out.exists():
        for entry in (base / "whole").iterdir():
            assert (out / entry.name).read_bytes() == entry.read_bytes(), entry
if not out.exists():
    convert_streaming(folder, out, None, texts, config)
for entry in (base / "whole").iterdir():
    assert (out / entry.name).read_bytes() == entry.read_bytes(), entry
assert not (base / ".out.partial").exists()
print(outcomes)
"""


def run_script(script, *arguments, texts, config, tmp_path):
    torch.save(texts, tmp_path / "texts")
    torch.save(vars(config), tmp_path / "config")
    command = [sys.executable, "-c", script, *map(str, arguments), tmp_path / "texts", tmp_path / "config"]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)


def test_a_stopped_run_goes_on_to_the_same_checkpoint(dense_folder, token_texts, small_config, tmp_path, stopped_after):
    folder, out = dense_folder("gemma3"), tmp_path / "out"
    convert(folder, tmp_path / "whole", token_texts, small_config)
    for layers in (1, 2):
        stopped_after(layers, folder, out, token_texts, small_config)
        assert not out.exists()
        left = sorted(path.name for path in (tmp_path / ".out.partial").glob("model-*"))
        assert len(left) == layers
    before = (tmp_path / ".out.partial" / left[0]).stat().st_mtime_ns
    convert(folder, out, token_texts, small_config)
    assert contents(out) == contents(tmp_path / "whole")
    assert (out / left[0]).stat().st_mtime_ns == before, "finished layers are not done again"
    assert not (tmp_path / ".out.partial").exists()


def test_work_of_another_conversion_is_not_continued(dense_folder, token_texts, small_config, tmp_path, stopped_after):
    folder, out = dense_folder("gemma3"), tmp_path / "out"
    stopped_after(1, folder, out, token_texts, small_config)
    other = dataclasses.replace(small_config, seed=5)
    convert(folder, out, token_texts, other)
    convert(folder, tmp_path / "whole", token_texts, other)
    assert contents(out) == contents(tmp_path / "whole")


def test_killing_it_at_any_moment_loses_no_layer_and_leaves_nothing_wrong(
    dense_folder, token_texts, small_config, tmp_path
):
    folder = dense_folder("gemma3")
    shared = dict(texts=token_texts, config=small_config, tmp_path=tmp_path)
    result = run_script(KILLED, folder, tmp_path, 10, **shared)
    assert result.returncode == 0, result.stderr
    outcomes = json.loads(result.stdout.replace("'", '"'))
    assert min(outcomes[kind] for kind in ("old", "left", "went on")) > 0, outcomes  # a busy machine may finish none


FULL_DISK = """
import resource, signal, sys, torch, prunepath
from prunepath.conversion.streaming import convert_streaming
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
texts, config = torch.load(sys.argv[3]), prunepath.PrunePathConfig(**torch.load(sys.argv[4]))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 13, 1 << 13))
try:
    convert_streaming(sys.argv[1], sys.argv[2], None, texts, config)
except prunepath.PrunePathError as error:
    print(error)
"""


def test_a_full_disk_is_one_sentence_and_can_be_gone_on_from(dense_folder, token_texts, small_config, tmp_path):
    folder = dense_folder("llama")
    shared = dict(texts=token_texts, config=small_config, tmp_path=tmp_path)
    result = run_script(FULL_DISK, folder, tmp_path / "out", **shared)
    assert result.stdout.startswith("Expected to write ") and "goes on from there" in result.stdout, result
    assert not (tmp_path / "out").exists()
    convert_streaming(folder, tmp_path / "out", None, token_texts, small_config)
    assert not (tmp_path / ".out.partial").exists()


def test_missing_and_damaged_shards_and_other_dtypes_are_refused(dense_folder, token_texts, small_config, tmp_path):
    folder = dense_folder("llama")

    def refused(match):
        with pytest.raises(prunepath.PrunePathError, match=match):
            convert_streaming(folder, tmp_path / "out", None, token_texts, small_config)
        assert not (tmp_path / "out").exists()

    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = "model.layers.1.mlp.down_proj.weight"
    shard = folder / index["weight_map"][name]
    whole = load_file(shard)
    save_file({**whole, name: whole[name].bfloat16()}, shard, metadata={"format": "pt"})
    refused(rf"{name} in .* to be torch.float32 like its model, got torch.bfloat16")
    save_file({**whole, name: whole[name].to(torch.int8)}, shard, metadata={"format": "pt"})
    refused(f"{name} .*I8")
    save_file({**whole, name: whole[name][:, :8].clone()}, shard, metadata={"format": "pt"})
    refused(rf"{name} of shape \[32, 64\]")
    save_file({k: v for k, v in whole.items() if k != name}, shard, metadata={"format": "pt"})
    refused(f"to hold {name}, but none of its shards does")
    shard.write_bytes(shard.read_bytes()[:100])
    refused(shard.name)
    shard.unlink()
    refused(shard.name)


def test_what_it_does_not_convert_is_refused(dense_folder, token_texts, small_config, tmp_path):
    folder = dense_folder("llama")
    seven = prunepath.PrunePathConfig(**{**vars(small_config), "num_experts": 7})
    with pytest.raises(prunepath.PrunePathError, match="num_experts to divide the intermediate size 64, got 7"):
        convert_streaming(folder, tmp_path / "out", None, token_texts, seven)
    convert_streaming(folder, tmp_path / "out", None, token_texts, small_config)
    with pytest.raises(prunepath.PrunePathError, match="new or empty"):
        convert_streaming(folder, tmp_path / "out", None, token_texts, small_config)
    with pytest.raises(prunepath.PrunePathError, match="dense checkpoint"):
        convert_streaming(tmp_path / "out", tmp_path / "again", None, token_texts, small_config)
    with pytest.raises(prunepath.PrunePathError, match=r"config\.json"):
        convert_streaming(tmp_path / "none", tmp_path / "again", None, token_texts, small_config)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that nobody can write to")
def test_a_place_that_cannot_be_written_is_refused(dense_folder, token_texts, small_config):
    with pytest.raises(prunepath.PrunePathError, match="/proc/out"):
        convert_streaming(dense_folder("llama"), "/proc/out", None, token_texts, small_config)


GROWTH = """
import sys, torch, prunepath, prunepath.conversion.streaming as streaming
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from prunepath.eval.memory import process_memory
torch.set_num_threads(1)
folder = Path(sys.argv[1])
sizes = dict(vocab_size=97, hidden_size=512, intermediate_size=2048, num_attention_heads=4, num_hidden_layers=12)
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder / "dense", max_shard_size="40MB")
resident = []
def release(stream, index, real=streaming._Stream._release):
    real(stream, index)
    resident.append(process_memory()[0])
streaming._Stream._release = release
texts = [torch.randint(0, 97, (128,)) for _ in range(16)]
tokens = dict(sequence_length=64, partition_tokens=256, router_tokens=256, calibration_tokens=128)
config = prunepath.PrunePathConfig(num_experts=16, **tokens)
streaming.convert_streaming(folder / "dense", folder / "sparse", None, texts, config)
print((resident[-1] - resident[2]) / 9)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's /proc")
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    command = [sys.executable, "-c", GROWTH, tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert float(result.stdout) < 1e6  # bytes a layer, of which each has 16.8 MB
