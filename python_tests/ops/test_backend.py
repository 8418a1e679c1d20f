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


@pytest.fixture(autouse=True)
def _own_choice(monkeypatch):
    """Each test chooses a backend for itself."""
    monkeypatch.setattr(backend, "_chosen", "auto")
    monkeypatch.setattr(backend, "_resolved", {})


def resolve(name, device):
    ops.use_backend(name)
    return ops.resolve_backend(torch.device(device))


@pytest.mark.parametrize("name", ["auto", "cpu", "reference"])
def test_backends_of_the_cpu_agree(name, make_ffn):
    backend = resolve(name, "cpu")
    assert backend.name == ("cpu" if name == "auto" else name)
    ffn = make_ffn()
    threshold = torch.tensor(0.5)
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    ids, probs, counts = backend.route(logits, threshold, min_experts=2)
    for a, b in zip((ids, probs, counts), ops.route(logits, 0.5, min_experts=2), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(backend.select(logits, threshold)[0], ops.select(logits, 0.5)[0])
    y = ffn.sparse(backend.sparse_ffn, ids, counts)
    torch.testing.assert_close(y, ffn.sparse(ops.sparse_ffn, ids, counts))
    got, expected = ffn.routed(backend.routed_ffn, threshold), ffn.routed(ops.routed_ffn, threshold)
    torch.testing.assert_close(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def test_unknown_backend_is_named():
    with pytest.raises(errors.BackendError, match=r"Expected a backend out of auto, .* got 'fast'"):
        resolve("fast", "cpu")


def test_backend_of_another_device_is_refused():
    with pytest.raises(errors.BackendError, match="cpu works on cpu tensors, got the device cuda"):
        resolve("cpu", "cuda")
    with pytest.raises(errors.BackendError, match="No backend was made for the device meta"):
        resolve("auto", "meta")


def test_cpu_is_never_replaced_silently(monkeypatch):
    monkeypatch.setattr(native, "_loaded", True)
    monkeypatch.setattr(native, "_error", "The library is missing.")
    for name in ("auto", "cpu"):
        with pytest.raises(errors.NativeLibraryError, match="The library is missing"):
            resolve(name, "cpu")
    assert ops.backends()["cpu"] == "The library is missing."


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU answers")
def test_gpu_backends_say_why_they_are_missing(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in ("cuda", "triton"):
        with pytest.raises(errors.BackendError, match=r"needs|missing"):
            resolve(name, "cuda")


@pytest.mark.parametrize("triton, name", [("No Triton.", "reference"), (None, "triton")])
def test_a_gpu_without_the_cuda_library_warns_and_uses_the_next_best(monkeypatch, triton, name):
    monkeypatch.setattr(native, "cuda_error", lambda: "The library is missing.")
    monkeypatch.setattr(backend, "_missing", {"triton": triton}.get)
    with pytest.warns(UserWarning, match=f"backend {name} is used on cuda. The library is missing"):
        assert backend._automatic(torch.device("cuda")) == name


def test_a_gpu_older_than_what_is_compiled_is_not_used(monkeypatch):
    monkeypatch.setattr(torch.ops.prunepath, "cuda_architectures", lambda: "90,100", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    for capability, outdated in (((8, 9), True), ((9, 0), False), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, value=capability: value)
        reason = backend._outdated(torch.device("cuda"))
        assert (reason is not None) == outdated
        assert not outdated or ("capability 9.0 or newer, got Old GPU of 8.9" in reason and reason.endswith("."))
