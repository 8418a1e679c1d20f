// The FFN on CUDA cores: any dtype, shape and alignment; for one token, as fast as memory.

#include <algorithm>

#include "cuda/ffn.cuh"

namespace prunepath {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTogether = 4;      // tokens that share a reading of a row, where there are several
constexpr int kSharedRows = 256;  // rows whose neurons a block looks up at a time

// hidden[t, row] = the activation of the row's neuron, or 0 if token t did not choose it. A warp
// takes a neuron at a time.
template <typename W, int kVec, int kTokens, int kGates>
__global__ void __launch_bounds__(kThreads, kRowsBlocks) hidden_rows_kernel(const FfnArgs args) {
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int vectors = args.hidden_size / kVec;
  float* hidden = static_cast<float*>(args.hidden);
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int32_t rows = num_active_rows(args);
  for (int32_t row = warp * gridDim.x + blockIdx.x; row < rows; row += kWarps * gridDim.x) {
    const int32_t neuron = neuron_at(args, row);
    const uint64_t mask = mask_at(args, row);
    const W* weights[kGates];
    weights[0] = gate_row<W>(args, neuron);
    weights[kGates - 1] = up_row<W>(args, neuron);
    for (int first = 0; first < args.num_tokens; first += kTokens) {
      const int tokens = ::min(kTokens, args.num_tokens - first);
      const auto chosen = static_cast<uint32_t>(mask >> first) & ((1u << kTokens) - 1);
      float dot[kGates][kTokens] = {};
      if (chosen != 0) {
#pragma unroll(kTokens == 1 ? 4 : 2)
        for (int v = lane; v < vectors; v += kWarp) {
          Vector<W, kVec> w[kGates];
#pragma unroll
          for (int g = 0; g < kGates; ++g) {
            w[g] = load_expert<W, kVec>(weights[g] + v * kVec);
          }
#pragma unroll
          for (int t = 0; t < kTokens; ++t) {
            const int64_t token = first + ::min(t, tokens - 1);
            const Vector<W, kVec> x = load_vector<W, kVec>(static_cast<const W*>(args.x) +
                                                           token * args.hidden_size + v * kVec);
#pragma unroll
            for (int g = 0; g < kGates; ++g) {
#pragma unroll
              for (int i = 0; i < kVec; ++i) {
                dot[g][t] = fmaf(w[g][i], x[i], dot[g][t]);
              }
            }
          }
        }
      }
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        float sums[kGates];
#pragma unroll
        for (int g = 0; g < kGates; ++g) {
          sums[g] = sum_lanes(dot[g][t], kWarp);
        }
        if (lane == t && t < tokens) {
          hidden[(first + t) * args.hidden_stride + row] =
              chosen >> t & 1 ? activation_of<W>(args, neuron, sums) : 0.0f;
        }
      }
    }
  }
}

// partial[split, t] = the sum of hidden[t, row]·down_t[neuron of the row] over a split's rows. A
// block takes some columns and a split, and its warps take rows in turn.
template <typename W, int kVec, int kTokens>
__global__ void __launch_bounds__(kThreads, kRowsBlocks) down_rows_kernel(const FfnArgs args) {
  constexpr int kColumns = kWarp * kVec;
  constexpr int kBatch = kTokens == 1 ? 6 : 4;  // rows that a warp has under way
  __shared__ int32_t neurons[kSharedRows];
  __shared__ float activations[kTokens][kSharedRows];
  __shared__ float sums[kWarps][kTokens][kColumns];
  const int H = args.hidden_size;
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int first_column = blockIdx.x * kColumns;
  const int column = first_column + lane * kVec;
  const float* hidden = static_cast<const float*>(args.hidden);
  wait_for_previous_kernel();
  let_next_kernel_start();
  const auto [begin, end] = share_of(num_active_rows(args), blockIdx.y, args.splits);
  for (int first = 0; first < args.num_tokens; first += kTokens) {
    const int tokens = ::min(kTokens, args.num_tokens - first);
    float acc[kTokens][kVec] = {};
    for (int32_t shared_begin = begin; shared_begin < end; shared_begin += kSharedRows) {
      const int count = ::min(kSharedRows, end - shared_begin);
      __syncthreads();  // the rows before have been used
      for (int j = threadIdx.x; j < count; j += kThreads) {
        neurons[j] = neuron_at(args, shared_begin + j);
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
          activations[t][j] =
              t < tokens ? hidden[(first + t) * args.hidden_stride + shared_begin + j] : 0.0f;
        }
      }
      __syncthreads();
      for (int base = warp; base < count; base += kWarps * kBatch) {
        Vector<W, kVec> batch[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          const int j = base + b * kWarps;
          if (j < count && column < H) {
            batch[b] = load_expert<W, kVec>(down_row<W>(args, neurons[j]) + column);
          }
        }
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          const int j = base + b * kWarps;
          if (j < count && column < H) {
#pragma unroll
            for (int t = 0; t < kTokens; ++t) {
#pragma unroll
              for (int i = 0; i < kVec; ++i) {
                acc[t][i] = fmaf(activations[t][j], batch[b][i], acc[t][i]);
              }
            }
          }
        }
      }
    }
    __syncthreads();  // the sums of the tokens before have been used
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        sums[warp][t][lane * kVec + i] = acc[t][i];
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < tokens * kColumns; i += kThreads) {
      const int t = i / kColumns;
      const int c = i % kColumns;
      if (first_column + c < H) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
          sum += sums[w][t][c];
        }
        const int64_t part = static_cast<int64_t>(blockIdx.y) * args.num_tokens + first + t;
        args.partial[part * H + first_column + c] = sum;
      }
    }
  }
}

