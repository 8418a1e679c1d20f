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

// A bias or centre: float32 or the weights' dtype; null is all zeros.
struct Parameter {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
};

struct FfnWeights {
  ExpertLayout layout;
  DType dtype;
  const void* w_in;
  InStrides in_strides;
  const void* w_out;
  Parameter b_in;
  Parameter center;
  Activation activation;
};

// The experts that a tile of tokens needs: those with any bit in `masks`, in ascending order.
struct ActiveExperts {
  const int32_t* experts;
  const uint64_t* masks;  // by expert: bit t is set iff token t of the tile needs it
  int64_t num_tokens;     // of the tile
};

struct FfnKernels {
  // Adds the output of neurons `begin` to `end`, counted over the list of active experts, to the
  // rows sum[t * hidden_size] of the tokens that need them. Token t of `x`, of the weights' dtype,
  // is the hidden_size elements from t * x_stride on. `sum` and `partial` are [tile, hidden_size]
  // and zero at the beginning; `partial` is the kernel's own.
  void (*run_neurons)(const FfnWeights& weights, const ActiveExperts& active, const void* x,
                      int64_t x_stride, int64_t begin, int64_t end, float* sum, float* partial);

  // logits[t * num_experts + e] = x[t] . weight[e] + bias[e] for e from begin to end, x as above.
  void (*router_logits)(const void* x, int64_t x_stride, int64_t num_tokens, int64_t hidden_size,
                        int64_t num_experts, const void* weight, DType dtype, Parameter bias,
                        int64_t begin, int64_t end, float* logits);
};

extern const FfnKernels kFfnKernelsPortable;
#if defined(__x86_64__)
extern const FfnKernels kFfnKernelsAvx2;
extern const FfnKernels kFfnKernelsAvx512;
extern const FfnKernels kFfnKernelsAvx512Bf16;
#endif

}  // namespace prunepath
