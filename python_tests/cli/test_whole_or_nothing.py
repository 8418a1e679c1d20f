"""What writes a checkpoint writes all of it or nothing: killed, on a full disk, and with shards that are not right."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

KILLS = 6
CONVERT_OPTIONS = (
    "--num-experts 8 --sequence-length 32 --partition-tokens 256 --router-tokens 512 --calibration-tokens 256"
).split()
WEIGHT = "model.layers.1.mlp.down_proj.weight"
COMMANDS = {
    "convert": ["convert", *CONVERT_OPTIONS],
    "convert --low-memory": ["convert", *CONVERT_OPTIONS, "--low-memory"],
    "pack": ["pack"],
}

# Commands run in forked processes of one that has imported everything: arguments are a JSON list.
PREPARED = """
import json, os, random, resource, signal, sys, time
from pathlib import Path
from threading import RLock
import torch, tqdm
import prunepath.cli.app, prunepath.checkpoint.packing, prunepath.conversion.streaming
torch.set_num_threads(1)
tqdm.tqdm.set_lock(RLock())  # tqdm's own is shared with forked processes, and one that is killed never gives it back
base, command, kills = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])

def begin(out, limit=None):
    child = os.fork()
    if child == 0:
        log = os.open(base / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        sys.argv = ["prunepath", command[0], command[1], str(out), *command[2:]]
        try:
            prunepath.cli.main()
        except SystemExit as end:
            os._exit(end.code or 0)
        os._exit(0)
    return child

def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}

def finish(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""

KILLED = (
    PREPARED
    + """
out = base / "out"
start = time.perf_counter()
assert finish(begin(base / "whole")) == 0, (base / "log").read_text()
duration = time.perf_counter() - start
draw, outcomes = random.Random(0), {"old": 0, "new": 0, "left": 0}
for kill in range(kills):
    if out.exists():
        for entry in out.iterdir():
            entry.unlink()
        out.rmdir()
    child = begin(out)
    time.sleep((kill + draw.random()) / kills * 1.2 * duration)  # one in each part of the time that it takes
    os.kill(child, signal.SIGKILL)
    finish(child)
    outcomes["new" if out.exists() else "old"] += 1
    outcomes["left"] += (base / ".out.partial").exists()
    if out.exists():
        assert contents(out) == contents(base / "whole")
if not out.exists():
    assert finish(begin(out)) == 0, (base / "log").read_text()
assert contents(out) == contents(base / "whole")
assert not (base / ".out.partial").exists(), "a later run removes what a killed one left"
print(json.dumps(outcomes))
"""
)

FULL = (
    PREPARED
    + """
code = finish(begin(base / "out", limit=1 << 13))
print(json.dumps([code, (base / "log").read_text(), sorted(path.name for path in base.iterdir())]))
"""
)


@pytest.fixture(params=COMMANDS)
def command(request, dense_folder, sparse_folder, corpus):
    """A command without its output folder: [name, model, *options]."""
    name, *options = COMMANDS[request.param]
    data = [] if name == "pack" else ["--data", str(corpus)]
    return [name, str(dense_folder if name == "convert" else sparse_folder), *data, *options]


def run(script, base, command, kills=0):
    base.mkdir()
    arguments = [sys.executable, "-c", script, base, json.dumps(command), str(kills)]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=base)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_a_kill_at_any_moment_leaves_the_old_state_or_one_to_go_on_from(command, tmp_path):
    outcomes = run(KILLED, tmp_path / "base", command, kills=KILLS)
    assert outcomes["old"] > 0, outcomes  # a busy machine may finish none


def test_a_full_disk_is_one_sentence_and_nothing_under_the_final_name(command, tmp_path):
    code, log, left = run(FULL, tmp_path / "base", command)
    last = log.strip().splitlines()[-1]
    assert code == 2 and last.startswith("Error: Expected to write "), log
    assert "File too large" in last and last.endswith(".")
    assert left == ([".out.partial", "log"] if "--low-memory" in command else ["log"])


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that nobody can write to")
def test_a_folder_that_cannot_be_written_is_refused(command, prunepath_command):
    result = prunepath_command(command[0], command[1], "/proc/out", *command[2:])
    last = result.stderr.splitlines()[-1]
    assert result.exit_code == 2 and last.startswith("Error: Expected ") and "/proc" in last, result.output


def refused_with(change, command, refused, tmp_path):
    """The sentence about a model whose only shard became two, changed by change(folder, second shard's tensors)."""
    folder = tmp_path / ("dense" if command[0] == "convert" else "sparse")
    tensors = load_file(folder / "model.safetensors")
    second = {name: tensors.pop(name) for name in sorted(tensors) if name.startswith("model.layers.1.")}
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = dict.fromkeys(tensors, names[0]) | dict.fromkeys(second, names[1])
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(tensors, folder / names[0], metadata={"format": "pt"})
    change(second)
    if second:
        save_file(second, folder / names[1], metadata={"format": "pt"})
    sentence = refused(command[0], command[1], tmp_path / "out", *command[2:])
    assert not (tmp_path / "out").exists()
    return sentence


def test_a_missing_shard_is_named(command, refused, tmp_path):
    assert "model-00002-of-00002.safetensors" in refused_with(dict.clear, command, refused, tmp_path)


def test_a_missing_weight_is_named(command, refused, tmp_path):
    def drop(tensors):
        del tensors[WEIGHT]

    assert WEIGHT in refused_with(drop, command, refused, tmp_path)


def test_weights_of_whole_numbers_are_refused(command, refused, tmp_path):
    def quantise(tensors):
        tensors[WEIGHT] = tensors[WEIGHT].to(torch.int8)

    sentence = refused_with(quantise, command, refused, tmp_path)
    assert WEIGHT in sentence and "I8" in sentence
