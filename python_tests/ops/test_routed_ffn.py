"""`routed_ffn` on the CPU: the router's logits, the selection, and the FFN given that selection."""

import math
import threading

import pytest
import torch

from prunepath import ops
from prunepath.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OP = torch.ops.prunepath.routed_ffn.default
IN, OUT = ("router_in",), ("router_out",)


def make_exact(ffn, low_rank):
    """Gives the router small integers, so that its logits are exact in any order of summation; returns them."""
    generator = torch.Generator().manual_seed(7)

    def integers(tensor, low, high):
        tensor.copy_(torch.randint(low, high + 1, tensor.shape, generator=generator))

    integers(ffn.x, -2, 2)
    if low_rank:
        ffn.router_in.zero_()[:, ::5] = 1
        integers(ffn.router_out, -1, 1)
    else:
        ffn.router_in = None
        ffn.router_out = torch.zeros_like(ffn.up[: ffn.num_experts])
        integers(ffn.router_out[:, :6], -1, 1)
    ffn.router_bias.copy_(torch.arange(ffn.num_experts) % 5 / 4)
    return ffn.logits()


def clear_thresholds(logits, tau):
    """A threshold near `tau` for each token, in the middle of the mass of the expert that reaches it, so that rounding
    changes no selection."""
    before = reference.mass_before(logits).sort(1).values
    ends = torch.cat([before, torch.ones_like(before[:, :1])], 1)
    last = (before < tau).sum(1, keepdim=True) - 1
    return ends.gather(1, torch.cat([last, last + 1], 1)).mean(1).float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 7, 64, 65, 130])
@pytest.mark.parametrize("low_rank", [False, True])
def test_equals_float64_reference(make_ffn, assert_close_to, dtype, num_tokens, low_rank):
    ffn = make_ffn(num_tokens, 12, 5, 50, rank=50 if not low_rank else 9, dtype=dtype, seed=num_tokens)
    if not low_rank:
        ffn.router_in = None
    threshold = torch.tensor(0.6)
    y, counts = ffn.routed(ops.routed_ffn, threshold)
    # Routing rounds the logits to float32; these have no near-ties that the rounding could turn.
    expected, expected_counts = ffn.wide().routed(reference.routed_ffn, threshold)
    assert y.dtype == dtype and counts.dtype == torch.int32
    assert torch.equal(counts, expected_counts)
    assert_close_to(y, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", reference.ROUTER_ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rank", [None, 9])
def test_a_factored_router_equals_the_float64_reference(make_ffn, assert_close_to, dtype, activation, gated, rank):
    for num_tokens, num_experts in ((1, 1), (2, 7), (67, 37)):
        bias_dtype = dtype if num_tokens == 2 else torch.float32
        ffn = make_ffn(num_tokens, num_experts, 3, 50, rank=rank, factored=True, gated=gated, dtype=dtype)
        ffn.factors = {name: tensor.to(bias_dtype) for name, tensor in ffn.factors.items()}
        threshold = clear_thresholds(ffn.wide().logits(activation), 0.7)
        y, counts = ffn.routed(ops.routed_ffn, threshold, activation)
        expected, expected_counts = ffn.wide().routed(reference.routed_ffn, threshold, activation)
        assert torch.equal(counts, expected_counts)
        assert_close_to(y, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 3, 65])
