"""Every CUDA source compiles for every architecture that is shipped, and no kernel spills registers. Needs no GPU."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).resolve().parents[1] / "csrc"
NVCC = shutil.which("nvcc")

pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc, which is not on the path")


@pytest.mark.parametrize("architecture", ["80", "90a"])
@pytest.mark.parametrize("source", sorted(path.name for path in CSRC.glob("cuda/*.cu")))
def test_no_kernel_spills(source, architecture, tmp_path):
    exact = ["-fmad=false"] if source.startswith("route_") else []
    command = [NVCC, "-std=c++20", "-O3", *exact, "-cubin", f"-arch=sm_{architecture}", "-Xptxas=-v"]
    defines = ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    folders = [f"-I{CSRC}", "-isystem", str(Path(torch.__file__).parent / "include")]
    compiled = subprocess.run(
        [*command, *defines, *folders, str(CSRC / "cuda" / source), "-o", str(tmp_path / "kernels.cubin")],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert compiled.returncode == 0, compiled.stderr
    kernels = re.findall(r"entry function '(\S+)'", compiled.stderr)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", compiled.stderr)
    assert len(spills) >= len(kernels)  # device functions that are not inlined have theirs too
    assert all(stores == loads == "0" for stores, loads in spills), compiled.stderr
