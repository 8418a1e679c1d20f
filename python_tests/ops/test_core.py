"""csrc/core and the torch-free parts of csrc/cpu, compiled on their own and called through ctypes."""

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from prunepath import _host
from prunepath.ops import reference

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(not CSRC.is_dir(), reason="needs the source tree"),
]

SOURCE = r"""
#include "core/routing.h"
#include "cpu/ffn_kernels_portable.cpp"

using namespace prunepath;

extern "C" {
void masses(float max, const float* z, int64_t size, int64_t* out) {
  for (int64_t i = 0; i < size; ++i) out[i] = mass_units(max, z[i]);
}
void keys(const float* z, int64_t size, uint32_t* out) {
  for (int64_t i = 0; i < size; ++i) out[i] = ordered_key(z[i]);
}
int64_t ties(float tau, int64_t total, int64_t least, int64_t most, int64_t rank, int64_t before,
             int64_t count, int64_t mass) {
  return active_ties({tau, total, least, most}, rank, before, count, mass);
}
int is_needed_(int64_t before, float tau, int64_t total) { return is_needed(before, tau, total); }
void widen(const void* data, int dtype, int64_t size, float* out) {
  for (int64_t i = 0; i < size; ++i) out[i] = load_as_float(data, static_cast<DType>(dtype), i);
}
void widen_vector(const void* data, int dtype, int64_t size, float* out) {
  const auto widen_all = [&](auto* from) {
    for (int64_t i = 0; i < size; i += 2 * kLanes) {
      const Pair pair = in_order(load_pair(from + i), from);
      store(out + i, pair.a);
      store(out + i + kLanes, pair.b);
    }
  };
  if (dtype == 1) widen_all(static_cast<const BFloat16*>(data));
  else widen_all(static_cast<const Float16*>(data));
}
void narrow(const float* data, int dtype, int64_t size, void* out) {
  for (int64_t i = 0; i < size; ++i) {
    if (dtype == 1) from_float(data[i], static_cast<BFloat16*>(out) + i);
    else from_float(data[i], static_cast<Float16*>(out) + i);
  }
}
void portable_ffn(int64_t E, int64_t n, int64_t H, int dtype, const void* gate, const void* up,
                  const void* down, const uint64_t* expert_masks, const void* x, float* wide,
                  float* sum, float* partial) {
  const DType type = static_cast<DType>(dtype);
  int32_t neurons[64];
  uint64_t masks[64];
  int64_t count = 0;
  for (int32_t j = 0; j < E * n; ++j) {
    if (expert_masks[j / n]) {
      neurons[count] = j;
      masks[count++] = expert_masks[j / n];
    }
  }
  for (int t = 0; t < 3; ++t) {
    const int64_t size = dtype == 0 ? 4 : 2;
    kFfnKernelsPortable.widen(static_cast<const char*>(x) + t * H * size, type, 1, H, type,
                              wide + t * H);
  }
  const FfnWeights weights{{E, n, H, gate != nullptr, H, H, H}, type, gate, up, down, {}, {},
                           Activation::kSilu};
  kFfnKernelsPortable.run_neurons(weights, {neurons, masks}, {3, x, H, wide}, 0, count, sum, partial);
}
}
"""
ROUTE_SOURCE = r"""
#include "cpu/route_kernels_{kernel}.cpp"

using namespace prunepath;

extern "C" void masses(float max, const float* z, int64_t size, int32_t* out) {{
  for (int64_t i = 0; i < size; i += kLanes) store(out + i, mass_of(max, z + i));
}}
"""
# The route kernels' instruction sets, as CMakeLists.txt has them.
ROUTE_OPTIONS = {
    "portable": [],
    "avx2": ["avx2", "fma", "f16c"],
    "avx512": ["avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"],
}
DTYPES = {1: torch.bfloat16, 2: torch.float16}


def compiled(folder: Path, source: str, options: list[str]) -> ctypes.CDLL:
    (folder / "core_test.cpp").write_text(source)
    path = folder / "core_test.so"
    command = [COMPILER, "-std=c++20", "-O2", "-ffp-contract=off", "-shared", "-fPIC", f"-I{CSRC}", *options]
    subprocess.run([*command, str(folder / "core_test.cpp"), "-o", str(path)], check=True)
    return ctypes.CDLL(str(path))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    loaded = compiled(tmp_path_factory.mktemp("core"), SOURCE, [])
    loaded.masses.argtypes = [ctypes.c_float, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    loaded.keys.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    loaded.ties.argtypes = [ctypes.c_float] + [ctypes.c_int64] * 7
    loaded.ties.restype = ctypes.c_int64
    loaded.is_needed_.argtypes = [ctypes.c_int64, ctypes.c_float, ctypes.c_int64]
    for function in (loaded.widen, loaded.widen_vector, loaded.narrow):
        function.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_void_p]
    loaded.portable_ffn.argtypes = [ctypes.c_int64] * 3 + [ctypes.c_int] + [ctypes.c_void_p] * 8
    return loaded


def test_mass_of_a_million_logits(library):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1_000_000, generator=generator).abs().neg() * 8
    z[0] = 0.0
    got = torch.empty(z.numel(), dtype=torch.int64)
    library.masses(0.0, z.data_ptr(), z.numel(), got.data_ptr())
    assert torch.equal(got, reference.mass(z[None])[0])