@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize(
    "packed, hidden_size, rank",
    [(IN, 70, 5), (OUT, 33, 6), (IN + OUT, 70, 6), (IN + OUT, 512, 256), (OUT, 70, None), (OUT, 2, None)],
)
def test_a_router_in_4_bits_equals_the_float64_reference(
    make_ffn, assert_close_to, dtype, num_tokens, factored, packed, hidden_size, rank
):
    bias_dtype = dtype if num_tokens == 3 else torch.float32
    shape = (num_tokens, 37, 3, hidden_size)
    ffn = make_ffn(*shape, rank=rank, factored=factored, packed=packed, dtype=dtype, bias_dtype=bias_dtype)
    threshold = clear_thresholds(ffn.wide().logits(), 0.7)
    y, counts = ffn.routed(ops.routed_ffn, threshold)
    expected, expected_counts = ffn.wide().routed(reference.routed_ffn, threshold)
    assert torch.equal(counts, expected_counts)
    assert_close_to(y, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed, hidden_size, rank", [(IN + OUT, 70, 6), (IN + OUT, 302, 94), (OUT, 302, None)])
def test_every_element_in_4_bits_has_its_place(make_ffn, assert_close_to, dtype, packed, hidden_size, rank):
    """Tokens of a single one, scales that are powers of two: the logits are exact."""
    ffn = make_ffn(hidden_size, 40, 1, hidden_size, rank=rank, packed=packed, dtype=dtype)
    ffn.x = torch.eye(hidden_size, dtype=dtype)
    ffn.scales = {name: 2.0 ** (-3 - torch.arange(len(scale)) % 3) for name, scale in ffn.scales.items()}
    ffn.router_bias = torch.arange(40) % 5 / 4
    for tau in (0.1, 0.5, 0.9):
        y, counts = ffn.routed(ops.routed_ffn, torch.tensor(tau))
        expected, expected_counts = ffn.wide().routed(reference.routed_ffn, torch.tensor(tau))
        assert torch.equal(counts, expected_counts)
        assert_close_to(y, expected)


def test_rows_in_4_bits_have_two_elements_a_byte():
    codes = torch.tensor([[-8, 7, 0, 3], [1, -1, 2, -2]])
    packed = reference.pack_rows(codes)
    assert packed.dtype == torch.uint8 and packed.tolist() == [[0xF0, 0xB8], [0x79, 0x6A]]
    scale = torch.tensor([0.5, 3.0])
    for dtype in DTYPES:
        rows = reference.unpack_rows(packed, scale.to(dtype))
        assert rows.dtype == torch.float32 and torch.equal(rows, codes * scale[:, None])


@pytest.mark.parametrize("activation", reference.ROUTER_ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_factored_logits_are_accurate(make_ffn, activation, gated):
    """Of two experts, the second of a known logit: at thresholds just below and just above the mass of the larger, one
    and two are active."""
    values = torch.cat(
        [torch.linspace(-30, 30, 2001), torch.linspace(-3, 3, 2001), torch.tensor([0.0, 1e-30, 1e4, -1e4])]
    )
    ffn = make_ffn(0, 2, 1, 1, rank=None, factored=True, gated=gated)
    ffn.x = values[:, None]
    rows = len(ffn.router_out)
    ffn.router_out = torch.tensor([[1.0], [0.0], [-0.5], [0.0]][:rows])
    ffn.router_bias = torch.tensor([0.0, 0.7, 0.25, 1.5][:rows])
    for log_scale in (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0):  # so that for every value some logits are near each other
        ffn.factors = {"router_floor": torch.full((rows,), 0.05), "router_log_scale": torch.tensor([0.3, log_scale])}
        logits = ffn.wide().logits(activation)
        assert logits.isfinite().all()
        larger = logits.softmax(1).amax(1).float()
        for offset, count in ((-2e-6, 1), (2e-6, 2)):
            _, counts = ffn.routed(ops.routed_ffn, larger + offset, activation)
            assert (counts == count).all(), values[counts != count]


def test_a_factor_of_zero_without_a_floor_has_no_mass(make_ffn):
    ffn = make_ffn(1, 21, 1, rank=None, factored=True, biases=False)
    ffn.router_out.zero_()
    ffn.router_bias.fill_(1.0)
    ffn.factors["router_floor"].zero_()
    ffn.router_bias[[3, 20, 21 + 5]] = 0.0  # φ_1 = silu for the first two, φ_2 for the third
    assert ffn.routed(ops.routed_ffn, torch.tensor(0.999999))[1].tolist() == [18]
    ffn.router_bias.zero_()  # nothing but −inf: equal mass everywhere
    assert ffn.routed(ops.routed_ffn, torch.tensor(0.5))[1].tolist() == [11]


@pytest.mark.parametrize("activation", reference.ROUTER_ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("where", ["router_bias", "router_floor", "router_log_scale"])
def test_nan_in_a_factored_router_selects_every_expert(make_ffn, activation, gated, where):
    ffn = make_ffn(2, 35, 1, factored=True, gated=gated)
    assert (ffn.routed(ops.routed_ffn, torch.tensor(0.2), activation)[1] < 35).all()
    parameter = ffn.router_bias if where == "router_bias" else ffn.factors[where]
    for at in (0, 33, -1):
        kept = parameter[at].clone()
        for value in (math.nan, -math.nan):
            parameter[at] = value
            assert ffn.routed(ops.routed_ffn, torch.tensor(0.2), activation)[1].tolist() == [35] * 2
        parameter[at] = kept


@pytest.mark.parametrize("activation", reference.ROUTER_ACTIVATIONS)
def test_an_infinite_factor_takes_all_the_mass(make_ffn, activation):
    ffn = make_ffn(1, 35, 1, factored=True)
    for at in (0, 17, 34):
        ffn.router_bias[at] = math.inf
        ffn.router_bias[35 + at] = -math.inf
    assert ffn.routed(ops.routed_ffn, torch.tensor(0.999999), activation)[1].tolist() == [3]


@pytest.mark.parametrize("num_experts", [1, 2, 3, 31, 33, 64, 127, 1000, 4096, 14336, 65536])
@pytest.mark.parametrize("low_rank", [False, True])
def test_selects_what_the_reference_selects_of_exact_logits(make_ffn, assert_close_to, num_experts, low_rank):
    ffn = make_ffn(5, num_experts, 1, 20, dtype=torch.bfloat16)
    logits = make_exact(ffn, low_rank)
    threshold = torch.tensor([1e-6, 0.3, 0.6, 0.95, 1.0])
    for options in ({}, {"min_experts": (num_experts + 3) // 4}, {"max_experts": (num_experts + 1) // 2}):
        active, expected_counts = reference.select(logits, threshold, **options)
        y, counts = ffn.routed(ops.routed_ffn, threshold, **options)
        assert torch.equal(counts, expected_counts)
        wide = ffn.wide()
        assert_close_to(y, reference.masked_ffn(wide.x, *wide.tables, active, "silu", **wide.biases))


def test_is_select_then_sparse_ffn(make_ffn):
    """With exact logits, the selection and the output are bitwise the two operators'."""
    ffn = make_ffn(8, 6)
    logits = make_exact(ffn, True)
    for options in ({}, {"min_experts": 3}, {"max_experts": 2}, {"min_experts": 2, "max_experts": 2}):
        for tau in (1e-6, 0.5, 0.8, 1.0):
            threshold = torch.tensor(tau)
            ids, _, counts = ops.route(logits, threshold, **options)
            y, got = ffn.routed(ops.routed_ffn, threshold, **options)
            assert torch.equal(got, counts)
            assert torch.equal(y, ffn.sparse(ops.sparse_ffn, ids, counts))


def test_logits_are_not_rounded_to_bfloat16(make_ffn):
    ffn = make_ffn(1, 2, dtype=torch.bfloat16)
    ffn.x.zero_()[0, :2] = 1.0
    ffn.router_bias = None
    weight = torch.zeros(2, 40, dtype=torch.bfloat16)
    weight[:, 0] = 256.0
    weight[1, 1] = 2.0**-3  # lost if the logit 256.125 were bfloat16
    ffn.router_in, ffn.router_out = None, weight
    assert ffn.routed(ops.routed_ffn, torch.tensor(0.52))[1].tolist() == [1]
    # The same numbers as router_in·x.
    ffn.router_in, ffn.router_out = weight, torch.eye(2, dtype=torch.bfloat16)
    assert ffn.routed(ops.routed_ffn, torch.tensor(0.52))[1].tolist() == [1]
    assert ops.select(torch.tensor([[256.0, 256.125]]), 0.52)[1].tolist() == [1]
    assert ops.select(torch.tensor([[256.0, 256.125]]).bfloat16(), 0.52)[1].tolist() == [2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "hidden_size, rank, packed", [(40, 8, ()), (333, 45, ()), (512, 256, ()), (334, 46, IN + OUT), (512, 256, IN + OUT)]
)
@pytest.mark.parametrize("factored", [False, True])
def test_a_token_is_routed_alike_alone_and_in_a_batch(make_ffn, dtype, hidden_size, rank, packed, factored):
    """Thresholds between neighbouring masses would show a logit that differs in its last bit."""
    for options in ({"rank": rank, "packed": packed}, {"rank": None, "packed": packed[1:]}):
        ffn = make_ffn(67, 300, 1, hidden_size, **options, factored=factored, dtype=dtype)
        x = ffn.x
        for tau in (0.1, 0.5, 0.9):
            ffn.x = x
            counts = ffn.routed(ops.routed_ffn, torch.tensor(tau))[1]
            for tokens in ([0], [66], [3, 4], [5, 6, 7]):
                ffn.x = x[tokens]
                assert torch.equal(ffn.routed(ops.routed_ffn, torch.tensor(tau))[1], counts[tokens])


@pytest.mark.parametrize("factored", [False, True])
def test_large_enough_for_several_threads(make_ffn, assert_close_to, factored):
    ffn = make_ffn(5, 130, 9, 600, rank=600 if factored else 128, factored=factored)
    ffn.x[:] = ffn.x[0].clone()
    threshold = torch.tensor([0.01, 0.5, 0.8, 0.95, 1.0])
    y, counts = ffn.routed(ops.routed_ffn, threshold)
    expected, expected_counts = ffn.wide().routed(reference.routed_ffn, threshold)
    assert torch.equal(counts, expected_counts)
    assert counts[0] < counts[1] < counts[2] < counts[3] < counts[4] == 130
    assert_close_to(y, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
def test_threshold_one_is_the_dense_ffn(make_ffn, assert_close_to, dtype, gated):
    ffn = make_ffn(4, gated=gated, dtype=dtype, biases=False)
    y, counts = ffn.routed(ops.routed_ffn, torch.tensor(1.0))
    assert counts.tolist() == [5] * 4
    wide = ffn.wide()
    silu = torch.nn.functional.silu
    h = silu(wide.x @ wide.gate.t()) * (wide.x @ wide.up.t()) if gated else silu(wide.x @ wide.up.t())
    assert_close_to(y, h @ wide.down_t)


@pytest.mark.parametrize("factored", [False, True])
def test_nan_in_a_token_makes_it_dense_and_leaves_the_others_alone(make_ffn, factored):
    ffn = make_ffn(3, factored=factored)
    threshold = torch.tensor(0.3)
    clean, clean_counts = ffn.routed(ops.routed_ffn, threshold)
    ffn.x[1, 0] = math.nan
    y, counts = ffn.routed(ops.routed_ffn, threshold)
    assert counts[1] == 5 and y[1].isnan().all()
    assert torch.equal(y[[0, 2]], clean[[0, 2]]) and torch.equal(counts[[0, 2]], clean_counts[[0, 2]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 70])
@pytest.mark.parametrize("factored", [False, True])
def test_writes_every_element_and_repeats(make_ffn, poison, dtype, num_tokens, factored):
    ffn = make_ffn(num_tokens, 16, 72, 130, factored=factored, dtype=dtype)
    expected = ffn.routed(ops.routed_ffn, torch.tensor(0.8))
    assert expected[0].isfinite().all()
    for _ in range(5):
        poison(((num_tokens, 130), dtype), ((num_tokens,), torch.int32))
        y, counts = ffn.routed(ops.routed_ffn, torch.tensor(0.8))
        assert torch.equal(y, expected[0]) and torch.equal(counts, expected[1])


def test_two_threads_at_once(make_ffn):
    """Each with its own tokens and thresholds; nothing of a call is shared."""
    ffns = [make_ffn(t, 300, 1, 130, factored=t == 9, seed=1) for t in (1, 9)]
    thresholds = [torch.tensor(0.4), torch.tensor(0.9)]
    pairs = list(zip(ffns, thresholds, strict=True))
    expected = [ffn.routed(ops.routed_ffn, threshold) for ffn, threshold in pairs]
    wrong = []

    def run(which):
        ffn, threshold = pairs[which]
        torch.set_num_threads(2)
        for _ in range(100):
            got = ffn.routed(ops.routed_ffn, threshold)
            if not all(torch.equal(a, b) for a, b in zip(got, expected[which], strict=True)):
                wrong.append(which)

    threads = [threading.Thread(target=run, args=(which,)) for which in (0, 1, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_non_contiguous_x(make_ffn):
    ffn = make_ffn(6)
    expected = ffn.routed(ops.routed_ffn, torch.tensor(0.5))
    ffn.x = ffn.x.t().contiguous().t()
    got = ffn.routed(ops.routed_ffn, torch.tensor(0.5))
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def assert_refused(ffn, change, message):
    """Of the inputs `ffn`, which are good, changed ones are refused in one sentence."""
    names = ("x", "router_in", "router_out", "router_bias", "threshold", "gate", "up", "down_t", "activation")
    values = (ffn.x, *ffn.router, torch.tensor(0.5), *ffn.tables, "silu")
    arguments = dict(zip(names, values, strict=True)) | ffn.factors | ffn.scales
    ops.routed_ffn(**arguments)
    with pytest.raises(RuntimeError, match=rf"prunepath::routed_ffn: expected {message}\.$"):
        ops.routed_ffn(**(arguments | change))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"router_in": torch.zeros(8, 41)}, r"router_in of shape \[r, H\] = \[r, 40\] .*got \[8, 41\]"),
        ({"router_in": torch.zeros(0, 40)}, r"router_in of shape .* r of at least 1, got \[0, 40\]"),
        ({"router_in": torch.zeros(40, 8).t()}, "router_in to be contiguous"),
        ({"router_in": torch.zeros(8, 40).half()}, "router_in of dtype float32 without router_in_scale, got float16"),
        ({"router_out": torch.zeros(4, 8)}, "the number of experts to divide the 30 neurons of up, got 4 experts"),
        ({"router_out": torch.zeros(5, 9)}, r"router_out of shape \[E, r\] = \[5, 8\], got \[5, 9\]"),
        ({"router_out": torch.zeros(5)}, r"router_out of shape \[E, r\], or .*got \[5\]"),
        ({"router_out": torch.zeros(0, 8)}, "from 1 to 65536 experts, got 0"),
        ({"router_out": torch.zeros(5, 8).half()}, "router_out of dtype float32 without router_out_scale, got float16"),
        ({"router_out": torch.zeros(8, 5).t()}, "router_out to be contiguous"),
        ({"router_in": None}, r"router_out of shape \[E, H\] = \[5, 40\], got \[5, 8\]"),
        ({"router_bias": torch.zeros(4)}, r"router_bias of shape \[E\] = \[5\], got \[4\]"),
        ({"threshold": torch.tensor(0.0)}, "threshold to be finite and greater than 0 in float32, got 0"),
        ({"threshold": torch.tensor([0.5, 0.5])}, r"threshold of shape \[\] or \[T\] = \[3\], got \[2\]"),
        ({"threshold": torch.tensor(0.5).double()}, "threshold of dtype float32, got float64"),
        ({"min_experts": 6}, "min_experts from 1 to the number of experts, 5, got 6"),
        ({"max_experts": 6}, "max_experts to be 0 .*got 6"),
        ({"activation": "swish"}, "activation .*got swish"),
        ({"x": torch.zeros(3, 41)}, r"x of shape .*got \[3, 41\]"),
    ],
)
def test_bad_arguments_are_named(make_ffn, change, message):
    assert_refused(make_ffn(), change, f"{message}.*")


def in_4_bits(name, *shape, scale_shape):
    return {name: torch.zeros(shape, dtype=torch.uint8), f"{name}_scale": torch.ones(scale_shape)}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"router_in": torch.ones(8, 40)}, "router_in of dtype uint8 with router_in_scale, got float32"),
        ({"router_out": torch.ones(5, 8)}, "router_out of dtype uint8 with router_out_scale, got float32"),
        ({"router_in_scale": None}, "router_in of dtype float32 without router_in_scale, got uint8"),
        ({"router_out_scale": None}, "router_out of dtype float32 without router_out_scale, got uint8"),
        (in_4_bits("router_in", 8, 40, scale_shape=8), r"router_in of shape \[r, H / 2\] = \[r, 20\] .*got \[8, 40\]"),
        (in_4_bits("router_out", 5, 8, scale_shape=5), r"router_out of shape \[E, r / 2\] = \[5, 4\], got \[5, 8\]"),
        (in_4_bits("router_in", 8, 20, scale_shape=7), r"router_in_scale of shape \[r\] = \[8\], got \[7\]"),
        (in_4_bits("router_out", 5, 4, scale_shape=(5, 1)), r"router_out_scale of shape \[E\] = \[5\], got \[5, 1\]"),
        (in_4_bits("router_in", 7, 20, scale_shape=7), "an even r for router_out in 4 bits, got 7"),
        (
            {"x": torch.zeros(3, 39), "gate": None, "up": torch.zeros(30, 39), "down_t": torch.zeros(30, 39)},
            "an even H for router_in in 4 bits, got 39",
        ),
        ({"router_in_scale": torch.ones(8).half()}, "router_in_scale of dtype float32 or float32, got float16"),
        ({"router_out_scale": torch.ones(10)[::2]}, "router_out_scale to be contiguous, .*"),
        ({"router_in": torch.zeros(20, 8, dtype=torch.uint8).t()}, "router_in to be contiguous, .*"),
        ({"router_in": None}, "router_in_scale to be None without router_in, got a tensor"),
        ({"router_in": None, "router_in_scale": None}, r"router_out of shape \[E, H / 2\] = \[5, 20\], got \[5, 4\]"),
    ],
)
def test_bad_arguments_of_a_router_in_4_bits_are_named(make_ffn, change, message):
    assert_refused(make_ffn(packed=IN + OUT), change, message)


