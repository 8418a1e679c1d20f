"""Every kernel that this processor has, chosen by PRUNEPATH_CPU_KERNEL in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from prunepath import ops

NEEDS = {
    "portable": (),
    "avx2": ("avx2", "fma", "f16c"),
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
    "avx512_bf16": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16"),
}
ROOT = Path(__file__).parents[2]
# What does not depend on the kernel, or takes long for what it adds.
SKIPPED = "not opcheck and not compile and not named and not boundaries"


def run(arguments: list[str], kernel: str, folder: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PRUNEPATH_CPU_KERNEL": kernel}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def supported(kernel: str) -> bool:
    from prunepath import _host

    features = _host.cpu_features()
    return all(features.get(name, False) for name in NEEDS[kernel])


@pytest.mark.parametrize("kernel", NEEDS)
def test_every_kernel_passes_the_operators_tests(kernel, tmp_path):
    if not supported(kernel):
        pytest.skip(f"this processor has no {kernel}")
    files = [str(Path(__file__).with_name(f"test_{name}.py")) for name in ("route", "sparse_ffn", "routed_ffn")]
    options = ["-x", "-n0", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    result = run(["-m", "pytest", *options, "-k", SKIPPED, *files], kernel, tmp_path)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert f"CPU kernel: {kernel}" in result.stdout


@pytest.mark.parametrize("kernel", [*NEEDS, "avx1024"])
def test_a_kernel_that_is_not_here_is_one_sentence(kernel, tmp_path):
    code = (
        "from prunepath import errors, ops\n"
        "try:\n    print(ops.cpu_kernel())\n"
        "except errors.BackendError as e:\n    print(e)\n"
    )
    result = run(["-c", code], kernel, tmp_path)
    assert result.returncode == 0, result.stderr
    if kernel in NEEDS and supported(kernel):
        assert result.stdout == f"{kernel}\n"
    else:
        (sentence,) = result.stdout.splitlines()
        assert sentence.startswith("Expected PRUNEPATH_CPU_KERNEL to be unset or one of the kernels")
        assert sentence.endswith(f"portable), got '{kernel}'.")


def test_operators_and_backends_refuse_it_too(tmp_path):
    code = (
        "import torch\nfrom prunepath import errors, ops\n"
        "print(ops.backends()['cpu'])\n"
        "x, w = torch.zeros(1, 4), torch.zeros(6, 4)\n"
        "ids, counts = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)\n"
        "try:\n    ops.sparse_ffn(x, None, w, w, ids, counts, 'relu', num_experts=2)\n"
        "except RuntimeError as e:\n    print(e)\n"
        "try:\n    ops.resolve_backend('cpu', 'cpu')\n"
        "except errors.BackendError as e:\n    print(e)\n"
    )
    result = run(["-c", code], "sse9", tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 3 and all("got 'sse9'" in line for line in lines), result.stdout


def test_the_best_is_chosen():
    if os.environ.get("PRUNEPATH_CPU_KERNEL"):
        pytest.skip("PRUNEPATH_CPU_KERNEL is set")
    assert ops.cpu_kernel() == [kernel for kernel in NEEDS if supported(kernel)][-1]
