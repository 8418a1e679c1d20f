// The FFN of 2 to 64 tokens in bfloat16 or float16, on tensor cores: the weights are the rows of
// each product and the tokens its columns, 8 at a time. Weights go from memory to registers, 16
// bytes a lane: the order of a dot product's terms is free, so a lane's 8 elements serve as those
// that the instruction wants of it, in both operands alike.
//
// Three launches: the router's logits, summed in parts; selection, gate, up and activation; down,
// in slices of columns whose parts the last block adds up in order.

#include <algorithm>

#include "cuda/ffn.cuh"
#include "cuda/select.cuh"

namespace prunepath {
namespace {

constexpr int kTileTokens = 32;
constexpr int kRows = 16;   // of the instruction: m16n8k16
constexpr int kChunk = 32;  // elements of a row that a warp reads at a time, for two instructions
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kRouterThreads = 128;
constexpr int kRouterWarps = kRouterThreads / kWarp;
constexpr int kLogitSplits = 8;
constexpr int kSliceColumns = 64;  // of W_down, 8 for each group of 4 lanes
constexpr int kMaxSplits = 16;
constexpr int kBlocksPerSm = 2;

__device__ __forceinline__ void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                         uint32_t a3, uint32_t b0, uint32_t b1, __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                         uint32_t a3, uint32_t b0, uint32_t b1, __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, "
      "%9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// c[tile][nt] += the products of 16 rows of each tile with 8 tokens each, over the chunks from
// `begin` to `end`. A lane's rows of a tile are lane / 4 and lane / 4 + 8, its tokens nt * 8 +
// lane / 4; the pointers are those of its rows' first elements.
template <typename W, int kTiles, int kTokenGroups>
__device__ __forceinline__ void multiply_rows(float (&c)[kTiles][kTokenGroups][4],
                                              const W* const (&rows)[kTiles][2],
                                              const W* const (&x)[kTokenGroups], int begin,
                                              int end) {
  constexpr int kUnroll = (kTokenGroups == 1 ? 8 : 4) / kTiles;
  const int offset = threadIdx.x % 4 * 8;
  for (int chunk = begin; chunk < end; chunk += kUnroll) {
    uint4 a[kUnroll][kTiles][2];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (chunk + u < end) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          a[u][tile][0] = load_expert_bits(rows[tile][0] + (chunk + u) * kChunk + offset);
          a[u][tile][1] = load_expert_bits(rows[tile][1] + (chunk + u) * kChunk + offset);
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (chunk + u < end) {
#pragma unroll
        for (int nt = 0; nt < kTokenGroups; ++nt) {
          const uint4 b = *reinterpret_cast<const uint4*>(x[nt] + (chunk + u) * kChunk + offset);
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            const uint4 low = a[u][tile][0];
            const uint4 high = a[u][tile][1];
            multiply(c[tile][nt], low.x, high.x, low.y, high.y, b.x, b.y, W{});
            multiply(c[tile][nt], low.z, high.z, low.w, high.w, b.z, b.w, W{});
          }
        }
      }
    }
  }
}

// The rows of x that a lane multiplies with. Rows beyond the last token repeat it; their results
// are not used.
template <typename W, int kTokenGroups>
__device__ __forceinline__ void token_rows(const FfnArgs& args, int first, int tokens,
                                           const W* (&x)[kTokenGroups]) {
#pragma unroll
  for (int nt = 0; nt < kTokenGroups; ++nt) {
    const int token = ::min(nt * 8 + static_cast<int>(threadIdx.x % kWarp) / 4, tokens - 1);
    x[nt] = static_cast<const W*>(args.x) + (first + token) * args.x_token_stride;
  }
}

