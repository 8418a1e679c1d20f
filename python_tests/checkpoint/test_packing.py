"""Packed checkpoints: the same model, whose weights come into memory as they are used."""

import copy
import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import prunepath
from prunepath.checkpoint.packing import pack
from prunepath.checkpoint.tensor_file import TensorFile
from prunepath.eval.memory import report_memory

FILE = "model.safetensors"
linux = pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="reads Linux's /proc")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_calibrated):
    """A sparse checkpoint of 6 MB, and the same packed."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=128,
        intermediate_size=128 * 8,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    base = tmp_path_factory.mktemp("packing")
    prunepath.save(make_calibrated(LlamaForCausalLM(config).eval(), router_rank=16), None, base / "sparse")
    sizes = pack(base / "sparse", base / "packed")
    assert sizes["ffn_bytes"] == 4 * 3 * 128 * 1024 * 4
    return base / "sparse", base / "packed"


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def rewritten(folder, change):
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})


@torch.no_grad()
def test_a_packed_checkpoint_is_the_same_model(folders, ids):
    sparse, packed = map(load, folders)
    assert all(ffn.has_row_tables() for ffn in prunepath.sparse_ffns(packed).values())
    assert prunepath.get_thresholds(packed) == prunepath.get_thresholds(sparse)
    for name, weight in sparse.state_dict().items():
        assert torch.equal(packed.state_dict()[name], weight)
    for budget in (0.2, 0.6, 1.0):
        prunepath.set_budget(sparse, budget)
        prunepath.set_budget(packed, budget)
        assert torch.equal(packed(ids).logits, sparse(ids).logits)
    many = torch.randint(2, 97, (1, 150), generator=torch.Generator().manual_seed(3))
    assert torch.allclose(packed(many).logits, sparse(many).logits, atol=1e-4)


@torch.no_grad()
def test_a_model_whose_weights_are_stored_transposed_is_packed(make_sparse, ids, tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1)
    model = make_sparse(GPT2LMHeadModel(config).eval(), expert_width=4)
    prunepath.set_threshold(model, 0.5)
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "sparse")
    pack(tmp_path / "sparse", tmp_path / "packed")
    packed = load(tmp_path / "packed")
    assert all(ffn.has_row_tables() for ffn in prunepath.sparse_ffns(packed).values())
    assert torch.equal(packed(ids).logits, expected)


def test_weights_begin_at_pages_and_neurons_are_rows(folders):
    file = TensorFile(folders[1] / FILE)
    weights = {name: entry for name, entry in file.entries.items() if name.endswith("proj.weight") and "mlp" in name}
    assert {entry.shape for entry in weights.values()} == {(1024, 128)}
    assert all(entry.begin % 4096 == 0 for name, entry in file.entries.items() if not name.startswith("padding."))
    assert load_file(folders[1] / FILE).keys() == file.entries.keys(), "the safetensors package reads it"


@linux
@torch.no_grad()
def test_opening_reads_no_ffn_and_running_all_of_it_at_most_once(folders):
    model = load(folders[1])
    opened = report_memory(model)
    prunepath.set_threshold(model, 1.0)
    model(torch.tensor([[5]]))
    used = report_memory(model)
    size = (folders[1] / FILE).stat().st_size
    assert size <= opened.mapped_bytes == used.mapped_bytes < size + 4096
    # Linux maps 64 KiB around a byte that is read, such as the first of each of the 12 weights of FFNs.
    assert opened.touched_bytes <= size - 12 * 128 * 1024 * 4 + 13 * (1 << 16)
    assert 0.9 * size < used.touched_bytes < size + 4096
    assert used.resident_bytes > used.touched_bytes


@torch.no_grad()
def test_an_ordinary_checkpoint_has_its_down_projections_in_memory(folders):
    model = load(folders[0])
    down = [ffn.projection("down_proj").weight for ffn in prunepath.sparse_ffns(model).values()]
    assert all(weight.stride() == (1, 128) for weight in down)
    assert report_memory(model).mapped_bytes >= (folders[0] / FILE).stat().st_size


@torch.no_grad()
def test_copies_casts_training_and_saving_give_ordinary_models(folders, ids, tmp_path):
    packed = load(folders[1])
    expected = packed(ids).logits
    assert torch.equal(copy.deepcopy(packed)(ids).logits, expected)
    state = packed.state_dict()
    assert torch.equal(packed(ids).logits, expected)
    prunepath.save(packed, None, tmp_path / "again")
    assert load_file(tmp_path / "again" / FILE)["model.layers.0.mlp.down_proj.weight"].shape == (128, 1024)
    assert torch.equal(load(tmp_path / "again")(ids).logits, expected)
    assert load(folders[1]).to(torch.bfloat16)(ids).logits.dtype == torch.bfloat16
    trained = load(folders[1]).train()
    with torch.enable_grad():
        trained(ids, labels=ids).loss.backward()
    torch.optim.SGD(trained.parameters(), lr=0.1).step()
    trained.eval()
    assert not torch.equal(trained(ids).logits, expected)
    prunepath.save(trained, None, tmp_path / "trained")
    assert torch.equal(load(tmp_path / "trained")(ids).logits, trained(ids).logits), "writes are never lost"
    assert torch.equal(load(folders[1])(ids).logits, expected), "files stay as they are"
    assert all(torch.equal(state[name], weight) for name, weight in packed.state_dict().items())


@torch.no_grad()
def test_bounds_set_after_loading_count_and_threads_run_one_model_alike(folders, ids):
    packed = load(folders[1])
    prunepath.set_threshold(packed, 2.0**-24)
    for ffn in prunepath.sparse_ffns(packed).values():
        ffn.min_experts = 17
    with prunepath.record_counts(packed) as counts:
        expected = packed(ids).logits
    assert counts.active_fraction == 17 / 1024
    outputs = []

    def run():
        with torch.no_grad():
            outputs.extend(packed(ids).logits for _ in range(5))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outputs) == 20 and all(torch.equal(output, expected) for output in outputs)


@torch.no_grad()
def test_another_dtype_than_the_file_is_read_into_memory(folders, ids):
    half, cast = load(folders[1], dtype=torch.bfloat16), load(folders[0], dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half(ids).logits, cast(ids).logits)


def test_without_prunepath_a_packed_checkpoint_is_refused(folders, tmp_path):
    script = (
        "import transformers\n"
        f"transformers.AutoModelForCausalLM.from_pretrained({str(folders[1])!r})\n"
        "print('loaded with transposed weights')\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode != 0
    assert "mismatch" in result.stderr
    assert result.stdout == ""


def drop(tensors):
    del tensors["model.layers.1.mlp.down_proj.weight"]


def drop_router(tensors):
    del tensors["model.layers.1.mlp.router.bias"]


def quantise(tensors):
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].to(torch.int8)


def cut(tensors):
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-8].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, "to hold model.layers.1.mlp.down_proj.weight"),
        (drop_router, "to hold model.layers.1.mlp.router.bias"),
        (quantise, "up_proj.weight .*I8"),
        (cut, r"up_proj.weight of shape \[1024, 128\].*got \[1016, 128\]"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_nothing_is_written(folders, tmp_path, change, message):
    for path in folders[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    rewritten(tmp_path, change)
    before = sorted(tmp_path.parent.iterdir())
    with pytest.raises(prunepath.CheckpointError, match=message):
        pack(tmp_path, tmp_path.parent / "packed")
    assert sorted(tmp_path.parent.iterdir()) == before


def test_a_missing_or_truncated_file_is_refused(folders, tmp_path):
    for path in folders[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    whole = (tmp_path / FILE).read_bytes()
    for content in (whole[:-4096], whole[:100], b""):
        (tmp_path / FILE).write_bytes(content)
        for refuses in (load, prunepath.load):
            with pytest.raises(prunepath.CheckpointError, match=FILE):
                refuses(tmp_path)
    (tmp_path / FILE).unlink()
    for refuses in (lambda folder: pack(folder, tmp_path / "packed"), prunepath.load):
        with pytest.raises(prunepath.CheckpointError, match=FILE):
            refuses(tmp_path)


def test_dense_packed_and_square_checkpoints_are_not_packed(folders, llama, make_sparse, tmp_path):
    llama.save_pretrained(tmp_path / "dense")
    with pytest.raises(prunepath.PrunePathError, match="is dense: convert it first"):
        pack(tmp_path / "dense", tmp_path / "out")
    with pytest.raises(prunepath.PrunePathError, match="packed already"):
        pack(folders[1], tmp_path / "out")
    square = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    make_sparse(LlamaForCausalLM(square)).save_pretrained(tmp_path / "square")
    with pytest.raises(prunepath.PrunePathError, match="wider than the hidden size"):
        pack(tmp_path / "square", tmp_path / "out")
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