BAD_FACTORS = [
    ({"router_log_scale": None}, "router_floor and router_log_scale, or neither, got one of them"),
    ({"router_floor": None}, "router_floor and router_log_scale, or neither, got one of them"),
    ({"router_log_scale": torch.zeros(5, 1)}, r"router_log_scale of shape \[E\], got \[5, 1\]"),
    ({"router_log_scale": torch.zeros(4)}, "the number of experts to divide the 30 neurons of up, got 4 experts"),
    ({"router_log_scale": torch.zeros(5).double()}, "router_log_scale of dtype float32 or float32, got float64"),
    ({"router_log_scale": torch.zeros(10)[::2]}, "router_log_scale to be contiguous, .*"),
]


@pytest.mark.parametrize(
    "gated, change, message",
    [
        *((gated, *bad) for gated in (True, False) for bad in BAD_FACTORS),
        (True, {"router_log_scale": torch.zeros(6)}, r"router_out of shape \[2 \* E, r\] = \[12, 8\], got \[10, 8\]"),
        (True, {"router_out": torch.zeros(5, 8)}, r"router_out of shape \[2 \* E, r\] = \[10, 8\], got \[5, 8\]"),
        (True, {"router_in": None}, r"router_out of shape \[2 \* E, H\] = \[10, 40\], got \[10, 8\]"),
        (True, {"router_bias": torch.zeros(5)}, r"router_bias of shape \[2 \* E\] = \[10\], got \[5\]"),
        (True, {"router_floor": torch.zeros(5)}, r"router_floor of shape \[2 \* E\] = \[10\], got \[5\]"),
        (True, {"router_floor": torch.zeros(10).half()}, "router_floor of dtype float32 or float32, got float16"),
        (False, {"router_out": torch.zeros(10, 8)}, r"router_out of shape \[E, r\] = \[5, 8\], got \[10, 8\]"),
        (False, {"router_bias": torch.zeros(10)}, r"router_bias of shape \[E\] = \[5\], got \[10\]"),
        (False, {"router_floor": torch.zeros(10)}, r"router_floor of shape \[E\] = \[5\], got \[10\]"),
    ],
)
def test_bad_arguments_of_a_factored_router_are_named(make_ffn, gated, change, message):
    assert_refused(make_ffn(factored=True, gated=gated), change, message)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("packed", [(), IN + OUT])
