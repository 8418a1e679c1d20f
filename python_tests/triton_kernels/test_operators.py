"""Triton's functions under `torch.compile`, in Triton's interpreter."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="needs the package triton")

PROGRAM = """
import torch
from prunepath import ops

backend = ops.resolve_backend(torch.device("cpu"), "triton")
x, router_in, router_out = (torch.randn(shape) for shape in ((3, 32), (4, 32), (16, 4)))
gate, up, down_t, up_bias = torch.randn(64, 32), torch.randn(64, 32), torch.randn(64, 32), torch.randn(64)
limits = dict(min_experts=2, max_experts=8)
factors = dict(router_floor=torch.rand(16), router_log_scale=torch.randn(16))


def calls(x, threshold):
    z = x @ router_in.t() @ router_out.t()
    expert_ids, probs, counts = backend.route(z, threshold, **limits)
    y = backend.sparse_ffn(x, gate, up, down_t, expert_ids, counts, "silu", num_experts=16, up_bias=up_bias)
    router = (router_in, router_out, None, threshold)
    more = backend.routed_ffn(x, *router, None, up, down_t, "gelu", up_bias=up_bias, **limits)
    more += backend.routed_ffn(x, *router, None, up, down_t, "relu", **factors, up_bias=up_bias, **limits)
    return expert_ids, probs, counts, y, *more, *backend.select(z, threshold), *backend.route(z, 0.8)


compiled = torch.compile(calls, fullgraph=True, backend="aot_eager")
for threshold in (torch.tensor(0.5), torch.tensor([0.1, 0.6, 1.0])):
    for got, expected in zip(compiled(x, threshold), calls(x, threshold), strict=True):
        assert got.dtype == expected.dtype and torch.equal(got, expected)

checks = dict(test_utils=("test_schema", "test_faketensor"))
triton = torch.ops.prunepath_triton
router = (router_in, router_out, None, torch.tensor(0.5))
torch.library.opcheck(triton.routed_ffn.default, (x, *router, gate, up, down_t, "silu"), limits, **checks)
torch.library.opcheck(
    triton.routed_ffn.default, (x, *router, None, up, down_t, "silu"), {**factors, **limits}, **checks
)
packed = torch.zeros(4, 16, dtype=torch.uint8), *router[1:]
scale = dict(router_in_scale=torch.ones(4))
torch.library.opcheck(triton.routed_ffn.default, (x, *packed, gate, up, down_t, "silu"), scale, **checks)
torch.library.opcheck(triton.select.default, (x, 0.5), limits, **checks)
torch.library.opcheck(triton.route.tensor, (x, torch.tensor(0.5)), {}, **checks)
"""


def test_compile_takes_the_functions_as_operators(tmp_path):
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        cwd=tmp_path,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
