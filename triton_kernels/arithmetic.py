"""What the kernels of the FFN share: conversions, activations, and products of tiles."""

import os

import triton
import triton.language as tl

# Triton decides this when it is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_INTERPRETED = tl.constexpr(INTERPRETED)


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
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a·b in float32. PRECISION is that of float32 operands: "ieee", or "tf32" for those that
    `round_to_tf32` made or that were float16."""
    if _INTERPRETED:  # which gets products of bfloat16 wrong
        a = to_float(a)
        b = to_float(b)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def round_to_tf32(x):
    """float32 x rounded to tf32, which has the 10 bits of float16's mantissa and the exponents of float32."""
    rounded = (x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