// Logits of 16 experts over a part of the elements: logits[part][t][e].
template <typename W, int kTokenGroups>
__global__ void __launch_bounds__(kRouterThreads) router_kernel(const FfnArgs args) {
  __shared__ float sums[kRouterWarps][kTokenGroups * 4][kWarp];
  const int E = args.num_experts;
  const int H = args.hidden_size;
  const int first = blockIdx.z * kTileTokens;
  const int tokens = ::min(kTileTokens, args.num_tokens - first);
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int expert = blockIdx.x * kRows + lane / 4;
  const W* weight = static_cast<const W*>(args.router_weight);
  const int chunks = H / kChunk;
  const int parts = gridDim.y * kRouterWarps;
  const int part = blockIdx.y * kRouterWarps + warp;

  wait_for_previous_kernel();
  let_next_kernel_start();
  if (blockIdx.y == 0 && blockIdx.z == 0) {
    zero_counters(args);
  }
  const W* x[kTokenGroups];
  token_rows(args, first, tokens, x);
  const W* const rows[1][2] = {{weight + static_cast<int64_t>(::min(expert, E - 1)) * H,
                                weight + static_cast<int64_t>(::min(expert + 8, E - 1)) * H}};
  float c[1][kTokenGroups][4] = {};
  multiply_rows(c, rows, x, static_cast<int>(static_cast<int64_t>(chunks) * part / parts),
                static_cast<int>(static_cast<int64_t>(chunks) * (part + 1) / parts));
#pragma unroll
  for (int i = 0; i < kTokenGroups * 4; ++i) {
    sums[warp][i][lane] = c[0][i / 4][i % 4];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kTokenGroups * 4 * kWarp; i += kRouterThreads) {
    const int l = i % kWarp;
    const int r = i / kWarp;
    const int token = r / 4 * 8 + l % 4 * 2 + r % 2;
    const int e = blockIdx.x * kRows + l / 4 + r % 4 / 2 * 8;
    if (token < tokens && e < E) {
      float sum = 0.0f;
      if (blockIdx.y == 0 && args.router_bias.data != nullptr) {
        sum = parameter_at<W>(args.router_bias, e);
      }
      for (int w = 0; w < kRouterWarps; ++w) {
        sum += sums[w][r][l];
      }
      args.logits[(static_cast<int64_t>(blockIdx.y) * args.num_tokens + first + token) * E + e] =
          sum;
    }
  }
}

