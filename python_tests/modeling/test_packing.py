"""Packed checkpoints: the same model, whose experts come into memory as they are used, and leave it again."""

import copy
import json
import mmap
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import prunepath
from prunepath.checkpoint.tensor_file import NewTensor, TensorFile, write_tensor_file
from prunepath.eval.memory import report_memory
from prunepath.checkpoint.packing import SHARDS, limit_resident_experts, pack, resident_limit

linux = pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="reads Linux's /proc")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, token_texts, small_config):
    """A sparse checkpoint whose experts are whole pages, and the same packed."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=128,
        intermediate_size=128 * 8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = prunepath.convert(LlamaForCausalLM(config).eval(), None, token_texts, small_config)
    prunepath.set_budget(model, 0.3)
    base = tmp_path_factory.mktemp("packing")
    prunepath.save(model, None, base / "sparse")
    sizes = pack(base / "sparse", base / "packed")
    assert sizes["aligned"]
    return base / "sparse", base / "packed"


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def rewritten(folder, name, change):
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name, metadata={"format": "pt"})


@torch.no_grad()
def test_a_packed_checkpoint_is_the_same_model(folders, ids):
    sparse, packed = map(load, folders)
    assert all(ffn.is_mapped for ffn in prunepath.sparse_ffns(packed).values())
    assert prunepath.get_thresholds(packed) == prunepath.get_thresholds(sparse)
    for budget in (0.2, 0.6, 1.0):
        prunepath.set_budget(sparse, budget)
        prunepath.set_budget(packed, budget)
        assert torch.equal(packed(ids).logits, sparse(ids).logits)


@torch.no_grad()
def test_long_inputs_run_through_the_kernels_too(folders):
    ids = torch.randint(2, 97, (1, 150), generator=torch.Generator().manual_seed(3))
    sparse, packed = map(load, folders)
    with prunepath.record_counts(packed) as counts:
        actual = packed(ids).logits
    expected = sparse(ids).logits
    assert (actual - expected).norm() / expected.norm() < 1e-5
    assert counts.active_fraction < 0.6
    prunepath.set_budget(packed, 1.0)
    prunepath.set_budget(sparse, 1.0)
    assert (packed(ids).logits - sparse(ids).logits).norm() / expected.norm() < 1e-5


def test_weights_and_experts_begin_at_pages(folders):
    file = TensorFile(folders[1] / SHARDS[1])
    assert [name.rpartition(".")[2] for name in file.entries if "padding" not in name][:2] == ["mean_output"] * 2
    weights = {name: entry for name, entry in file.entries.items() if name.endswith("proj.weight")}
    assert [len(entry.shape) for entry in weights.values()] == [4, 3, 4, 3]
    for entry in weights.values():
        size = (entry.end - entry.begin) // entry.shape[0]
        assert (entry.begin % 4096, size % 4096) == (0, 0)
    assert load_file(folders[1] / SHARDS[1]).keys() == file.entries.keys(), "the safetensors package reads it"


@linux
@torch.no_grad()
def test_loading_touches_no_expert_and_running_only_the_active_ones(folders):
    model = load(folders[1])
    report = report_memory(model)
    assert report.mapped_bytes == (folders[1] / SHARDS[1]).stat().st_size
    ffns = list(prunepath.sparse_ffns(model).values())
    beside = TensorFile(folders[1] / SHARDS[1]).entries["model.layers.0.mlp.up_proj.weight"].begin  # the other tensors
    assert report.touched_bytes <= beside
    prunepath.set_threshold(model, 2.0**-24)  # one expert a token
    model(torch.tensor([[5]]))
    experts = sum(ffn.pages.expert_bytes for ffn in ffns)
    assert experts <= report_memory(model).touched_bytes <= experts + beside
    prunepath.set_threshold(model, 1.0)
    model(torch.tensor([[5]]))
    assert report_memory(model).touched_bytes >= 8 * experts
    assert report_memory(model).resident_bytes > report.resident_bytes


@linux
@torch.no_grad()
def test_a_limit_on_resident_experts_holds_and_changes_no_output(folders):
    ids = torch.randint(2, 97, (60,), generator=torch.Generator().manual_seed(4))
    free, limited = load(folders[1]), load(folders[1])
    ffns = list(prunepath.sparse_ffns(limited).values())
    expert = ffns[0].pages.expert_bytes
    resident = limit_resident_experts(limited, 6 * expert)
    for token in ids:
        expected = free(token[None, None]).logits
        assert torch.equal(limited(token[None, None]).logits, expected)
        assert resident.bytes <= 6 * expert
        assert report_memory(limited).touched_bytes <= 6 * expert + 4 * mmap.PAGESIZE
    assert resident.hits > 0
    assert resident.read_bytes == resident.misses * expert > 6 * expert


def test_the_limit_of_a_budget_is_twice_its_share_of_the_experts(folders):
    model = load(folders[1])
    experts = sum(8 * ffn.pages.expert_bytes for ffn in prunepath.sparse_ffns(model).values())
    assert resident_limit(model, 0.25) == experts // 2
    assert resident_limit(model, 0.5) is None, "all of them fit"
    assert resident_limit(load(folders[0]), 0.25) is None, "they are not used from a file"


def test_experts_of_an_ordinary_checkpoint_cannot_be_limited(folders):
    with pytest.raises(prunepath.PrunePathError, match="packed checkpoint"):
        limit_resident_experts(load(folders[0]), 1 << 20)


@torch.no_grad()
def test_copies_casts_training_and_saving_give_ordinary_models(folders, ids, tmp_path):
    packed = load(folders[1])
    expected = packed(ids).logits
    assert torch.equal(copy.deepcopy(packed)(ids).logits, expected)
    assert packed.to("cpu") is packed and all(f.is_mapped for f in prunepath.sparse_ffns(packed).values())
    assert torch.equal(packed(ids).logits, expected)
    prunepath.save(packed, None, tmp_path / "again")
    again = load(tmp_path / "again")
    assert not any(f.is_mapped for f in prunepath.sparse_ffns(again).values())
    assert torch.equal(again(ids).logits, expected)
    half = load(folders[1]).to(torch.bfloat16)
    assert half(ids).logits.dtype == torch.bfloat16
    trained = load(folders[1]).train()
    with torch.enable_grad():
        trained(ids, labels=ids).loss.backward()
    torch.optim.SGD(trained.parameters(), lr=0.1).step()
    trained.eval()
    assert not torch.equal(trained(ids).logits, expected)
    assert torch.equal(load(folders[1])(ids).logits, expected), "files stay as they are"


@torch.no_grad()
def test_the_headless_model_loads_packed(folders, ids):
    headless = AutoModel.from_pretrained(folders[1])
    assert torch.equal(headless(ids).last_hidden_state, load(folders[0]).base_model(ids).last_hidden_state)


def test_without_prunepath_a_packed_checkpoint_is_refused(folders, tmp_path):
    script = (
        "import transformers\n"
        f"transformers.AutoModelForCausalLM.from_pretrained({str(folders[1])!r})\n"
        "print('loaded with random experts')\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode != 0
    assert "mismatch" in result.stderr
    assert result.stdout == ""


def test_another_dtype_than_the_files_is_refused(folders):
    with pytest.raises(prunepath.CheckpointError, match=r"load in torch.float32.*got torch.bfloat16"):
        AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.bfloat16)


def drop(tensors):
    del tensors["model.layers.1.mlp.down_proj.weight"]


def cast(tensors):
    tensors["model.layers.1.mlp.down_proj.weight"] = tensors["model.layers.1.mlp.down_proj.weight"].bfloat16()


def quantise(tensors):
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].to(torch.int8)


def cut(tensors):
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-8].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, "to hold model.layers.1.mlp.down_proj.weight"),
        (cast, "one dtype.*F32.*down_proj.weight in BF16"),
        (quantise, "up_proj.weight .*I8"),
        (cut, r"up_proj.weight of shape \[1024, 128\].*got \[1016, 128\]"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_nothing_is_written(folders, tmp_path, change, message):
    for path in folders[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    rewritten(tmp_path, "model.safetensors", change)
    before = sorted(tmp_path.parent.iterdir())
    with pytest.raises(prunepath.CheckpointError, match=message):
        pack(tmp_path, tmp_path.parent / "packed")
    assert sorted(tmp_path.parent.iterdir()) == before


def test_a_missing_or_truncated_shard_is_refused(folders, tmp_path):
    for path in folders[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = tmp_path / SHARDS[1]
    whole = shard.read_bytes()
    for content in (whole[:-4096], whole[:100], b""):
        shard.write_bytes(content)
        with pytest.raises(prunepath.CheckpointError, match=SHARDS[1]):
            load(tmp_path)
    shard.unlink()
    with pytest.raises(prunepath.CheckpointError, match=SHARDS[1]):
        pack(tmp_path, tmp_path / "packed")
    with pytest.raises(prunepath.CheckpointError, match=SHARDS[1]):
        prunepath.load(tmp_path)


def test_dense_and_packed_checkpoints_are_not_packed(folders, llama, tmp_path):
    llama.save_pretrained(tmp_path / "dense")
    with pytest.raises(prunepath.PrunePathError, match="is dense: convert it first"):
        pack(tmp_path / "dense", tmp_path / "out")
    with pytest.raises(prunepath.PrunePathError, match="packed already"):
        pack(folders[1], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["/proc/out", "/sys/out"])
def test_a_place_that_cannot_be_written_is_refused(folders, out):
    if not os.path.isdir(os.path.dirname(out)):
        pytest.skip("no such folder on this system")
    with pytest.raises(prunepath.PrunePathError, match=out):
        pack(folders[0], out)


FULL_DISK = """
import resource, signal, sys
from prunepath.errors import PrunePathError
from prunepath.checkpoint.packing import pack
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    pack(*sys.argv[1:])
except PrunePathError as error:
    print(error)
