"""The sparse FFN as a module: thresholds, hooks, layouts, and weights that stay where they are."""

import copy
import threading
import warnings

import pytest
import torch
from torch import nn

import prunepath
from prunepath.nn import FFNLayout, SparseFFN
from prunepath.nn.observers import counting, observing_inputs

H, D = 24, 40


class GatedFFN(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(H, D), nn.Linear(H, D), nn.Linear(D, H)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


@pytest.fixture
def dense():
    torch.manual_seed(0)
    return GatedFFN()


@pytest.fixture
def ffn(dense):
    layout = FFNLayout(gate="gate", up="up", down="down", activation="silu")
    ffn = SparseFFN(copy.deepcopy(dense), layout, D, router_rank=6).eval()
    for parameter in ffn.router.parameters():
        nn.init.normal_(parameter)
    ffn.lay_out_for_inference()
    ffn.threshold = 0.5
    return ffn


@pytest.fixture
def x():
    return torch.randn(6, H, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_kernels_and_masks_agree_at_any_threshold(ffn, dense, x):
    for threshold in (1.0, 0.9, 0.5, 0.1, 1e-6):
        ffn.threshold = threshold
        served = ffn(x)
        with torch.enable_grad():
            masked = ffn(x)
        torch.testing.assert_close(served, masked, rtol=1e-5, atol=1e-6)
    ffn.threshold = 1.0
    torch.testing.assert_close(ffn(x), dense(x), rtol=1e-5, atol=1e-6)


def test_a_skipped_infinity_counts_for_nothing(ffn, x):
    ffn.threshold = 0.3
    mask, _ = ffn.select(x)
    never = (~mask).all(0).nonzero()[0].item()
    with torch.no_grad():
        ffn.up.weight[never] = torch.inf
        assert ffn(x).isfinite().all()
    assert ffn(x).isfinite().all(), "the masked computation"


@torch.no_grad()
def test_requests_have_their_own_thresholds_until_one_is_set_for_all(ffn, x):
    each = []
    for threshold in (0.2, 0.9):
        ffn.threshold = threshold
        each.append(ffn(x))
    ffn.set_request_thresholds([0.2, 0.9])
    assert torch.equal(ffn(x), torch.cat([each[0][:3], each[1][3:]]))
    ffn.threshold = 0.9
    assert torch.equal(ffn(x), each[1])
    assert torch.equal(ffn(x[:5]), each[1][:5]), "any number of tokens again"
    ffn.set_request_thresholds([0.2, 0.9, 0.2])
    ffn.set_request_thresholds(None)
    assert torch.equal(ffn(x), each[1])


@torch.no_grad()
def test_request_thresholds_are_turned_in_place(ffn):
    ffn.set_request_thresholds([0.2, 0.9])
    pointer = ffn._thresholds(2).data_ptr()
    ffn.set_request_thresholds([0.4, 0.6])
    assert ffn._thresholds(2).data_ptr() == pointer
    ffn.threshold = 0.3
    assert ffn._request_thresholds.tolist() == pytest.approx([0.3, 0.3]), "what a captured graph reads"


@torch.no_grad()
def test_thresholds_stay_float32_whatever_the_model_is_cast_to(ffn, x):
    ffn.threshold = 0.123456789
    ffn.to(torch.bfloat16)
    assert ffn._threshold.dtype == torch.float32 and ffn._threshold.item() == pytest.approx(0.123456789)
    assert ffn(x.bfloat16()).dtype == torch.bfloat16


@torch.no_grad()
def test_hooks_nest_and_end_with_their_block(ffn, x):
    seen = []

    def note(name):
        return lambda ffn, tokens: seen.append((name, len(tokens)))

    with observing_inputs({ffn: note("outer")}):
        with observing_inputs({ffn: note("inner")}):
            ffn(x)
        ffn(x[:2])
    ffn(x)
    assert seen == [("outer", 6), ("inner", 6), ("outer", 2)]
    with counting([ffn]) as outer, counting([ffn]) as inner:
        ffn(x)
    assert outer.histogram[0].sum() == inner.histogram[0].sum() == 6


@torch.no_grad()
def test_min_experts_counts_from_the_next_call_on(ffn, x):
    ffn.threshold = 1e-6
    with counting([ffn]) as few:
        ffn(x)
    ffn.min_experts = 7
    with counting([ffn]) as more:
        ffn(x)
    assert few.per_layer == [1 / D] and more.per_layer == [7 / D]


@torch.no_grad()
def test_weights_written_through_data_count_at_once(ffn, dense, x):
    ffn.threshold = 1.0
    ffn(x)
    for name in ("gate", "up", "down"):
        update = 0.1 * torch.randn_like(getattr(dense, name).weight)
        getattr(dense, name).weight.data += update
        getattr(ffn, name).weight.data += update
        getattr(dense, name).bias.data += 1.0
        getattr(ffn, name).bias.data += 1.0
    torch.testing.assert_close(ffn(x), dense(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_replaced_layout_computes_masked_and_says_so(ffn, x):
    expected = ffn(x)
    ffn.down.weight.data = ffn.down.weight.data.contiguous()
    with pytest.warns(UserWarning, match="not laid out for inference, .* call prunepath.for_inference"):
        masked = ffn(x)
    torch.testing.assert_close(masked, expected, rtol=1e-5, atol=1e-6)
    prunepath.for_inference(ffn)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(ffn(x), expected)


def test_training_goes_on_after_laying_out_in_inference_mode(ffn, x):
    with torch.inference_mode():
        prunepath.for_training(ffn)
        ffn(x)
        prunepath.for_inference(ffn)
        ffn(x)
    before = ffn.down.weight.detach().clone()
    ffn(x).square().mean().backward()
    torch.optim.SGD(ffn.parameters(), lr=0.1).step()
    assert not torch.equal(ffn.down.weight, before)


def test_routers_require_no_gradient(ffn, x):
    ffn(x).square().mean().backward()
    assert all(not p.requires_grad and p.grad is None for p in ffn.router.parameters())
    assert all(p.grad is not None for name, p in ffn.named_parameters() if not name.startswith("router"))


def test_threads_run_one_module_alike(ffn, x):
    inputs = [x[: 1 + i % 6] for i in range(60)]
    with torch.no_grad():
        expected = [ffn(tokens) for tokens in inputs]
    wrong = []

    def run(start):
        with torch.no_grad():
            for i in range(start, len(inputs), 4):
                if not torch.equal(ffn(inputs[i]), expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.no_grad()
def test_autocast_gives_its_dtype(ffn, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = ffn(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), ffn(x), rtol=0.02, atol=0.02)


@torch.no_grad()
def test_an_executor_stands_in_for_the_kernels_at_any_length(ffn):
    calls = []

    def execute(ffn, x):
        calls.append(len(x))
        return ffn.run_kernels(x)

    x = torch.randn(100, H)
    expected = ffn(x)
    ffn.executor = execute
    torch.testing.assert_close(ffn(x), expected, rtol=1e-5, atol=1e-6)
    ffn(x[:1])
    assert calls == [100, 1]
