"""What the kernels share: conversions, activations, and products of rows of weights with tokens."""

import os

import triton
import triton.language as tl

# Triton decides this when it is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_INTERPRETED = tl.constexpr(INTERPRETED)

# From this many tokens on, products are matrix products (tl.dot).
DOT_TOKENS = 16
_DOT_TOKENS = tl.constexpr(DOT_TOKENS)


@triton.jit
def to_float(value):
    """float32 of a float32, bfloat16 or float16 tensor."""
    if value.dtype == tl.bfloat16:
        # By its bits, which the interpreter, too, gets right.
        wide = (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = value.to(tl.float32)
    return wide


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 x rounded to `dtype`, to nearest even."""
    if _INTERPRETED:  # which drops bits
        if dtype == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def round_to_tf32(x):
    """float32 x rounded to tf32, which has the 10 bits of float16's mantissa and the exponents of float32."""
    rounded = (x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """relu, gelu, gelu_tanh, silu or relu2 of float32 x; a NaN stays one."""
    if ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.70710678118654752))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh u) / 2 = 1 / (1 + exp(-2u))
        y = x / (1.0 + tl.exp(-1.59576912160573072 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "silu":
        y = x / (1.0 + tl.exp(-x))
    else:
        tl.static_assert(ACTIVATION == "relu" or ACTIVATION == "relu2")
        y = tl.where(x <= 0.0, 0.0, x)
        if ACTIVATION == "relu2":
            y = y * y
    return y


@triton.jit
def router_activate(x, ACTIVATION: tl.constexpr):
    """What a factored router applies in the activation's place to float32 x; see `prunepath.ops.reference`."""
    if ACTIVATION == "gelu" or ACTIVATION == "gelu_tanh":
        y = x / (1.0 + tl.exp(-1.702 * x))
    elif ACTIVATION == "silu":
        y = x / (1.0 + tl.exp(-x))
    else:
        tl.static_assert(ACTIVATION == "relu" or ACTIVATION == "relu2")
        # log(1 + e) = 2·artanh(e / (2 + e)) as a series: a logarithm of what is near 1 would lose a small e.
        e = tl.exp(-tl.abs(x))
        s = e / (2.0 + e)
        square = s * s
        series = square * (1.0 / 15.0) + 1.0 / 13.0
        series = series * square + 1.0 / 11.0
        series = series * square + 1.0 / 9.0
        series = series * square + 1.0 / 7.0
        series = series * square + 1.0 / 5.0
        series = series * square + 1.0 / 3.0
        series = series * square + 1.0
        y = tl.maximum(x, 0.0) + 2.0 * s * series
        if ACTIVATION == "relu2":
            y = y * y
    return y


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """total + a·b in float32. PRECISION is that of float32 operands: "ieee", or "tf32" for those that
    `round_to_tf32` made or that were float16."""
    if _INTERPRETED:  # which gets products of bfloat16 wrong
        a = to_float(a)
        b = to_float(b)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def element(weight, PART: tl.constexpr):
    """float32 of a weight; of uint8, which holds two elements of 4 bits, of the even one (PART 0) or the odd one."""
    if weight.dtype == tl.uint8:
        wide = ((weight >> 4 * PART) & 15).to(tl.float32) - 8.0
    else:
        wide = to_float(weight)
    return wide


@triton.jit
def project(rows, valid, tokens, stride, present, size, ROWS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """Float32 products [ROWS, TOKENS] of rows of `size` weights, or of so many uint8 of two elements, and tokens of as
    many values, which the pointers name.

    A float32 token is never rounded to the weights' dtype."""
    PARTS: tl.constexpr = 2 if rows.dtype.element_ty == tl.uint8 else 1
    lane = tl.arange(0, BLOCK)
    if TOKENS >= _DOT_TOKENS:
        total = tl.zeros((ROWS, TOKENS), tl.float32)
        for start in range(0, size, BLOCK):
            column = start + lane
            inside = column < size
            w = tl.load(rows[:, None] + column[None, :], mask=valid[:, None] & inside[None, :], other=0)
            for part in tl.static_range(PARTS):
                value = tl.load(
                    tokens[None, :] + (PARTS * column.to(tl.int64) + part)[:, None] * stride,
                    mask=present[None, :] & inside[:, None],
                    other=0.0,
                )
                if value.dtype == tl.float32:
                    # Each block alone first, which keeps digits that one chain of `size` additions would lose. The last
                    # argument, which means nothing to float32, keeps Triton from making one chain of it.
                    total += tl.dot(element(w, part), value, input_precision="ieee", max_num_imprecise_acc=1)
                elif PARTS == 1:
                    total = dot(w, value, total, "ieee")
                else:
                    total = dot(element(w, part).to(value.dtype), value, total, "ieee")
    else:
        # Summed along lanes once, at the end. All in three dimensions, so that no layout is converted in the loop.
        product = tl.zeros((ROWS, TOKENS, BLOCK), tl.float32)
        for start in range(0, size, BLOCK):
            column = (start + lane)[None, None, :]
            inside = column < size
            w = tl.load(rows[:, None, None] + column, mask=valid[:, None, None] & inside, other=0)
            for part in tl.static_range(PARTS):
                value = tl.load(
                    tokens[None, :, None] + (PARTS * column.to(tl.int64) + part) * stride,
                    mask=present[None, :, None] & inside,
                    other=0.0,
                )
                product += element(w, part) * to_float(value)
        total = tl.sum(product, axis=2)
    return total