// Selects the tile's tokens, each by one block, and gives all blocks the masks. The blocks that
// select are the first that run, so those that wait for them never keep them from running.
__device__ void select_together(const FfnArgs& args, int first, int tokens, uint32_t* counters,
                                void* scratch, uint32_t* mask) {
  __shared__ int ticket;
  const int E = args.num_experts;
  const int words = (E + kWarp - 1) / kWarp;
  if (threadIdx.x == 0) {
    ticket = static_cast<int>(atomicAdd(&counters[0], 1));
  }
  __syncthreads();
  for (int t = ticket; t < tokens; t += gridDim.x) {
    select_tokens<1, kLogitSplits>(args, first + t, 1, true, scratch, mask);
    for (int base = threadIdx.x / kWarp * kWarp; base < E; base += kThreads) {
      const int e = base + threadIdx.x % kWarp;
      const unsigned bits = __ballot_sync(kAllLanes, e < E && mask[e] != 0);
      if (threadIdx.x % kWarp == 0) {
        args.active_bits[static_cast<int64_t>(first + t) * words + base / kWarp] = bits;
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      add_release(&counters[1]);
    }
  }
  if (threadIdx.x == 0) {
    while (load_acquire(&counters[1]) < static_cast<uint32_t>(tokens)) {
    }
  }
  __syncthreads();
  for (int e = threadIdx.x; e < E; e += kThreads) {
    uint32_t tokens_of_expert = 0;
#pragma unroll 8
    for (int t = 0; t < tokens; ++t) {
      const uint32_t word =
          __ldcg(args.active_bits + static_cast<int64_t>(first + t) * words + e / kWarp);
      tokens_of_expert |= (word >> (e % kWarp) & 1) << t;
    }
    mask[e] = tokens_of_expert;
  }
  __syncthreads();
}

int num_slices(int64_t hidden_size) {
  return static_cast<int>((hidden_size + kSliceColumns - 1) / kSliceColumns);
}

// One for tickets, one for the tokens selected, one for each slice.
int counters_of_tile(int64_t hidden_size) { return 2 + num_slices(hidden_size); }

int max_blocks(int device) { return kBlocksPerSm * sm_count(device); }

// Many tokens' x is too long for the first-level cache: then a step takes more rows, to read x less
// often.
template <int kTokenGroups>
constexpr int kRowTiles = kTokenGroups == 4 ? 2 : 1;

template <typename W, int kTokenGroups, int kGates>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    gate_up_kernel(const FfnArgs args, int counters_a_tile) {
  constexpr int kTiles = kRowTiles<kTokenGroups>;
  constexpr int kTileNeurons = kRows / kGates;
  constexpr int kTileSums = kTokenGroups * 4;
  extern __shared__ __align__(16) unsigned char shared[];
  const int E = args.num_experts;
  const int H = args.hidden_size;
  const int n = args.expert_width;
  const int first = blockIdx.y * kTileTokens;
  const int tokens = ::min(kTileTokens, args.num_tokens - first);
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  int32_t* list = reinterpret_cast<int32_t*>(shared);
  uint32_t* mask = reinterpret_cast<uint32_t*>(list + E);
  // By its offset, so that the compiler knows that it is shared memory.
  unsigned char* scratch = shared + (2 * E + 3) / 4 * 16;
  // In turn what selecting takes and the warps' sums.
  auto* sums = reinterpret_cast<float (*)[kTiles * kTileSums][kWarp]>(scratch);

  wait_for_previous_kernel();
  let_next_kernel_start();
  if (args.expert_ids != nullptr) {
    mask_given_experts(args, first, tokens, mask);
  } else {
    select_together(args, first, tokens, args.counters + blockIdx.y * counters_a_tile, scratch,
                    mask);
  }
  const int listed = list_active_experts(mask, E, list);
  const int64_t active = static_cast<int64_t>(listed) * n;
  if (blockIdx.x == 0) {
    int32_t* out = args.union_list + static_cast<int64_t>(blockIdx.y) * (1 + E);
    for (int i = threadIdx.x; i < listed; i += kThreads) {
      out[1 + i] = list[i];
    }
    if (threadIdx.x == 0) {
      out[0] = listed;
    }
  }
  const auto neuron_at = [&](int64_t position) {
    return static_cast<int64_t>(list[position / n]) * n + position % n;
  };

  const W* x[kTokenGroups];
  token_rows(args, first, tokens, x);
  const W* w_in = static_cast<const W*>(args.w_in);
  W* hidden = static_cast<W*>(args.hidden) + first * args.hidden_stride;
  const int chunks = H / kChunk;
  const int chunk_begin = chunks * warp / kWarps;
  const int chunk_end = chunks * (warp + 1) / kWarps;
  const int64_t block_end = active * (blockIdx.x + 1) / gridDim.x;
  for (int64_t step = active * blockIdx.x / gridDim.x; step < block_end;
       step += kTiles * kTileNeurons) {
    // Rows beyond the block's last repeat it; their results are not used.
    const auto row_at = [&](int64_t at) {
      return w_in + neuron_at(::min(at, block_end - 1)) * args.in_neuron_stride;
    };
    const W* rows[kTiles][2];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int64_t position = step + tile * kTileNeurons + lane / 4;
      rows[tile][0] = row_at(position);
      rows[tile][1] = kGates == 2 ? rows[tile][0] + args.in_inner_stride : row_at(position + 8);
    }
    float c[kTiles][kTokenGroups][4] = {};
    multiply_rows(c, rows, x, chunk_begin, chunk_end);
    __syncthreads();  // the last step's sums have been read
#pragma unroll
    for (int i = 0; i < kTiles * kTileSums; ++i) {
      sums[warp][i][lane] = c[i / kTileSums][i % kTileSums / 4][i % 4];
    }
    __syncthreads();
    const auto sum = [&](int r, int l) {
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        total += sums[w][r][l];
      }
      return total;
    };
    // Registers 0 and 1 of a lane are two tokens of row lane / 4, registers 2 and 3 those of row
    // lane / 4 + 8.
    constexpr int kTileOutputs = kTileSums / kGates;
    for (int i = threadIdx.x; i < kTiles * kTileOutputs * kWarp; i += kThreads) {
      const int l = i % kWarp;
      const int tile = i / kWarp / kTileOutputs;
      const int r = i / kWarp % kTileOutputs;
      const int group = kGates == 2 ? r / 2 : r / 4;
      const int token = group * 8 + l % 4 * 2 + r % 2;
      const int64_t at = step + tile * kTileNeurons + l / 4 + (kGates == 2 ? 0 : r % 4 / 2 * 8);
      if (token < tokens && at < block_end) {
        const int64_t neuron = neuron_at(at);
        const auto bias = [&](int g) {
          return args.b_in.data == nullptr ? 0.0f : parameter_at<W>(args.b_in, neuron * kGates + g);
        };
        const int from = tile * kTileSums;
        float h;
        if constexpr (kGates == 2) {
          h = activate(args.activation, sum(from + group * 4 + r % 2, l) + bias(0)) *
              (sum(from + group * 4 + 2 + r % 2, l) + bias(1));
        } else {
          h = activate(args.activation, sum(from + r, l) + bias(0));
        }
        if (args.center.data != nullptr) {
          h -= parameter_at<W>(args.center, neuron);
        }
        hidden[token * args.hidden_stride + at] =
            from_float<W>(mask[neuron / n] >> token & 1 ? h : 0.0f);
      }
    }
  }
}

