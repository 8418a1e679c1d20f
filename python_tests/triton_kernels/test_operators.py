"""Triton's functions under `torch.compile`, in Triton's interpreter."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="needs the package triton")

PROGRAM = """
import torch
from prunepath import ops

backend = ops.resolve_backend("triton", torch.device("cpu"))
x, router_weight, w_in, w_out = (torch.randn(shape) for shape in ((3, 32), (16, 32), (16, 4, 2, 32), (16, 4, 32)))
b_in, b_out, center = torch.randn(16, 4, 2), torch.randn(32), torch.randn(16, 4)


def calls(x, threshold):
    z = x @ router_weight.t()
    expert_ids, probs, counts = backend.route(z, threshold, min_experts=2, max_experts=8)
    y = backend.sparse_ffn(x, w_in, w_out, expert_ids, counts, "silu", b_in=b_in)
    more = backend.routed_ffn(x, router_weight, None, threshold, w_in, w_out, "gelu", b_out=b_out, center=center)
    return expert_ids, probs, counts, y, *more, *backend.route(z, 0.8), *backend.routed_ffn(
        x, router_weight, None, threshold, w_in, w_out, "silu", min_experts=2, max_experts=8
    )


compiled = torch.compile(calls, fullgraph=True, backend="aot_eager")
for threshold in (torch.tensor(0.5), torch.tensor([0.1, 0.6, 1.0])):
    for got, expected in zip(compiled(x, threshold), calls(x, threshold), strict=True):
        assert got.dtype == expected.dtype and torch.equal(got, expected)
operator = torch.ops.prunepath_triton.routed_ffn.default
for min_experts, max_experts in ((1, 0), (2, 8)):
    weights = (router_weight, None, torch.tensor(0.5), w_in, w_out, "silu")
    options = dict(b_in=b_in, b_out=b_out, center=center, min_experts=min_experts, max_experts=max_experts)
    torch.library.opcheck(operator, (x, *weights), options, test_utils=("test_schema", "test_faketensor"))
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
