#pragma once

// The inner loops of the FFN on the CPU. ffn_kernels_impl.h defines them; it is compiled once for
// every instruction set, and cpu/kernels.h chooses between them.

#include <cstdint>

#include "core/activations.h"
#include "core/layout.h"
#include "cpu/elements.h"

namespace prunepath {

// Tokens are worked on in tiles, so that a set of them is one word.
constexpr int64_t kTileTokens = 64;

// A bias, or a router's scales, floor or log-scale: float32 or the weights' dtype; null is all
// zeros.
struct Parameter {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
};

struct FfnWeights {
  FfnLayout layout;
  DType dtype;
  const void* gate;  // null without a gate
  const void* up;
  const void* down;
  Parameter gate_bias;
  Parameter up_bias;
  Activation activation;
};

// A tile's tokens, twice.
struct TileX {
  int64_t num_tokens;
  const void* data;   // of the weights' dtype, the elements of a token next to each other
  int64_t stride;     // elements from a token to the next
  const float* wide;  // [num_tokens, hidden_size] as `widen` writes it
};

// The neurons that any token of a tile needs, in ascending order.
struct ActiveNeurons {
  const int32_t* neurons;
  const uint64_t* masks;  // by place in the list: bit t is set iff token t of the tile needs it
};

// What a router multiplies tokens with: row r of [rows, size] times scale[r], plus bias[r].
struct RouterTable {
  const void* data = nullptr;  // contiguous
  DType dtype = DType::kFloat32;
  int64_t rows = 0;
  int64_t size = 0;
  Parameter scale;  // of kInt4; the others' rows are as they are
  Parameter bias;
};

// What a factored router makes logits with, besides the factors.
struct RouterFactors {
  int64_t num_experts;
  int64_t num_factors;  // of an expert
  Parameter floor;      // [num_factors * num_experts]
  Parameter log_scale;  // [num_experts]
  Activation activation;
};

struct FfnKernels {
  // Converts `size` elements, `stride` apart, to float32 in the order in which vectors of
  // `weights`' dtype are widened, as `dot_rows` and `run_neurons` want them: that of bfloat16 for
  // kInt4 too.
  void (*widen)(const void* x, DType dtype, int64_t stride, int64_t size, DType weights,
                float* out);

  // out[t, r] = x[t] . row r + bias[r] for the rows of `table` from `begin` to `end`, x
  // [num_tokens, size] as `widen` writes it and out [num_tokens, rows]. A token's sums do not
  // depend on the others.
  void (*dot_rows)(const float* x, int64_t num_tokens, const RouterTable& table, int64_t begin,
                   int64_t end, float* out);

  // Replaces the first factor by the logit, for the experts `begin` to `end` of every row of
  // factors [num_tokens, num_factors * num_experts].
  void (*combine_factors)(const RouterFactors& router, int64_t num_tokens, int64_t begin,
                          int64_t end, float* factors);

  // Adds the output of the neurons `begin` to `end` of the list to the rows sum[t * hidden_size] of
  // the tokens that need them. `sum` and `partial` are [num_tokens, hidden_size] and zero at the
  // beginning; `partial` is the kernel's own.
  void (*run_neurons)(const FfnWeights& weights, const ActiveNeurons& active, const TileX& x,
                      int64_t begin, int64_t end, float* sum, float* partial);
};

extern const FfnKernels kFfnKernelsPortable;
#if defined(__x86_64__)
extern const FfnKernels kFfnKernelsAvx2;
extern const FfnKernels kFfnKernelsAvx512;
extern const FfnKernels kFfnKernelsAvx512Bf16;
#endif

}  // namespace prunepath