// y of a slice of columns: its blocks share the neurons, and the last of them adds up what they
// found.
template <typename W, int kTokenGroups>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    down_kernel(const FfnArgs args, int counters_a_tile) {
  constexpr int kUnroll = kTokenGroups == 4 ? 1 : 2;
  constexpr int kTokens = kTokenGroups * 8;
  extern __shared__ __align__(16) unsigned char shared[];
  float* sums = reinterpret_cast<float*>(shared);  // [warps, tokens, columns]
  int32_t* list = reinterpret_cast<int32_t*>(sums + kWarps * kTokens * kSliceColumns);
  const int H = args.hidden_size;
  const int n = args.expert_width;
  const int first = blockIdx.z * kTileTokens;
  const int tokens = ::min(kTileTokens, args.num_tokens - first);
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int quad = lane % 4;
  const int column = blockIdx.x * kSliceColumns + lane / 4 * 8;
  const W* w_out = static_cast<const W*>(args.w_out);

  wait_for_previous_kernel();
  let_next_kernel_start();
  const int32_t* given =
      args.union_list + static_cast<int64_t>(blockIdx.z) * (1 + args.num_experts);
  const int listed = __ldcg(given);
  for (int i = threadIdx.x; i < listed; i += kThreads) {
    list[i] = __ldcg(given + 1 + i);
  }
  __syncthreads();
  const int active = listed * n;
  const W* hidden = static_cast<const W*>(args.hidden) + first * args.hidden_stride + quad * 4;
  uint32_t rows_of_hidden[kTokenGroups];
#pragma unroll
  for (int nt = 0; nt < kTokenGroups; ++nt) {
    rows_of_hidden[nt] =
        ::min(nt * 8 + lane / 4, tokens - 1) * static_cast<uint32_t>(args.hidden_stride);
  }

  // A lane reads 4 neurons' rows; the instruction's 16 columns are the even and the odd ones of 8
  // for each 4 lanes.
  float c[4][kTokenGroups][4] = {};
  const int steps = (active + 15) / 16;
  const int workers = gridDim.y * kWarps;
  for (int step = blockIdx.y * kWarps + warp; step < steps; step += kUnroll * workers) {
    uint4 rows[kUnroll][4];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int position = (step + u * workers) * 16 + quad * 4;
      int expert = position / n;
      int within = position - expert * n;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        rows[u][i] = make_uint4(0, 0, 0, 0);
        if (position + i < active && column < H) {
          rows[u][i] = load_expert_bits(
              w_out + (static_cast<int64_t>(list[expert]) * n + within) * H + column);
        }
        if (++within == n) {
          within = 0;
          ++expert;
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int begin = (step + u * workers) * 16;
      if (begin < active) {
        const uint32_t words[4][4] = {{rows[u][0].x, rows[u][0].y, rows[u][0].z, rows[u][0].w},
                                      {rows[u][1].x, rows[u][1].y, rows[u][1].z, rows[u][1].w},
                                      {rows[u][2].x, rows[u][2].y, rows[u][2].z, rows[u][2].w},
                                      {rows[u][3].x, rows[u][3].y, rows[u][3].z, rows[u][3].w}};
        uint32_t a[4][4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          a[j][0] = __byte_perm(words[0][j], words[1][j], 0x5410);
          a[j][1] = __byte_perm(words[0][j], words[1][j], 0x7632);
          a[j][2] = __byte_perm(words[2][j], words[3][j], 0x5410);
          a[j][3] = __byte_perm(words[2][j], words[3][j], 0x7632);
        }
        const int left = active - begin - quad * 4;
#pragma unroll
        for (int nt = 0; nt < kTokenGroups; ++nt) {
          uint2 h = __ldcg(reinterpret_cast<const uint2*>(hidden + rows_of_hidden[nt] + begin));
          // What lies beyond the last neuron was never written.
          h.x = left >= 2 ? h.x : left == 1 ? h.x & 0xffff : 0;
          h.y = left >= 4 ? h.y : left == 3 ? h.y & 0xffff : 0;
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            multiply(c[j][nt], a[j][0], a[j][1], a[j][2], a[j][3], h.x, h.y, W{});
          }
        }
      }
    }
  }