"""


def test_a_full_disk_is_one_sentence_and_leaves_nothing(folders, tmp_path):
    command = [sys.executable, "-c", FULL_DISK, folders[0], tmp_path / "out"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert result.stdout.startswith("Expected to write ") and result.stdout.count("\n") == 1, result
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch, transformers
from prunepath.checkpoint.packing import pack
torch.set_num_threads(1)
folder, base, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
pack(folder, base / "whole")

def begin(out):
    child = os.fork()
    if child == 0:
        pack(folder, out)
        os._exit(0)
    return child

start = time.perf_counter()
os.waitpid(begin(base / "out0"), 0)
duration = time.perf_counter() - start
draw = random.Random(0)
outcomes = {"old": 0, "new": 0, "left": 0}
for kill in range(kills):
    out = base / f"out{kill % 3}"
    if out.exists():
        for entry in out.iterdir():
            entry.unlink()
        out.rmdir()
    child = begin(out)
    time.sleep(draw.random() * 1.3 * duration)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    outcomes["new" if out.exists() else "old"] += 1
    outcomes["left"] += (base / f".{out.name}.partial").exists()
    if out.exists():
        for entry in (base / "whole").iterdir():
            assert (out / entry.name).read_bytes() == entry.read_bytes(), entry
for index in range(3):
    if not (base / f"out{index}").exists():
        pack(folder, base / f"out{index}")
print(outcomes, sorted(path.name for path in base.iterdir()))
"""


