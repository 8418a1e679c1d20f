"""`prunepath pack`, and what `generate` says of memory."""

import json
import os

import pytest

linux = pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="reads Linux's /proc")


@pytest.fixture
def packed_folder(prunepath_command, sparse_folder, tmp_path):
    result = prunepath_command("pack", sparse_folder, tmp_path / "packed")
    assert result.exit_code == 0, result.output
    assert "share" not in result.stdout
    return tmp_path / "packed"


def test_a_packed_checkpoint_generates_the_same_text(prunepath_command, sparse_folder, packed_folder):
    for budget in (0.3, 1.0):
        arguments = ("Bird", "--budget", budget, "--max-new-tokens", 16)
        expected = prunepath_command("generate", sparse_folder, *arguments)
        actual = prunepath_command("generate", packed_folder, *arguments)
        assert actual.exit_code == 0, actual.output
        assert actual.stdout == expected.stdout


def test_info_tells_a_packed_checkpoint(prunepath_command, sparse_folder, packed_folder):
    sparse, packed = (
        json.loads(prunepath_command("info", folder, "--json").stdout) for folder in (sparse_folder, packed_folder)
    )
    assert (sparse["packed"], packed["packed"]) == (False, True)
    dense = [found["parameters"] - found["added_parameters"] for found in (sparse, packed)]
    assert dense[0] == dense[1]


@linux
def test_generate_reports_memory(prunepath_command, packed_folder):
    arguments = ("generate", packed_folder, "Bird", "--budget", 0.3, "--report-memory")
    memory = json.loads(prunepath_command(*arguments, "--json").stdout)["memory"]
    assert memory["peak_bytes"] >= memory["resident_bytes"] > memory["mapped_bytes"] >= memory["touched_bytes"] > 0
    text = prunepath_command(*arguments).stdout
    for word in ("memory:", "resident_bytes: ", "mapped_bytes: ", "touched_bytes: "):
        assert word in text


def test_generate_keeps_experts_within_a_limit(prunepath_command, packed_folder):
    arguments = ("Bird", "--budget", 0.3, "--max-new-tokens", 8)
    free = prunepath_command("generate", packed_folder, *arguments)
    limited = prunepath_command("generate", packed_folder, *arguments, "--resident-experts", "12kB")
    assert limited.exit_code == 0, limited.output
    assert limited.stdout == free.stdout


def test_a_budget_limits_the_experts_in_memory_unless_told_otherwise(prunepath_command, packed_folder):
    arguments = ("generate", packed_folder, "Bird", "--max-new-tokens", 8, "--report-memory")
    size = 2 * 8 * 3 * 8 * 32 * 4  # layers, experts, matrices, neurons, hidden size, bytes
    limited = prunepath_command(*arguments, "--budget", 0.2)
    assert f"Keeping {0.4 * size / 1e6:.1f} MB of experts in memory" in limited.stderr
    lifted = prunepath_command(*arguments, "--budget", 0.2, "--resident-experts", "all")
    assert lifted.exit_code == 0 and "Keeping" not in lifted.stderr
    assert lifted.stdout.partition("memory:")[0] == limited.stdout.partition("memory:")[0]
    for unlimited in (["--budget", 0.5], ["--threshold", 0.2], []):
        assert "Keeping" not in prunepath_command(*arguments, *unlimited).stderr


@pytest.mark.parametrize("size", ["many", "4 apples", "-1GiB", "0", "1e400", ""])
def test_a_size_that_is_none_is_refused(refused, packed_folder, size):
    assert "resident-experts" in refused("generate", packed_folder, "Bird", "--resident-experts", size)


def test_a_limit_needs_a_packed_checkpoint(refused, sparse_folder):
    assert "prunepath pack" in refused("generate", sparse_folder, "Bird", "--resident-experts", "1GiB")


