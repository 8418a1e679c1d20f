"""The Triton kernels compile for GPUs that are not there: registers hold everything, and nothing is fused."""

import os
import re
import subprocess

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs the package triton")

from prunepath.triton_kernels import configs, decode, launch, prefill, route, tuned  # noqa: E402
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


class Recorder:
    """Stands for a kernel, and notes with what it is launched."""

    def __init__(self, kernel, launches):
        self.kernel = kernel
        self.launches = launches

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((self.kernel, args, options))


def launches_of(monkeypatch, arch, num_tokens, hidden_size, width, inner, dtype, parameters=False, activation="silu"):
    """The launches of `routed_ffn` for 128 experts: (kernel, arguments, options)."""
    launches = []
    for module in (decode, prefill, route):
        for name, kernel in vars(module).items():
            if name.endswith("_kernel") and isinstance(kernel, triton.runtime.JITFunction):
                monkeypatch.setattr(module, name, Recorder(kernel, launches))
    monkeypatch.setattr(configs, "architecture", lambda device: f"sm_{arch}")
    E, n, H = 128, width, hidden_size

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    x, w_in, w_out = empty(num_tokens, H), empty(E, n, inner, H), empty(E, n, H)
    given = (empty(E, n, inner), empty(H), empty(E, n)) if parameters else (None, None, None)
    router = launch.Router(empty(E, H), None, empty(num_tokens, dtype=torch.float32), 1, 0)
    counts = empty(num_tokens, dtype=torch.int32)
    launch.run(x, w_in, w_out, activation, *given, router, None, counts, torch.empty_like(x), None)
    return launches


POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.int8: "*i8",
}


def compile_launch(arch, kernel, args, options):
    """Compiles as Triton does at the launch: integers that are 1 or multiples of 16 are known."""
    values = dict(zip(kernel.arg_names, args, strict=False))
    values |= {name: value for name, value in options.items() if name in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        known = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (known and isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32"
            if known and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", arch, 32),
        options={name: value for name, value in options.items() if name not in kernel.arg_names},
    )


# ptxas puts a few scalars on the stack, outside of the innermost loops, where registers are as many as blocks that run
# beside each other can have. Blocks of weights that do not fit take hundreds of bytes.
SCALARS_ON_STACK = 40


def assert_no_spills(arch, launches, tmp_path):
    for kernel, args, options in launches:
        used = resources(compile_launch(arch, kernel, args, options), tmp_path)
        assert used["STACK"] <= SCALARS_ON_STACK and used["LOCAL"] == 0, (kernel.__name__, options, used)
        assert 0 < used["REG"] * 32 * options["num_warps"] <= 65536


# Each kernel, each dtype, each kind of FFN, few columns and many; not all of their combinations, which would take long.
CALLS = [
    (1, 4096, 112, 2, torch.bfloat16, False, "silu"),
    (4, 4096, 112, 2, torch.bfloat16, True, "silu"),
    (2, 1024, 32, 1, torch.float16, True, "gelu"),
    (4, 1536, 70, 2, torch.float32, False, "gelu_tanh"),
    (8, 1536, 70, 2, torch.bfloat16, True, "silu"),
    (32, 4096, 128, 1, torch.float16, False, "relu"),
    (16, 1024, 32, 1, torch.float32, False, "relu2"),
    (300, 4096, 112, 2, torch.bfloat16, False, "silu"),
]


@pytest.mark.parametrize(
    ("arch", "call"), [(90, call) for call in CALLS] + [(80, call) for call in CALLS[1::2]], ids=str
)
def test_ffns_spill_no_registers(monkeypatch, arch, call, tmp_path):
    *sizes, dtype, parameters, activation = call
    launches = launches_of(monkeypatch, arch, *sizes, dtype, parameters, activation)
    fused = sizes[0] == 1 or (sizes[0] <= 4 and dtype == torch.float32)
    assert len(launches) == (2 if fused else 3 if sizes[0] <= 64 else 6)
    assert_no_spills(arch, launches, tmp_path)


@pytest.mark.parametrize("key", sorted(tuned.TABLE), ids=str)
def test_tuned_configurations_spill_no_registers(monkeypatch, key, tmp_path):
    name, hidden_size, intermediate_size, inner, dtype, num_tokens = key
    if not name.startswith("sm_"):
        pytest.skip("compiles for NVIDIA's GPUs alone")
    arch = int(name.removeprefix("sm_"))
    sizes = (num_tokens, hidden_size, intermediate_size // 128, inner)
    launches = launches_of(monkeypatch, arch, *sizes, getattr(torch, dtype))
    assert_no_spills(arch, launches[1:], tmp_path)


def test_few_tokens_load_weights_16_bytes_at_a_time(monkeypatch):
    kernel, args, options = launches_of(monkeypatch, 90, 1, 4096, 112, 2, torch.bfloat16)[1]
    ptx = compile_launch(90, kernel, args, options).asm["ptx"]
    assert len(re.findall(r"ld\.global\S*evict_first\S*v4\.b32|cp\.async\.cg\S*", ptx)) >= 3
    assert re.findall(r"ld\.global\S*evict_first\S*\.b16|cp\.async\.ca\S*", ptx) == []


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("num_tokens", [1, 8, 32])
def test_kernels_wait_for_the_one_before_where_they_overlap(monkeypatch, arch, num_tokens):
    for kernel, args, options in launches_of(monkeypatch, arch, num_tokens, 1024, 32, 1, torch.bfloat16):
        ptx = compile_launch(arch, kernel, args, options).asm["ptx"]
        overlaps = configs.overlaps(f"sm_{arch}", num_tokens)
        assert overlaps == (arch >= 90 and num_tokens < 32)
        assert ("launch_pdl" in options) == ("griddepcontrol" in ptx) == overlaps
        if overlaps:
            accesses = r"\b(?:ld|st|atom|red|cp\.async)\S*\.global\S*|griddepcontrol\.wait"
            assert re.search(accesses, ptx).group() == "griddepcontrol.wait"


@pytest.mark.parametrize("arch", ["gfx942", "gfx90a", "interpreter"])
def test_other_gpus_overlap_no_kernels(arch):
    assert not configs.overlaps(arch, 1)
