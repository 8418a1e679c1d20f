"""The choice of a backend: names, reasons, and no silent replacement."""

import pytest
import torch

from prunepath import errors, native, ops
from prunepath.ops import backend


def test_every_backend_has_a_state():
    states = ops.backends()
    assert set(states) == {"triton", "cuda", "cpu", "reference"}
    assert states["reference"] == states["cpu"] == "available"
    for state in states.values():
        assert state == "available" or state.endswith(".")


@pytest.mark.parametrize("name", ["auto", "cpu", "reference"])
def test_backends_of_the_cpu_agree(name, make_ffn):
    backend = ops.resolve_backend(name, torch.device("cpu"))
    assert backend.name == ("cpu" if name == "auto" else name)
    ffn = make_ffn()
    threshold = torch.tensor(0.5)
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    ids, probs, counts = backend.route(logits, threshold, min_experts=2)
    for a, b in zip((ids, probs, counts), ops.route(logits, 0.5, min_experts=2), strict=True):
        assert torch.equal(a, b)
    y = backend.sparse_ffn(ffn.x, ffn.w_in, ffn.w_out, ids, counts, "silu", **ffn.parameters)
    torch.testing.assert_close(y, ops.sparse_ffn(ffn.x, ffn.w_in, ffn.w_out, ids, counts, "silu", **ffn.parameters))
    arguments = (ffn.x, ffn.router_weight, ffn.router_bias, threshold, ffn.w_in, ffn.w_out, "silu")
    got, expected = backend.routed_ffn(*arguments), ops.routed_ffn(*arguments)
    torch.testing.assert_close(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def test_unknown_backend_is_named():
    with pytest.raises(errors.BackendError, match=r"Expected a backend out of auto, .* got 'fast'"):
        ops.resolve_backend("fast", torch.device("cpu"))


def test_backend_of_another_device_is_refused():
    with pytest.raises(errors.BackendError, match="cpu works on cpu tensors, got the device cuda"):
        ops.resolve_backend("cpu", torch.device("cuda"))
    with pytest.raises(errors.BackendError, match="No backend was made for the device meta"):
        ops.resolve_backend("auto", torch.device("meta"))


def test_cpu_is_never_replaced_silently(monkeypatch):
    monkeypatch.setattr(native, "_loaded", True)
    monkeypatch.setattr(native, "_error", "The library is missing.")
    for name in ("auto", "cpu"):
        with pytest.raises(errors.NativeLibraryError, match="The library is missing"):
            ops.resolve_backend(name, torch.device("cpu"))
    assert ops.backends()["cpu"] == "The library is missing."


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU answers")
def test_gpu_backends_say_why_they_are_missing(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in ("cuda", "triton"):
        with pytest.raises(errors.BackendError, match=r"needs|missing"):
            ops.resolve_backend(name, torch.device("cuda"))


@pytest.mark.parametrize("triton, name", [("No Triton.", "reference"), (None, "triton")])
def test_a_gpu_without_the_cuda_library_warns_and_uses_the_next_best(monkeypatch, triton, name):
    monkeypatch.setattr(native, "cuda_error", lambda: "The library is missing.")
    monkeypatch.setattr(backend, "_missing", {"triton": triton}.get)
    with pytest.warns(UserWarning, match=f"backend {name} is used on cuda. The library is missing"):
        assert backend._automatic(torch.device("cuda")) == name


@pytest.fixture
def two_backends(monkeypatch):
    """`auto` as on a GPU, of two backends that answer with their names."""

    def operators(name):
        def answer(x, *args, **kwargs):
            return name, args, kwargs

        return backend.Backend(name, answer, answer, answer)

    monkeypatch.setattr(native, "cuda_error", lambda: None)
    monkeypatch.setattr(backend, "_missing", lambda name: None)
    monkeypatch.setattr(backend, "_native", operators)
    monkeypatch.setattr(backend, "_triton", lambda: operators("triton"))
    return ops.resolve_backend("auto", torch.device("cuda"))


@pytest.mark.parametrize(
    "num_tokens, dtype, numel, name",
    [
        (1, torch.bfloat16, 1 << 26, "cuda"),
        (16, torch.float16, 1 << 26, "cuda"),
        (17, torch.float16, 1 << 26, "triton"),
        (64, torch.bfloat16, 1 << 27, "triton"),
        (64, torch.bfloat16, 1 << 25, "cuda"),
        (65, torch.bfloat16, 1 << 26, "cuda"),
        (32, torch.float32, 1 << 26, "cuda"),
    ],
)
def test_auto_takes_for_each_call_on_a_gpu_the_kernels_that_were_faster(two_backends, num_tokens, dtype, numel, name):
    x, w_in = (torch.empty(size, dtype=dtype, device="meta") for size in ((num_tokens, 8), (numel,)))
    assert two_backends.sparse_ffn(x, w_in, 1, b_in=2) == (name, (w_in, 1), {"b_in": 2})
    assert two_backends.routed_ffn(x, 3, 4, 5, w_in, 6) == (name, (3, 4, 5, w_in, 6), {})


def test_auto_takes_cuda_where_it_is_compiled(two_backends):
    w_in = torch.empty(1 << 26, dtype=torch.bfloat16, device="meta")
    compiled = torch.compile(
        lambda x: (x + 1, two_backends.routed_ffn(x, None, None, None, w_in)[0]), fullgraph=True, backend="eager"
    )
    assert compiled(torch.zeros(32, 8, dtype=torch.bfloat16))[1] == "cuda"