def test_experts_are_kept_on_a_gpu_alone(refused, sparse_folder, corpus):
    assert "--gpu-experts" in refused("generate", sparse_folder, "Bird", "--gpu-experts", "1GiB", "--device", "cpu")
    assert "gpu-experts must be a size" in refused("generate", sparse_folder, "Bird", "--gpu-experts", "four")
    options = ("--data", corpus, "--gpu-experts", "1GiB", "--device", "cpu")
    assert "--gpu-experts" in refused("eval", sparse_folder, *options)
    both = ("--gpu-experts", "1GiB", "--resident-experts", "1GiB")
    assert "got both" in refused("generate", sparse_folder, "Bird", *both)


def test_pack_refuses_what_it_cannot_pack(refused, dense_folder, packed_folder, sparse_folder, tmp_path):
    assert "dense" in refused("pack", dense_folder, tmp_path / "out")
    assert "already" in refused("pack", packed_folder, tmp_path / "out")
    assert str(packed_folder) in refused("pack", sparse_folder, packed_folder)
    assert "config.json" in refused("pack", tmp_path / "missing", tmp_path / "out")
    (sparse_folder / "model.safetensors").unlink()
    assert "model.safetensors" in refused("pack", sparse_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shrink_shows_what_it_costs_and_writes_a_smaller_checkpoint(prunepath_command, sparse_folder, corpus, tmp_path):
    arguments = ("shrink", sparse_folder, tmp_path / "small", "--data", corpus, "--budget", 0.4)
    result = prunepath_command(*arguments, "--max-rise", 1000)
    assert result.exit_code == 0, result.output
    for word in ("rate", "experts", "FFN bytes", "loss", "rise", "100.0%", "+0.00%"):
        assert word in result.stdout
    description = json.loads(prunepath_command("info", tmp_path / "small", "--json").stdout)
    assert description["shrinking"]["dense_experts"] == 8
    assert sum(description["shrinking"]["experts"]) < 16
    for command in ("generate", "report", "eval", "train"):
        rest = {"generate": ["Bird"], "train": [tmp_path / "trained", "--steps", 2, "--sequence-length", 32]}
        rest |= {"report": ["--out", tmp_path / "report.html"], "eval": ["--budget", "0.3,1"]}
        data = [] if command == "generate" else ["--data", corpus]
        used = prunepath_command(command, tmp_path / "small", *rest[command], *data)
        assert used.exit_code == 0, used.output
    assert (tmp_path / "report.html").exists()


def test_low_memory_converts_from_file_to_file(prunepath_command, refused, dense_folder, corpus, tmp_path):
    options = "--num-experts 8 --sequence-length 32 --partition-tokens 256 --router-tokens 512 --calibration-tokens 256"
    arguments = ("convert", dense_folder, tmp_path / "low", "--data", corpus, *options.split(), "--low-memory")
    assert "--device" in refused(*arguments, "--device", "cuda")
    result = prunepath_command(*arguments)
    assert result.exit_code == 0, result.output
    assert "router KL" in result.stdout and "Wrote" in result.stdout
    generated = prunepath_command("generate", tmp_path / "low", "Bird", "--budget", 0.3)
    assert generated.exit_code == 0, generated.output


def test_shrink_with_nothing_to_remove_writes_nothing(prunepath_command, sparse_folder, corpus, tmp_path):
    result = prunepath_command("shrink", sparse_folder, tmp_path / "small", "--data", corpus, "--rate", 0)
    assert result.exit_code == 2
    assert "nothing is written" in result.stderr and "FFN bytes" in result.stdout
    assert not (tmp_path / "small").exists()


def test_shrink_refuses_what_it_cannot_shrink(refused, dense_folder, sparse_folder, corpus, tmp_path):
    out = tmp_path / "out"
    assert "is dense" in refused("shrink", dense_folder, out, "--data", corpus)
    assert "budget" in refused("shrink", sparse_folder, out, "--data", corpus, "--budget", 2)
    assert "--no-fold" in refused("shrink", sparse_folder, out, "--data", corpus, "--pad", "--fold")
    assert not out.exists()