template <typename W, int kVec, int kTokens>
void launch_tokens(const Target& target, const FfnArgs& args) {
  const dim3 hidden_grid(kRowsBlocks * sm_count(target.device));
  const auto hidden = args.gate != nullptr ? hidden_rows_kernel<W, kVec, kTokens, 2>
                                           : hidden_rows_kernel<W, kVec, kTokens, 1>;
  launch(target, hidden, hidden_grid, kThreads, args);
  constexpr int kColumns = kWarp * kVec;
  const dim3 down_grid((args.hidden_size + kColumns - 1) / kColumns, args.splits);
  launch(target, down_rows_kernel<W, kVec, kTokens>, down_grid, kThreads, args);
}

template <typename W>
void launch_rows(const Target& target, const FfnArgs& args) {
  constexpr int kVec = kFullVector<W>;
  if (!args.is_vectorised) {
    launch_tokens<W, 1, kTogether>(target, args);
  } else if (args.num_tokens == 1) {
    launch_tokens<W, kVec, 1>(target, args);
  } else if constexpr (sizeof(W) == 4) {
    launch_tokens<W, kVec, kTogether>(target, args);
  }
}

constexpr int kReduceParts = 8;

// y = b_down + the sum of the splits, always in the same order.
template <typename W>
__global__ void __launch_bounds__(kWarp* kReduceParts) reduce_kernel(const FfnArgs args) {
  __shared__ float sums[kReduceParts][kWarp];
  const int lane = threadIdx.x % kWarp;
  const int part = threadIdx.x / kWarp;
  const int H = args.hidden_size;
  const int column = blockIdx.x * kWarp + lane;
  const int64_t token = blockIdx.y;
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (column < H) {
    float sum = 0.0f;
#pragma unroll 8
    for (int64_t split = part; split < args.splits; split += kReduceParts) {
      sum += args.partial[(split * args.num_tokens + token) * H + column];
    }
    sums[part][lane] = sum;
  }
  __syncthreads();
  if (part == 0 && column < H) {
    float sum = parameter_at<W>(args.down_bias, column);
#pragma unroll
    for (int p = 0; p < kReduceParts; ++p) {
      sum += sums[p][lane];
    }
    static_cast<W*>(args.y)[token * H + column] = from_float<W>(sum);
  }
}

template <typename W>
void launch_dtype(const Target& target, const FfnArgs& args, bool mma) {
  if constexpr (sizeof(W) == 2) {
    (mma ? launch_mma<W> : launch_rows<W>)(target, args);
  } else {
    launch_rows<W>(target, args);
  }
  const dim3 grid((args.hidden_size + kWarp - 1) / kWarp, args.num_tokens);
  launch(target, reduce_kernel<W>, grid, kWarp * kReduceParts, args);
}

}  // namespace

int32_t num_splits(const FfnArgs& args, ScalarType dtype, int device) {
  const bool mma = uses_mma(args, dtype);
  const int vector = !args.is_vectorised ? 1 : dtype == ScalarType::Float ? 4 : 8;
  const int columns = mma ? kMmaColumns : kWarp * vector;
  const int blocks = (mma ? mma_down_blocks(args.num_tokens) : kRowsBlocks) * sm_count(device);
  return std::max(1, blocks / ((args.hidden_size + columns - 1) / columns));
}

void launch_ffn(const Target& target, const FfnArgs& args, ScalarType dtype) {
  const bool mma = uses_mma(args, dtype);
  switch (dtype) {
    case ScalarType::BFloat16:
      return launch_dtype<__nv_bfloat16>(target, args, mma);
    case ScalarType::Half:
      return launch_dtype<__half>(target, args, mma);
    default:
      return launch_dtype<float>(target, args, mma);
  }
}

}  // namespace prunepath
