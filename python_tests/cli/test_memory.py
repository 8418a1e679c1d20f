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
    dense = [found["parameters"] - found["router_parameters"] for found in (sparse, packed)]
    assert dense[0] == dense[1]


@linux
def test_generate_reports_memory(prunepath_command, packed_folder):
    arguments = ("generate", packed_folder, "Bird", "--budget", 0.3, "--report-memory")
    memory = json.loads(prunepath_command(*arguments, "--json").stdout)["memory"]
    assert memory["peak_bytes"] >= memory["resident_bytes"] > memory["mapped_bytes"] >= memory["touched_bytes"] > 0
    text = prunepath_command(*arguments).stdout
    for word in ("memory:", "resident_bytes: ", "mapped_bytes: ", "touched_bytes: "):
        assert word in text


@pytest.mark.parametrize("size", ["many", "4 apples", "-1GiB", "0", "1e400", ""])
def test_a_size_that_is_none_is_refused(refused, sparse_folder, size):
    assert "gpu-experts must be a size" in refused("generate", sparse_folder, "Bird", "--gpu-experts", size)


def test_experts_are_kept_on_a_gpu_alone(refused, sparse_folder, corpus):
    assert "--gpu-experts" in refused("generate", sparse_folder, "Bird", "--gpu-experts", "1GiB", "--device", "cpu")
    assert "gpu-experts must be a size" in refused("generate", sparse_folder, "Bird", "--gpu-experts", "four")
    options = ("--data", corpus, "--gpu-experts", "1GiB", "--device", "cpu")
    assert "--gpu-experts" in refused("eval", sparse_folder, *options)


def test_pack_refuses_what_it_cannot_pack(refused, dense_folder, packed_folder, sparse_folder, tmp_path):
    assert "dense" in refused("pack", dense_folder, tmp_path / "out")
    assert "already" in refused("pack", packed_folder, tmp_path / "out")
    assert str(packed_folder) in refused("pack", sparse_folder, packed_folder)
    assert "config.json" in refused("pack", tmp_path / "missing", tmp_path / "out")
    (sparse_folder / "model.safetensors").unlink()
    assert "model.safetensors" in refused("pack", sparse_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_low_memory_converts_from_file_to_file(prunepath_command, refused, dense_folder, corpus, tmp_path):
    options = "--num-experts 8 --sequence-length 32 --partition-tokens 256 --router-tokens 512 --calibration-tokens 256"
    arguments = ("convert", dense_folder, tmp_path / "low", "--data", corpus, *options.split(), "--low-memory")
    assert "--device" in refused(*arguments, "--device", "cuda")
    result = prunepath_command(*arguments)
    assert result.exit_code == 0, result.output
    assert "router KL" in result.stdout and "Wrote" in result.stdout
    generated = prunepath_command("generate", tmp_path / "low", "Bird", "--budget", 0.3)
    assert generated.exit_code == 0, generated.output
