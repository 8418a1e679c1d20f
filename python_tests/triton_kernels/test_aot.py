"""The Triton kernels compile for GPUs that are not there: registers hold everything, and routing is exact."""

import os
import re
import subprocess

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs the package triton")

from prunepath.triton_kernels import ffn, route, routed_ffn, sparse_ffn  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 interprets kernels instead of compiling"
)

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
    torch.uint8: "*u8",
}


class Recorder:
    """Stands for a kernel, and notes with what it is launched."""

    def __init__(self, kernel, launches):
        self.kernel = kernel
        self.launches = launches

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((self.kernel, args, options))


@pytest.fixture
def launches(monkeypatch, tmp_path):
    """The launches of what the test calls: (kernel, arguments, options)."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(ffn, "num_multiprocessors", lambda device: 132)
    recorded = []
    for module in (ffn, route, routed_ffn, sparse_ffn):
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel") and isinstance(kernel, triton.runtime.JITFunction):
                monkeypatch.setattr(module, name, Recorder(kernel, recorded))
    return recorded


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


def resources(kernel, tmp_path):
    """What the machine code of a kernel uses: {"REG": registers a thread, "STACK": bytes a thread, ...}."""
    path = tmp_path / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", path]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", output)}


def assert_no_spills(arch, launches, tmp_path):
    for kernel, args, options in launches:
        used = resources(compile_launch(arch, kernel, args, options), tmp_path)
        assert used["STACK"] <= 16 and used["LOCAL"] == 0, (kernel.__name__, options, used)
        assert 0 < used["REG"] * 32 * options.get("num_warps", 4) <= 65536


def call_routed_ffn(
    T, H, E, n, rank, *, gated=True, dtype=torch.bfloat16, biases=False, activation="silu", factored=False, packed=False
):
    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    D = E * n
    rows = 2 * E if factored and gated else E
    router = [empty(rank, H) if rank else None, empty(rows, rank or H)]
    tables = [empty(D, H) if gated else None, empty(D, H), empty(D, H)]
    given = {"up_bias": empty(D), "down_bias": empty(H)} if biases else {}
    if factored:
        given |= {"router_floor": empty(rows), "router_log_scale": empty(E, dtype=torch.float32)}
    if packed:
        router = [None if table is None else table[:, ::2].to(torch.uint8).contiguous() for table in router]
        given["router_out_scale"] = empty(rows)
        if rank:
            given["router_in_scale"] = empty(rank, dtype=torch.float32)
    threshold = empty(T, dtype=torch.float32)
    bias = empty(rows) if biases else None
    routed_ffn.routed_ffn(empty(T, H), *router, bias, threshold, *tables, activation, **given)


# Each kernel, each dtype, each kind of FFN, few tokens and many; not all of their combinations, which would take long.
CALLS = {
    "one token": dict(T=1, H=4096, E=14336, n=1, rank=256),
    "four tokens": dict(T=4, H=1536, E=128, n=70, rank=0, dtype=torch.float32, biases=True),
    "a few tokens": dict(T=16, H=1000, E=64, n=32, rank=0, dtype=torch.float16, gated=False, activation="gelu"),
    "a tile of tokens": dict(T=64, H=4096, E=3584, n=4, rank=256),
    "a tile in float32": dict(T=64, H=1024, E=128, n=32, rank=64, dtype=torch.float32, activation="gelu_tanh"),
}


@pytest.mark.parametrize(
    ("arch", "name"),
    [(90, name) for name in CALLS] + [(arch, name) for arch in (80, 100) for name in ("one token", "a tile of tokens")],
)
def test_ffns_spill_no_registers(launches, arch, name, tmp_path):
    call_routed_ffn(**CALLS[name])
    assert len(launches) == 7 - (CALLS[name]["rank"] == 0)
    assert_no_spills(arch, launches, tmp_path)


FACTORED = {
    "one token": dict(T=1, H=4096, E=14336, n=1, rank=256, biases=True),
    "four tokens": dict(T=4, H=1536, E=128, n=70, rank=0, dtype=torch.float32, activation="gelu", biases=True),
    "a few tokens": dict(T=16, H=1000, E=64, n=32, rank=0, dtype=torch.float16, gated=False, activation="relu2"),
    "a tile of tokens": dict(T=64, H=4096, E=3584, n=4, rank=256, activation="relu"),
}


@pytest.mark.parametrize(
    ("arch", "name"), [(90, name) for name in FACTORED] + [(arch, "a tile of tokens") for arch in (80, 100)]
)
@pytest.mark.parametrize("packed", [False, True])
def test_factored_routers_spill_no_registers(launches, arch, name, packed, tmp_path):
    call_routed_ffn(**FACTORED[name], factored=True, packed=packed)
    routers = [launch for launch in launches if launch[0].__name__ == "router_kernel"]
    assert [launch[2]["FACTORS"] for launch in routers][-1] == 1 + FACTORED[name].get("gated", True)
    assert_no_spills(arch, routers if packed else routers[-1:], tmp_path)


@pytest.mark.parametrize("num_experts", [3, 1000, 65536])
def test_routing_spills_no_registers(launches, num_experts, tmp_path):
    logits = torch.empty(2, num_experts, device="meta")
    route.route(logits, 0.5)
    route.select(logits.to(torch.bfloat16), 0.5)
    assert_no_spills(90, launches, tmp_path)


def test_given_experts_spill_no_registers(launches, tmp_path):
    table = torch.empty(64, 128, device="meta")
    ids = torch.empty(3, 16, dtype=torch.int32, device="meta")
    sparse_ffn.sparse_ffn(table[:3], None, table, table, ids, ids[:, 0].contiguous(), "relu", num_experts=16)
    assert_no_spills(90, [launch for launch in launches if launch[0].__name__ == "mark_kernel"], tmp_path)


def test_a_spill_would_be_seen(launches, tmp_path):
    route.select(torch.empty(2, 1000, device="meta"), 0.5)
    ((kernel, args, options),) = launches
    assert resources(compile_launch(90, kernel, args, {**options, "maxnreg": 24}), tmp_path)["STACK"] > 16


def test_routing_does_only_exact_arithmetic(launches):
    """No fused, approximate or subnormal-flushing operation: the selection is the CPU's, bit for bit."""
    route.route(torch.empty(2, 1000, device="meta"), 0.5)
    ptx = compile_launch(90, *launches[0]).asm["ptx"]
    assert "sub.rn.f32" in ptx or "sub.f32" in ptx
    assert re.findall(r"\b(?:fma\.\S+|\S+\.approx\S*|\S+\.ftz\S*|div\.full\S*)", ptx) == []


def test_one_token_loads_weights_16_bytes_at_a_time(launches):
    call_routed_ffn(**CALLS["one token"])
    for launch in launches:
        if launch[0].__name__ in ("hidden_kernel", "down_kernel", "router_kernel"):
            ptx = compile_launch(90, *launch).asm["ptx"]
            assert re.search(r"ld\.global\S*v4\.b32", ptx), launch[0].__name__
            assert not re.search(r"ld\.global\S*\.b16", ptx), launch[0].__name__