#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int nt = 0; nt < kTokenGroups; ++nt) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int token = nt * 8 + quad * 2 + r % 2;
        sums[(warp * kTokens + token) * kSliceColumns + lane / 4 * 8 + j * 2 + r / 2] = c[j][nt][r];
      }
    }
  }
  __syncthreads();
  const auto place = [&](int split, int token, int at) {
    return args.partial +
           ((static_cast<int64_t>(blockIdx.z) * gridDim.y + split) * kTokens + token) * H + at;
  };
  for (int i = threadIdx.x; i < tokens * kSliceColumns; i += kThreads) {
    const int token = i / kSliceColumns;
    const int at = blockIdx.x * kSliceColumns + i % kSliceColumns;
    if (at < H) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        sum += sums[(w * kTokens + token) * kSliceColumns + i % kSliceColumns];
      }
      *place(blockIdx.y, token, at) = sum;
    }
  }
  if (!arrives_last(args.counters + blockIdx.z * counters_a_tile + 2 + blockIdx.x, gridDim.y)) {
    return;
  }
  W* y = static_cast<W*>(args.y);
  for (int i = threadIdx.x; i < tokens * kSliceColumns; i += kThreads) {
    const int token = i / kSliceColumns;
    const int at = blockIdx.x * kSliceColumns + i % kSliceColumns;
    if (at < H) {
      float sum = args.b_out.data == nullptr ? 0.0f : parameter_at<W>(args.b_out, at);
#pragma unroll 8
      for (int split = 0; split < static_cast<int>(gridDim.y); ++split) {
        sum += __ldcg(place(split, token, at));
      }
      y[static_cast<int64_t>(first + token) * H + at] = from_float<W>(sum);
    }
  }
}

