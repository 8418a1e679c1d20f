#pragma once

// The FFN on the GPU: what its kernels are told.
//
// A call is cut into tiles of up to 64 tokens, which share the reading of weights: every expert
// that any of them chose is read once, and a mask with a bit for each token says who chose it. The
// rows of weights of a tile's active experts are numbered through, and blocks take equal shares of
// them, so that the grid does not depend on the counts, which are known on the device alone.

#include <cstdint>

#include "core/activations.h"
#include "cuda/elements.cuh"
#include "cuda/tensors.cuh"

namespace prunepath {

constexpr int kTileTokens = 64;

struct FfnArgs {
  const void* x;     // [tokens, H] contiguous, of the weights' dtype
  const void* gate;  // null: no gate
  const void* up;    // gate, up, down_t: [D, H], rows at these distances
  const void* down_t;
  int64_t gate_stride;
  int64_t up_stride;
  int64_t down_stride;
  DeviceParameter gate_bias;
  DeviceParameter up_bias;
  DeviceParameter down_bias;
  void* y;  // [tokens, H] contiguous
  int32_t num_tokens;
  int32_t hidden_size;
  int32_t num_experts;
  int32_t expert_width;
  Activation activation;
  bool is_vectorised;  // rows of weights and of x can be read 16 bytes at a time

  // Workspace.
  uint32_t* bits;       // [ceil(E / 32), tokens]: a bit for each expert, set if the token chose it
  int32_t* list;        // [E]: the experts that any token chose, ascending
  uint64_t* masks;      // [E]: for each in the list, a bit for each token that chose it
  int32_t* num_active;  // [1]: experts in the list
  void* hidden;         // [tokens, hidden_stride]: activations, in the order of the list
  int64_t hidden_stride;
  float* partial;  // [splits, tokens, H]: parts of y
  int32_t splits;
};

// Where a tile's experts come from: they are given, or a router's logits and thresholds decide.
struct GivenExperts {
  const int32_t* expert_ids;  // [tokens, num_columns]
  const int32_t* counts;      // [tokens]
  int32_t num_columns;
};

struct Router {
  const void* in;            // [rank, H]; null: full rank
  const void* out;           // [E, rank], or [E, H]; of a factored router factors * E rows
  DeviceParameter in_scale;  // of each row, where the table is in 4 bits
  DeviceParameter out_scale;
  DeviceParameter bias;
  DeviceParameter floor;      // [factors * E]
  DeviceParameter log_scale;  // [E]
  int32_t factors;            // 0: a linear router
  int32_t rank;
  const float* thresholds;
  int64_t threshold_stride;
  int32_t min_experts;
  int32_t max_experts;  // K
  int32_t* counts;      // [tokens], written
  // Workspace.
  float* projected;  // [tokens, rank]
  float* logits;     // [tokens, E]
};

// Fill bits, list, masks and num_active.
void launch_selection(const Target& target, const FfnArgs& args, const GivenExperts& given);
void launch_selection(const Target& target, const FfnArgs& args, const Router& router,
                      ScalarType dtype);

// From the list to y.
void launch_ffn(const Target& target, const FfnArgs& args, ScalarType dtype);

// Of `launch_ffn`, the steps to `partial` for several tokens in 16 bits. They keep `hidden` in the
// weights' dtype, others in float32.
template <typename W>
void launch_mma(const Target& target, const FfnArgs& args);

// How many parts of y make the GPU busy.
int32_t num_splits(const FfnArgs& args, ScalarType dtype, int device);

// Blocks that a multiprocessor runs at once.
constexpr int kRowsBlocks = 3;
constexpr int kMmaHiddenBlocks = 4;
constexpr int mma_down_blocks(int tokens) { return tokens <= 16 ? 4 : 2; }
constexpr int kMmaColumns = 256;  // of y, for a block

inline bool uses_mma(const FfnArgs& args, ScalarType dtype) {
  return args.is_vectorised && args.num_tokens > 1 && dtype != ScalarType::Float;
}

// The FFN of a call of any number of tokens, `x` contiguous. `rule` is a GivenExperts or a Router
// for all of them; workspaces are made here.
template <typename Rule>
void run_ffn(const char* op, const FfnTensors& tensors, const Tensor& x, const FfnShape& shape,
             const Rule& rule, const Tensor& y);

inline DeviceParameter device_parameter(const std::optional<Tensor>& tensor) {
  return tensor.has_value()
             ? DeviceParameter{tensor->const_data_ptr(), tensor->scalar_type() == ScalarType::Float}
             : DeviceParameter{nullptr, false};
}

// The neuron whose weights are row `row` of the active ones.
__device__ __forceinline__ int32_t neuron_at(const FfnArgs& args, int32_t row) {
  const int32_t n = args.expert_width;
  return n == 1 ? args.list[row] : args.list[row / n] * n + row % n;
}

__device__ __forceinline__ uint64_t mask_at(const FfnArgs& args, int32_t row) {
  return args.masks[args.expert_width == 1 ? row : row / args.expert_width];
}

__device__ __forceinline__ int32_t num_active_rows(const FfnArgs& args) {
  return *args.num_active * args.expert_width;
}

struct Range {
  int32_t begin;
  int32_t end;
};

// Share number `part` of `parts` equal ones.
__device__ __forceinline__ Range share_of(int32_t count, int32_t part, int32_t parts) {
  const int32_t base = count / parts;
  const int32_t more = count % parts;  // shares that have one more
  const int32_t begin = part * base + ::min(part, more);
  return {begin, begin + base + (part < more)};
}

template <typename W>
__device__ __forceinline__ const W* gate_row(const FfnArgs& args, int32_t neuron) {
  return static_cast<const W*>(args.gate) + neuron * args.gate_stride;
}

template <typename W>
__device__ __forceinline__ const W* up_row(const FfnArgs& args, int32_t neuron) {
  return static_cast<const W*>(args.up) + neuron * args.up_stride;
}

template <typename W>
__device__ __forceinline__ const W* down_row(const FfnArgs& args, int32_t neuron) {
  return static_cast<const W*>(args.down_t) + neuron * args.down_stride;
}

// A neuron's activation from its dot products with x: up's, or gate's and up's.
template <typename W, int kGates>
__device__ __forceinline__ float activation_of(const FfnArgs& args, int32_t neuron,
                                               const float (&dot)[kGates]) {
  const float up = dot[kGates - 1] + parameter_at<W>(args.up_bias, neuron);
  if constexpr (kGates == 1) {
    return activate(args.activation, up);
  } else {
    return activate(args.activation, dot[0] + parameter_at<W>(args.gate_bias, neuron)) * up;
  }
}

}  // namespace prunepath
