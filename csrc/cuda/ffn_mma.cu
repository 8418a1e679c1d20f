// The FFN of several tokens in 16 bits on tensor cores. A lane reads 16 bytes of a row at a time,
// straight into the registers of its fragments: which of a product's terms a register holds may be
// chosen freely as long as both operands agree, and so may the rows of the result.

#include <algorithm>

#include "cuda/ffn.cuh"

namespace prunepath {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kRows = 16;   // of active neurons: a product's
constexpr int kTerms = 32;  // of a dot product that a warp reads at a time
constexpr int kWarpColumns = kMmaColumns / kWarps;
constexpr int kSharedRows = 256;  // rows whose neurons a block looks up at a time

// c += a·b of 16x16 times 16x8. With g = lane / 4 and q = lane % 4, a has rows g, g + 8, g, g + 8
// and terms 2q, 2q, 2q + 8, 2q + 8 (each the first of two); b terms 2q, 2q + 8 of column g; c row g
// of columns 2q and 2q + 1, and row g + 8 of them.
template <typename W>
__device__ __forceinline__ void multiply_add(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                             uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<W, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

// hidden[t, row] for 16 rows at a time, of which a block's warps share the terms. Rows after the
// last, up to a multiple of 16, are 0.
template <typename W, int kGates, int kTiles>
__global__ void __launch_bounds__(kThreads, kMmaHiddenBlocks)
    hidden_mma_kernel(const FfnArgs args) {
  constexpr int kTokens = 8 * kTiles;
  __shared__ float sums[kWarps][kGates][kTokens][kRows];
  __shared__ int32_t neurons[kRows];
  __shared__ uint64_t masks[kRows];
  const int H = args.hidden_size;
  const int tokens = args.num_tokens;
  const int warp = threadIdx.x / kWarp;
  const int g = threadIdx.x % kWarp / 4;
  const int q = threadIdx.x % 4;
  const W* x = static_cast<const W*>(args.x);
  W* hidden = static_cast<W*>(args.hidden);
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int32_t rows = num_active_rows(args);
  for (int32_t first = blockIdx.x * kRows; first < rows; first += gridDim.x * kRows) {
    if (threadIdx.x < kRows) {
      const int32_t row = first + static_cast<int32_t>(threadIdx.x);
      neurons[threadIdx.x] = neuron_at(args, ::min(row, rows - 1));
      masks[threadIdx.x] = row < rows ? mask_at(args, row) : 0;
    }
    __syncthreads();
    const W* weights[kGates][2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      weights[0][half] = gate_row<W>(args, neurons[g + 8 * half]);
      weights[kGates - 1][half] = up_row<W>(args, neurons[g + 8 * half]);
    }
    float acc[kGates][kTiles][4] = {};
#pragma unroll(kTiles <= 2 ? 2 : 1)
    for (int base = warp * kTerms; base < H; base += kWarps * kTerms) {
      const int k = base + 8 * q;
      uint4 a[kGates][2] = {};
      if (k < H) {
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate) {
          a[gate][0] = load_expert_bits(weights[gate][0] + k);
          a[gate][1] = load_expert_bits(weights[gate][1] + k);
        }
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const int token = 8 * tile + g;
        uint4 b = {};
        if (k < H && token < tokens) {
          b = *reinterpret_cast<const uint4*>(x + static_cast<int64_t>(token) * H + k);
        }
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate) {
          const uint4 low = a[gate][0];
          const uint4 high = a[gate][1];
          multiply_add<W>(acc[gate][tile], low.x, high.x, low.y, high.y, b.x, b.y);
          multiply_add<W>(acc[gate][tile], low.z, high.z, low.w, high.w, b.z, b.w);
        }
      }
    }
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums[warp][gate][8 * tile + 2 * q + i % 2][g + i / 2 * 8] = acc[gate][tile][i];
        }
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < tokens * kRows; i += kThreads) {
      const int t = i / kRows;
      const int r = i % kRows;
      float dot[kGates] = {};
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) {
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
          dot[gate] += sums[w][gate][t][r];
        }
      }
      hidden[t * args.hidden_stride + first + r] =
          from_float<W>(masks[r] >> t & 1 ? activation_of<W>(args, neurons[r], dot) : 0.0f);
    }
    __syncthreads();
  }
}