def test_opcheck_of_a_factored_router(make_ffn, gated, packed):
    ffn = make_ffn(factored=True, packed=packed, gated=gated)
    arguments = (ffn.x, *ffn.router, torch.tensor(0.5), *ffn.tables, "silu")
    torch.library.opcheck(OP, arguments, ffn.biases | ffn.factors | ffn.scales)


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_opcheck(make_ffn, num_tokens):
    ffn = make_ffn(num_tokens)
    for threshold in (torch.tensor(0.5), torch.full((num_tokens,), 0.5)):
        arguments = (ffn.x, *ffn.router, threshold, *ffn.tables, "silu")
        torch.library.opcheck(OP, arguments, ffn.biases)
    torch.library.opcheck(OP, (ffn.x.clone().requires_grad_(), *arguments[1:]))


def test_outputs_carry_no_gradient(make_ffn):
    ffn = make_ffn()
    for tensor in (ffn.x, ffn.up, ffn.router_out):
        tensor.requires_grad_()
    y, _ = ffn.routed(ops.routed_ffn, torch.tensor(0.5))
    assert not y.requires_grad


@pytest.mark.parametrize("factored", [False, True])
def test_compiles_whole_and_a_new_threshold_does_not_recompile(make_ffn, factored):
    ffn = make_ffn(factored=factored, packed=IN + OUT if factored else ())
    compiles = []

    def counting_backend(graph, inputs):
        compiles.append(graph)
        return graph.forward

    def f(x, threshold):
        y, counts = ops.routed_ffn(x * 2, *ffn.router, threshold, *ffn.tables, "silu", **ffn.factors, **ffn.scales)
        return y + 1, counts

    compiled = torch.compile(f, fullgraph=True, backend=counting_backend)
    for tau in (0.2, 0.9, 1.0):
        for a, b in zip(compiled(ffn.x, torch.tensor(tau)), f(ffn.x, torch.tensor(tau)), strict=True):
            assert torch.equal(a, b)
    assert len(compiles) == 1