@pytest.mark.parametrize("kernel", ROUTE_OPTIONS)
def test_every_route_kernel_has_the_reference_masses(kernel, tmp_path):
    features = _host.cpu_features()
    if not all(features.get(name, False) for name in ROUTE_OPTIONS[kernel]):
        pytest.skip(f"this processor has no {kernel}")
    options = [f"-m{name}" for name in ROUTE_OPTIONS[kernel]]
    route = compiled(tmp_path, ROUTE_SOURCE.format(kernel=kernel), options)
    route.masses.argtypes = [ctypes.c_float, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    steps = torch.rand(2**21, generator=torch.Generator().manual_seed(0)) * 22
    # Where the integer and the fraction of t change, and what no polynomial should see.
    edges = (torch.arange(31)[:, None] + torch.arange(-8, 8) * 2.0**-20).flatten() / reference.LOG2_E
    special = torch.tensor([math.inf, 3e38, 1e-45, 0.0] * 4)
    for top in (0.0, 1.5, 3.4e38, math.inf, -math.inf):
        z = top - torch.cat([torch.zeros(16), steps, edges.clamp(min=0), special])
        z = z.masked_fill(z.isnan(), -math.inf)  # of infinities
        got = torch.empty(z.numel(), dtype=torch.int32)
        largest = z.max().item()
        route.masses(largest, z.data_ptr(), z.numel(), got.data_ptr())
        assert torch.equal(got.long(), reference.mass(z[None])[0]), f"largest logit {largest}"


def test_need(library):
    assert library.is_needed_(49, 0.5, 100) and not library.is_needed_(50, 0.5, 100)
    assert library.is_needed_(100, 1.0, 100) and library.is_needed_(100, float("nan"), 100)
    assert not library.is_needed_(0, 0.0, 100)


def test_keys_are_in_the_order_of_the_logits(library):
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-40, 40).repeat(125)
    z = (
        torch.cat([values, torch.tensor([-math.inf, math.inf, 0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38])])
        .sort()
        .values
    )
    keys = torch.empty(z.numel(), dtype=torch.int32)
    library.keys(z.data_ptr(), z.numel(), keys.data_ptr())
    keys = keys.long() & 0xFFFFFFFF
    assert torch.equal(keys.diff().sign(), torch.sign((z[1:] > z[:-1]).long())) and keys[0] > 0


def test_ties_are_active_one_by_one(library):
    for case in ((0.5, 100, 1, 9, 2, 30, 5, 10), (0.5, 100, 8, 9, 2, 30, 9, 10), (1.0, 100, 1, 4, 2, 30, 9, 10)):
        tau, total, least, most, rank, before, count, mass = case
        active = [
            rank + i < most and (rank + i < least or bool(library.is_needed_(before + i * mass, tau, total)))
            for i in range(count)
        ]
        assert library.ties(*case) == sum(active) and active == sorted(active, reverse=True)


@pytest.mark.parametrize("code", DTYPES)
@pytest.mark.parametrize("function", ["widen", "widen_vector"])
def test_every_16_bit_value_widens_as_in_torch(library, code, function):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(DTYPES[code])
    got = torch.empty(values.numel())
    getattr(library, function)(values.data_ptr(), code, values.numel(), got.data_ptr())
    expected = values.float()
    assert torch.equal(got.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(got[numbers].view(torch.int32), expected[numbers].view(torch.int32))


@pytest.mark.parametrize("code", DTYPES)
def test_narrowing_rounds_as_torch_does(library, code):
    dtype = DTYPES[code]
    exact = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    halfway = (exact.double() + exact.double().roll(-1)).mul(0.5).float()
    scales = 2.0 ** torch.arange(-30, 20).repeat(1000)
    random = torch.randn(50_000, generator=torch.Generator().manual_seed(0)) * scales
    values = torch.cat([exact, halfway, random, torch.tensor([65519.99, 65520.0, 3.4e38, 1e-45])])
    values = torch.cat([values, torch.nextafter(values, torch.tensor(0.0))])
    got = torch.empty(values.numel(), dtype=dtype)
    library.narrow(values.data_ptr(), code, values.numel(), got.data_ptr())
    expected = values.to(dtype)
    assert torch.equal(got.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(got[numbers].view(torch.int16), expected[numbers].view(torch.int16))


@pytest.mark.parametrize("code, dtype", [(0, torch.float32), *DTYPES.items()])
@pytest.mark.parametrize("gated", [False, True])
def test_portable_kernels(library, make_ffn, code, dtype, gated):
    """The kernels of processors without AVX2, whatever this one has."""
    ffn = make_ffn(3, 6, 7, 29, gated=gated, dtype=dtype, biases=False)
    active = torch.tensor([[1, 0, 1, 0, 1, 1], [0, 0, 1, 0, 0, 1], [1, 0, 0, 0, 1, 0]])
    masks = (active << torch.arange(3)[:, None]).sum(0)
    wide, sums, partial = torch.zeros(3, 29), torch.zeros(3, 29), torch.zeros(3, 29)
    tensors = (*ffn.tables, masks, ffn.x, wide, sums, partial)
    library.portable_ffn(6, 7, 29, code, *(None if t is None else t.data_ptr() for t in tensors))
    counts = active.sum(1).int()
    ids = active.argsort(dim=1, descending=True, stable=True).int()
    expected = ffn.wide().sparse(reference.sparse_ffn, ids, counts)
    assert (sums.double() - expected).norm() <= 1e-6 * expected.norm()