def test_killing_pack_at_any_moment_leaves_nothing_or_all_of_it(folders, tmp_path):
    command = [sys.executable, "-c", KILLED, folders[0], tmp_path, "40"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    outcomes, names = result.stdout.partition("}")[::2]
    outcomes = json.loads((outcomes + "}").replace("'", '"'))
    assert min(outcomes.values()) > 0, "kills before the end, kills after it, and kills in the middle"
    assert names.strip() == "['out0', 'out1', 'out2', 'whole']", "a later run removes what a killed one left"


def test_two_processes_do_not_write_one_folder(tmp_path):
    from prunepath.checkpoint.folders import whole_folder

    with whole_folder(tmp_path / "out") as folder:
        (folder / "mine").write_text("mine")
        with pytest.raises(prunepath.PrunePathError, match="another process"), whole_folder(tmp_path / "out"):
            pass
    assert (tmp_path / "out" / "mine").read_text() == "mine"


def test_written_tensors_begin_where_asked_and_read_back(tmp_path):
    tensors = {
        "a": torch.arange(5, dtype=torch.float16),
        "b": torch.randn(3, 7).bfloat16(),
        "c": torch.randn(2, 2, 2),
        "d": torch.zeros(0, 4),
        "e": torch.tensor(3.0),
    }
    for align in (8, 64, 4096):
        path = tmp_path / f"{align}.safetensors"
        new = {k: NewTensor.computed(t.dtype, t.shape, lambda t=t: t) for k, t in tensors.items()}
        write_tensor_file(path, new, {"format": "pt"}, align=align)
        file, again = TensorFile(path), load_file(path)
        assert file.metadata == {"format": "pt"}
        for name, tensor in tensors.items():
            assert torch.equal(file.tensor(name), tensor) and torch.equal(again[name], tensor)
            assert file.entries[name].begin % align == 0