// partial[split, t] for 256 columns, 64 of them for each warp, of which a lane has 8 neighbours.
template <typename W, int kTiles>
__global__ void __launch_bounds__(kThreads) down_mma_kernel(const FfnArgs args) {
  __shared__ int32_t neurons[kSharedRows];
  const int H = args.hidden_size;
  const int tokens = args.num_tokens;
  const int g = threadIdx.x % kWarp / 4;
  const int q = threadIdx.x % 4;
  const int column = blockIdx.x * kMmaColumns + threadIdx.x / kWarp * kWarpColumns + 8 * g;
  const W* hidden = static_cast<const W*>(args.hidden);
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int32_t rows = num_active_rows(args);
  const auto [first_group, last_group] =
      share_of((rows + kRows - 1) / kRows, blockIdx.y, args.splits);
  const int32_t begin = first_group * kRows;
  const int32_t end = last_group * kRows;
  float acc[4][kTiles][4] = {};  // by pairs of columns
  for (int32_t shared_begin = begin; shared_begin < end; shared_begin += kSharedRows) {
    const int count = ::min(kSharedRows, end - shared_begin);  // a multiple of 16
    __syncthreads();                                           // the rows before have been used
    for (int j = threadIdx.x; j < count; j += kThreads) {
      neurons[j] = neuron_at(args, ::min(shared_begin + j, rows - 1));
    }
    __syncthreads();
#pragma unroll(kTiles <= 2 ? 2 : 1)
    for (int j = 4 * q; j < count; j += kRows) {
      uint4 a[4] = {};  // the 8 columns of rows j to j + 3
      if (column < H) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          a[r] = load_expert_bits(down_row<W>(args, neurons[j + r]) + column);
        }
      }
      uint2 b[kTiles] = {};  // rows j to j + 3 of token 8·tile + g
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const int token = 8 * tile + g;
        if (token < tokens) {
          b[tile] = *reinterpret_cast<const uint2*>(hidden + token * args.hidden_stride +
                                                    shared_begin + j);
        }
      }
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        const auto word = [&](int r) {
          return pair == 0 ? a[r].x : pair == 1 ? a[r].y : pair == 2 ? a[r].z : a[r].w;
        };
        // Two rows of the pair's first column, and of its second.
        const uint32_t a0 = __byte_perm(word(0), word(1), 0x5410);
        const uint32_t a1 = __byte_perm(word(0), word(1), 0x7632);
        const uint32_t a2 = __byte_perm(word(2), word(3), 0x5410);
        const uint32_t a3 = __byte_perm(word(2), word(3), 0x7632);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          multiply_add<W>(acc[pair][tile], a0, a1, a2, a3, b[tile].x, b[tile].y);
        }
      }
    }
  }
  if (column >= H) {
    return;
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = 8 * tile + 2 * q + i;
      if (token < tokens) {
        const int64_t part = static_cast<int64_t>(blockIdx.y) * tokens + token;
        float4* to = reinterpret_cast<float4*>(args.partial + part * H + column);
        to[0] = {acc[0][tile][i], acc[0][tile][i + 2], acc[1][tile][i], acc[1][tile][i + 2]};
        to[1] = {acc[2][tile][i], acc[2][tile][i + 2], acc[3][tile][i], acc[3][tile][i + 2]};
      }
    }
  }
}

template <typename W, int kTiles>
void launch_tiles(const Target& target, const FfnArgs& args) {
  const dim3 hidden_grid(kMmaHiddenBlocks * sm_count(target.device));
  const auto hidden =
      args.gate != nullptr ? hidden_mma_kernel<W, 2, kTiles> : hidden_mma_kernel<W, 1, kTiles>;
  launch(target, hidden, hidden_grid, kThreads, args);
  const dim3 down_grid((args.hidden_size + kMmaColumns - 1) / kMmaColumns, args.splits);
  launch(target, down_mma_kernel<W, kTiles>, down_grid, kThreads, args);
}

}  // namespace

template <typename W>
void launch_mma(const Target& target, const FfnArgs& args) {
  const int tokens = args.num_tokens;
  return tokens <= 8    ? launch_tiles<W, 1>(target, args)
         : tokens <= 16 ? launch_tiles<W, 2>(target, args)
         : tokens <= 32 ? launch_tiles<W, 4>(target, args)
                        : launch_tiles<W, 8>(target, args);
}

template void launch_mma<__nv_bfloat16>(const Target&, const FfnArgs&);
template void launch_mma<__half>(const Target&, const FfnArgs&);

}  // namespace prunepath
