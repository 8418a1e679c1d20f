"""The Triton kernels compile for GPUs that are not there: registers hold everything, and nothing is fused."""

import os
import re
import subprocess

import pytest

triton = pytest.importorskip("triton", reason="needs the package triton")

from prunepath.triton_kernels import route  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 interprets kernels instead of compiling"
)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compile_route(arch, block, dtype="fp32", **options):
    pointers = {"logits": f"*{dtype}", "expert_ids": "*i32", "probs": "*fp32", "counts": "*i32"}
    constants = {"stride_expert": 1, "THRESHOLD_IS_TENSOR": True, "BLOCK": block}
    signature = {name: "i32" for name in route.route_kernel.arg_names}
    signature |= pointers | {"threshold": "*fp32"} | dict.fromkeys(constants, "constexpr")
    return triton.compile(
        ASTSource(route.route_kernel, signature, constexprs=constants),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": route.num_warps(block), **options},
    )


def resources(kernel, tmp_path):
    """What the machine code of a kernel uses: {"REG": registers a thread, "STACK": bytes a thread, ...}."""
    path = tmp_path / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", path]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", output)}


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("block", "dtype"), [(16, "fp32"), (128, "bf16"), (1024, "fp16"), (4096, "fp32")])
def test_route_spills_no_registers(arch, block, dtype, tmp_path):
    kernel = compile_route(arch, block, dtype)
    used = resources(kernel, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0
    # All registers of a block fit in a multiprocessor's 65536.
    assert 0 < used["REG"] * 32 * route.num_warps(block) <= 65536


def test_a_spill_would_be_seen(tmp_path):
    assert resources(compile_route(90, 1024, maxnreg=24), tmp_path)["STACK"] > 0


def test_route_does_only_exact_arithmetic():
    """No fused, approximate or subnormal-flushing operation: the selection is the CPU's, bit for bit."""
    ptx = compile_route(90, 64).asm["ptx"]
    assert "sub.rn.f32" in ptx or "sub.f32" in ptx
    assert re.findall(r"\b(?:fma\.\S+|\S+\.approx\S*|\S+\.ftz\S*|div\.full\S*)", ptx) == []