template <typename W, int kTokenGroups, int kGates>
void launch_groups(const FfnArgs& args, int device, cudaStream_t stream) {
  const int major = compute_major(device);
  const int E = args.num_experts;
  const int tiles = (args.num_tokens + kTileTokens - 1) / kTileTokens;
  const int slices = num_slices(args.hidden_size);
  const int blocks = std::max(1, max_blocks(device) / tiles);
  const int counters = counters_of_tile(args.hidden_size);
  const bool selects = args.expert_ids == nullptr;
  if (selects) {
    launch("routed_ffn", router_kernel<W, kTokenGroups>,
           dim3((E + kRows - 1) / kRows, kLogitSplits, tiles), kRouterThreads, 0, major, stream,
           args);
  }
  const size_t scratch =
      std::max(selects ? select_scratch_size(1, E) : 0,
               sizeof(float) * kWarps * kRowTiles<kTokenGroups> * kTokenGroups * 4 * kWarp);
  launch("ffn", gate_up_kernel<W, kTokenGroups, kGates>, dim3(blocks, tiles), kThreads,
         8 * static_cast<size_t>(E) + 16 + scratch, major, stream, args, counters);

  const auto down = down_kernel<W, kTokenGroups>;
  const size_t shared =
      sizeof(float) * kWarps * kTokenGroups * 8 * kSliceColumns + 4 * static_cast<size_t>(E);
  cudaFuncSetAttribute(down, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  const int splits = std::clamp(blocks / slices, 1, kMaxSplits);
  launch("ffn", down, dim3(slices, splits, tiles), kThreads, shared, major, stream, args, counters);
}

template <typename W>
void launch_dtype(const FfnArgs& args, int device, cudaStream_t stream) {
  const auto run = [&]() {
    const bool gated = args.per_neuron == 2;
    if (args.num_tokens <= 8) {
      return gated ? launch_groups<W, 1, 2> : launch_groups<W, 1, 1>;
    }
    if (args.num_tokens <= 16) {
      return gated ? launch_groups<W, 2, 2> : launch_groups<W, 2, 1>;
    }
    return gated ? launch_groups<W, 4, 2> : launch_groups<W, 4, 1>;
  }();
  run(args, device, stream);
}

}  // namespace

void launch_many_tokens(const FfnArgs& args, ScalarType dtype, int device, cudaStream_t stream) {
  if (dtype == ScalarType::BFloat16) {
    launch_dtype<__nv_bfloat16>(args, device, stream);
  } else {
    launch_dtype<__half>(args, device, stream);
  }
}

bool suits_many_tokens(const FfnArgs& args, ScalarType dtype) {
  return dtype != ScalarType::Float && is_vectorised(args, 2) && args.hidden_size % kChunk == 0 &&
         args.num_experts <= kMaxSelectExperts && args.num_tokens > 1;
}

ManyTokensWorkspace many_tokens_workspace(int64_t tokens, const ExpertLayout& layout, int device) {
  const int64_t tiles = (tokens + kTileTokens - 1) / kTileTokens;
  ManyTokensWorkspace w;
  w.logits = kLogitSplits * tokens * layout.num_experts;
  w.counters = tiles * counters_of_tile(layout.hidden_size);
  w.active_bits = tokens * ((layout.num_experts + kWarp - 1) / kWarp);
  w.union_list = tiles * (1 + layout.num_experts);
  w.hidden_stride = (num_neurons(layout) + 15) / 16 * 16;
  w.hidden = tokens * w.hidden_stride;
  const int64_t parts = std::max<int64_t>(
      tiles, std::min<int64_t>(kMaxSplits * tiles,
                               max_blocks(device) / std::max(1, num_slices(layout.hidden_size))));
  w.partial = parts * kTileTokens * layout.hidden_size;
  return w;
}

}  // namespace prunepath
