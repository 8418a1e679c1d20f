// The FFN of up to four tokens at a time, on CUDA cores: any dtype, shape and stride.
//
// One launch does all after the router's logits: a block takes a range of the active neurons,
// computes their activations, and then what they add to the output. The last blocks to finish add
// up these sums, each those of some columns, in the order of the blocks.

#include <algorithm>

#include "cuda/ffn.cuh"
#include "cuda/select.cuh"

namespace prunepath {
namespace {

constexpr int kTileTokens = 4;
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
// One block runs on each multiprocessor. For one token of a gated FFN it leaves registers for a
// block of the next router, where that may start early.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kThreadsWithRouter = kThreads;
#else
constexpr int kThreadsWithRouter = kThreads + 64;
#endif
constexpr int kRouterThreads = 128;
// So much shared memory that a multiprocessor takes two blocks of the router at most: started while
// the FFN before it ends, they would else all be put on the few that are idle.
constexpr int kRouterShared = 100 << 10;
constexpr int kPartVectors = 4 * kWarp;  // what a warp has under way
// Of shared memory: for the dot products of a block's neurons, in one part and in several.
constexpr int64_t kMaxHiddenBytes = 32 << 10;
constexpr int64_t kMaxDotBytes = 64 << 10;
constexpr int kMaxReducers = 32;

// How the launch is cut; see `launch_ffn`.
struct Plan {
  int32_t blocks;    // for each tile of tokens
  int32_t capacity;  // active neurons of a block at most
  int32_t parts;     // of a neuron's rows of w_in, each by one warp
  int32_t part_vectors;
  int32_t reducers;   // blocks that add up at the end
  int32_t row_lanes;  // that read a row of sums then
};

// logits[t][e] = W_r[e]·x[t]: a block for each expert and tile of tokens.
template <typename W, int kVec, int kTokens>
__global__ void __launch_bounds__(kRouterThreads) router_kernel(const FfnArgs args) {
  __shared__ float sums[kRouterThreads / kWarp][kTokens];
  const int e = blockIdx.x;
  const int first = blockIdx.y * kTokens;
  const int tokens = ::min(kTokens, args.num_tokens - first);
  const int vectors = args.hidden_size / kVec;
  const W* row =
      static_cast<const W*>(args.router_weight) + static_cast<int64_t>(e) * args.hidden_size;
  constexpr int kLine = 128 / static_cast<int>(sizeof(W));
  for (int i = threadIdx.x * kLine; i < args.hidden_size; i += kRouterThreads * kLine) {
    prefetch(row + i);
  }
  wait_for_previous_kernel();
  let_next_kernel_start();
  zero_counters(args);
  float dot[kTokens] = {};
#pragma unroll 4
  for (int v = threadIdx.x; v < vectors; v += kRouterThreads) {
    const Vector<W, kVec> w = load_vector<W, kVec>(row + v * kVec);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const W* x =
          static_cast<const W*>(args.x) + (first + ::min(t, tokens - 1)) * args.x_token_stride;
      const Vector<W, kVec> in =
          load_vector<W, kVec>(x + static_cast<int64_t>(v) * kVec * args.x_hidden_stride);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        dot[t] = fmaf(w[i], in[i], dot[t]);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    const float sum = sum_warp(dot[t]);
    if (threadIdx.x % kWarp == 0) {
      sums[threadIdx.x / kWarp][t] = sum;
    }
  }
  __syncthreads();
  if (threadIdx.x < tokens) {
    float sum = 0.0f;
    for (int warp = 0; warp < kRouterThreads / kWarp; ++warp) {
      sum += sums[warp][threadIdx.x];
    }
    if (args.router_bias.data != nullptr) {
      sum += parameter_at<W>(args.router_bias, e);
    }
    args.logits[static_cast<int64_t>(first + threadIdx.x) * args.num_experts + e] = sum;
  }
}

// A part of a neuron's rows of w_in: what a warp multiplies at a time.
struct Part {
  int neuron;  // its position among the block's
  int begin;   // vectors
  int end;
};

// Calls `use` with the number of a part, from `first_part` on in steps of `stride`, and the part's
// products with the tokens, which are the same in all lanes. The loads of the next vectors are
// under way while these are multiplied.
template <typename W, int kVec, int kTokens, int kGates, typename Use>
__device__ __forceinline__ void multiply_parts(const FfnArgs& args, const Plan& plan, int first,
                                               int tokens, const int32_t* neurons, int count,
                                               int first_part, int stride, const Use& use) {
  constexpr int kUnroll = 4;
  const int lane = threadIdx.x % kWarp;
  const int vectors = args.hidden_size / kVec;
  const int num_parts = count * plan.parts;
  const W* w_in = static_cast<const W*>(args.w_in);
  const auto part_at = [&](int i) {
    const int begin = i % plan.parts * plan.part_vectors;
    return Part{i / plan.parts, begin, ::min(begin + plan.part_vectors, vectors)};
  };
  Vector<W, kVec> next[kGates][kUnroll];
  const auto load = [&](const Part& part, int from) {
    const W* row = w_in + static_cast<int64_t>(neurons[part.neuron]) * args.in_neuron_stride;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int v = from + u * kWarp + lane;
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        if (v < part.end) {
          next[g][u] = load_expert<W, kVec>(row + g * args.in_inner_stride + v * kVec);
        }
      }
    }
  };
  float dot[kGates][kTokens] = {};
  int i = first_part;
  Part part = part_at(i);
  int from = part.begin;
  if (i < num_parts) {
    load(part, from);
  }
  while (i < num_parts) {
    Vector<W, kVec> w[kGates][kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        w[g][u] = next[g][u];
      }
    }
    const Part current = part;
    const int current_from = from;
    const int current_i = i;
    from += kUnroll * kWarp;
    if (from >= part.end) {
      i += stride;
      part = part_at(i);
      from = part.begin;
    }
    if (i < num_parts) {
      load(part, from);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int v = current_from + u * kWarp + lane;
      if (v < current.end) {
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
          const W* x =
              static_cast<const W*>(args.x) + (first + ::min(t, tokens - 1)) * args.x_token_stride;
          const Vector<W, kVec> in =
              load_vector<W, kVec>(x + static_cast<int64_t>(v) * kVec * args.x_hidden_stride);
#pragma unroll
          for (int g = 0; g < kGates; ++g) {
#pragma unroll
            for (int e = 0; e < kVec; ++e) {
              dot[g][t] = fmaf(w[g][u][e], in[e], dot[g][t]);
            }
          }
        }
      }
    }
    if (i != current_i) {
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
          dot[g][t] = sum_warp(dot[g][t]);
        }
      }
      use(current_i, dot);
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
          dot[g][t] = 0.0f;
        }
      }
    }
  }
}

// A neuron's activation for token t, from its parts' dot products [parts, kGates, kTokens].
template <typename W, int kTokens, int kGates>
__device__ __forceinline__ float activation_of(const FfnArgs& args, const Plan& plan,
                                               int32_t neuron, const float* dots, int t) {
  float pre[kGates] = {};
  for (int p = 0; p < plan.parts; ++p) {
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      pre[g] += dots[(p * kGates + g) * kTokens + t];
    }
  }
  if (args.b_in.data != nullptr) {
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      pre[g] += parameter_at<W>(args.b_in, static_cast<int64_t>(neuron) * kGates + g);
    }
  }
  float h = activate(args.activation, pre[0]);
  if constexpr (kGates == 2) {
    h *= pre[1];
  }
  return args.center.data == nullptr ? h : h - parameter_at<W>(args.center, neuron);
}

// Sums of neighbouring columns, read and written at once.
template <int kCount>
struct __align__(4 * kCount) Sums {
  float values[kCount];

  __device__ __forceinline__ void add(const Sums& other) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] += other.values[i];
    }
  }
};
template <int kVec>
constexpr int kSumVector = kVec == 1 ? 1 : 4;

// What other blocks wrote: from L2.
__device__ __forceinline__ Sums<4> load_sums(const Sums<4>* data) {
  const float4 read = __ldcg(reinterpret_cast<const float4*>(data));
  return {{read.x, read.y, read.z, read.w}};
}
__device__ __forceinline__ Sums<1> load_sums(const Sums<1>* data) {
  return {{__ldcg(data->values)}};
}

template <typename W, int kVec, int kTokens, int kGates>
__global__ void __launch_bounds__(kTokens == 1 && kGates == 2 ? kThreadsWithRouter : kThreads, 1)
    ffn_kernel(const FfnArgs args, const Plan plan) {
  constexpr int kColumns = kWarp * kVec;  // of a chunk
  constexpr int kSum = kSumVector<kVec>;
  using ColumnSums = Sums<kSum>;
  constexpr int kBatch =
      kTokens == 1 ? 8 : 4;  // rows of W_down that a warp has loads in flight for
  extern __shared__ __align__(16) unsigned char shared[];
  const int E = args.num_experts;
  const int H = args.hidden_size;
  const int n = args.expert_width;
  const int first = blockIdx.y * kTokens;
  const int tokens = ::min(kTokens, args.num_tokens - first);
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int chunks = ::max(1, (H + kColumns - 1) / kColumns);

  float* hidden = reinterpret_cast<float*>(shared);  // [capacity, kTokens]
  int32_t* neurons = reinterpret_cast<int32_t*>(hidden + plan.capacity * kTokens);  // [capacity]
  int32_t* list = neurons + plan.capacity;                                          // [E]
  uint32_t* mask = reinterpret_cast<uint32_t*>(list + E);                           // [E]
  // By its offset, so that the compiler knows that it is shared memory.
  unsigned char* scratch = shared + (plan.capacity * (kTokens + 1) + 2 * E + 3) / 4 * 16;
  // In turn what selecting takes, the parts' dot products and the sums over the block's neurons.
  float* dots = reinterpret_cast<float*>(scratch);  // [capacity, parts, kGates, kTokens]
  float* sums = reinterpret_cast<float*>(scratch);  // [sharers, chunks, kTokens, kColumns]

  wait_for_previous_kernel();
  let_next_kernel_start();
  if (args.expert_ids != nullptr) {
    mask_given_experts(args, first, tokens, mask);
  } else {
    select_tokens<kTokens, 1>(args, first, tokens, blockIdx.x == 0, scratch, mask);
  }
  const int active = list_active_experts(mask, E, list) * n;
  const int base = active / plan.blocks;
  const int more = active % plan.blocks;  // blocks that have one neuron more
  const int block = blockIdx.x;
  const int begin = block * base + ::min(block, more);
  const int count = base + (block < more);
  for (int j = threadIdx.x; j < count; j += kThreads) {
    neurons[j] = list[(begin + j) / n] * n + (begin + j) % n;
  }
  __syncthreads();

  multiply_parts<W, kVec, kTokens, kGates>(args, plan, first, tokens, neurons, count, warp, kWarps,
                                           [&](int part, const float (&dot)[kGates][kTokens]) {
                                             if (lane == 0) {
#pragma unroll
                                               for (int g = 0; g < kGates; ++g) {
#pragma unroll
                                                 for (int t = 0; t < kTokens; ++t) {
                                                   dots[(part * kGates + g) * kTokens + t] =
                                                       dot[g][t];
                                                 }
                                               }
                                             }
                                           });

  // Warps share the chunks of columns, and the rows of a chunk where there are more warps than
  // chunks. The first rows are under way before the activations are there.
  const int sharers = ::max(1, kWarps / chunks);
  const int sharer = warp % sharers;
  float* partials = args.partial + static_cast<int64_t>(blockIdx.y) * plan.blocks * kTokens * H;
  float* partial = partials + static_cast<int64_t>(block) * kTokens * H;  // of this block
  const W* w_out = static_cast<const W*>(args.w_out);
  Vector<W, kVec> rows[kBatch];
  const auto load = [&](int chunk, int j) {
    const int column = chunk * kColumns + lane * kVec;
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (chunk < chunks && column < H && j + b * sharers < count) {
        rows[b] = load_expert<W, kVec>(w_out + static_cast<int64_t>(neurons[j + b * sharers]) * H +
                                       column);
      }
    }
  };
  load(warp / sharers, sharer);
  __syncthreads();
  for (int i = threadIdx.x; i < count * kTokens; i += kThreads) {
    const int j = i / kTokens;
    const int t = i % kTokens;
    const bool chosen = mask[neurons[j] / n] >> t & 1;
    hidden[i] = chosen ? activation_of<W, kTokens, kGates>(
                             args, plan, neurons[j], dots + j * plan.parts * kGates * kTokens, t)
                       : 0.0f;
  }
  __syncthreads();
  for (int chunk = warp / sharers; chunk < chunks; chunk += kWarps / sharers) {
    const bool exists = chunk * kColumns + lane * kVec < H;
    float acc[kTokens][kVec] = {};
    for (int j = sharer; j < count; j += kBatch * sharers) {
      Vector<W, kVec> current[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        current[b] = rows[b];
      }
      load(chunk, j + kBatch * sharers);
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (exists && j + b * sharers < count) {
#pragma unroll
          for (int t = 0; t < kTokens; ++t) {
            const float h = hidden[(j + b * sharers) * kTokens + t];
#pragma unroll
            for (int i = 0; i < kVec; ++i) {
              acc[t][i] = fmaf(h, current[b][i], acc[t][i]);
            }
          }
        }
      }
    }
    load(chunk + kWarps / sharers, sharer);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const auto store = [&](float* to) {
#pragma unroll
        for (int i = 0; i < kVec; i += kSum) {
          ColumnSums part;
#pragma unroll
          for (int k = 0; k < kSum; ++k) {
            part.values[k] = acc[t][i + k];
          }
          *reinterpret_cast<ColumnSums*>(to + i) = part;
        }
      };
      if (sharers > 1) {
        store(sums + ((sharer * chunks + chunk) * kTokens + t) * kColumns + lane * kVec);
      } else if (exists && t < tokens) {
        store(partial + t * H + chunk * kColumns + lane * kVec);
      }
    }
  }
  if (sharers > 1) {
    __syncthreads();
    for (int t = 0; t < tokens; ++t) {
      for (int column = threadIdx.x * kSum; column < H; column += kThreads * kSum) {
        const float* sum = sums + (column / kColumns * kTokens + t) * kColumns + column % kColumns;
        ColumnSums total{};
        for (int s = 0; s < sharers; ++s) {
          total.add(*reinterpret_cast<const ColumnSums*>(sum + s * chunks * kTokens * kColumns));
        }
        *reinterpret_cast<ColumnSums*>(partial + t * H + column) = total;
      }
    }
  }

  // The last to arrive wait for each other alone: all blocks before them have arrived.
  const int block_columns = plan.row_lanes * kSum;
  const int column_blocks = (H + block_columns - 1) / block_columns;
  const int reducers = plan.reducers;
  uint32_t* arrived = args.counters + blockIdx.y;
  __shared__ int turn;
  __syncthreads();
  if (threadIdx.x == 0) {
    turn = static_cast<int>(add_release(arrived)) - (plan.blocks - reducers);
    while (turn >= 0 && load_acquire(arrived) < static_cast<uint32_t>(plan.blocks)) {
    }
  }
  __syncthreads();
  if (turn < 0) {
    return;
  }
  W* y = static_cast<W*>(args.y);
  const int rows_at_once = kThreads / plan.row_lanes;  // blocks whose sums are read at a time
  for (int column_block = turn; column_block < column_blocks; column_block += reducers) {
    const int read = column_block * block_columns + threadIdx.x % plan.row_lanes * kSum;
    for (int t = 0; t < tokens; ++t) {
      constexpr int kHeld = 9;  // loads under way: the blocks of a large GPU
      ColumnSums total{};
      for (int from = threadIdx.x / plan.row_lanes; from < plan.blocks;
           from += kHeld * rows_at_once) {
        ColumnSums part[kHeld];
#pragma unroll
        for (int u = 0; u < kHeld; ++u) {
          const int64_t from_block = from + u * rows_at_once;
          part[u] = {};
          if (from_block < plan.blocks && read < H) {
            part[u] = load_sums(reinterpret_cast<const ColumnSums*>(
                partials + (from_block * kTokens + t) * H + read));
          }
        }
#pragma unroll
        for (int u = 0; u < kHeld; ++u) {
          total.add(part[u]);
        }
      }
      for (int offset = plan.row_lanes; offset < kWarp; offset *= 2) {
        ColumnSums other;
#pragma unroll
        for (int i = 0; i < kSum; ++i) {
          other.values[i] = __shfl_xor_sync(kAllLanes, total.values[i], offset);
        }
        total.add(other);
      }
      __syncthreads();  // the last columns' sums have been read
      if (lane < plan.row_lanes) {
        *reinterpret_cast<ColumnSums*>(sums + warp * block_columns + lane * kSum) = total;
      }
      __syncthreads();
      const int column = column_block * block_columns + static_cast<int>(threadIdx.x);
      if (threadIdx.x < block_columns && column < H) {
        float sum = args.b_out.data == nullptr ? 0.0f : parameter_at<W>(args.b_out, column);
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
          sum += sums[w * block_columns + threadIdx.x];
        }
        y[static_cast<int64_t>(first + t) * H + column] = from_float<W>(sum);
      }
    }
  }
}

// Blocks for each of `tiles` tiles: one for each multiprocessor, or as many as it takes for a
// block's dot products to fit into shared memory.
int64_t blocks_of_tile(int64_t available, int64_t tiles, int64_t neurons, int64_t dots) {
  const int64_t bytes = neurons * dots * static_cast<int64_t>(sizeof(float));
  return std::max<int64_t>({available / tiles, (bytes + kMaxHiddenBytes - 1) / kMaxHiddenBytes, 1});
}

template <typename W, int kVec, int kTokens, int kGates>
void launch_ffn(const FfnArgs& args, int device, cudaStream_t stream) {
  const auto kernel = ffn_kernel<W, kVec, kTokens, kGates>;
  const int64_t neurons = static_cast<int64_t>(args.num_experts) * args.expert_width;
  const int64_t tiles = (args.num_tokens + kTokens - 1) / kTokens;
  const int vectors = args.hidden_size / kVec;
  const int chunks = (args.hidden_size + kWarp * kVec - 1) / (kWarp * kVec);
  Plan plan;
  plan.blocks =
      static_cast<int32_t>(blocks_of_tile(sm_count(device), tiles, neurons, kTokens * kGates));
  plan.capacity = static_cast<int32_t>((neurons + plan.blocks - 1) / plan.blocks);
  // As many parts as a warp's loads under way make, if their dot products fit.
  const int64_t part_bytes = sizeof(float) * kTokens * kGates * std::max(plan.capacity, 1);
  plan.parts = static_cast<int32_t>(std::clamp<int64_t>(
      kMaxDotBytes / part_bytes, 1, std::max(1, (vectors + kPartVectors - 1) / kPartVectors)));
  plan.part_vectors = (vectors + plan.parts - 1) / plan.parts;
  // Blocks may wait for each other where all of them run at once; else one block adds up alone.
  // Few columns for each, so that all is read at once.
  constexpr int kSum = kSumVector<kVec>;
  const int reducers =
      plan.blocks * tiles > sm_count(device) ? 1 : std::clamp(plan.blocks / 4, 1, kMaxReducers);
  plan.row_lanes = kWarp;
  while (plan.row_lanes > kWarp / 4 &&
         static_cast<int64_t>(plan.row_lanes / 2) * kSum * reducers >= args.hidden_size) {
    plan.row_lanes /= 2;
  }
  const int block_columns = plan.row_lanes * kSum;
  plan.reducers = std::clamp((args.hidden_size + block_columns - 1) / block_columns, 1, reducers);
  const size_t sums = sizeof(float) * std::max(kTokens * kWarp * kVec * std::max(kWarps, chunks),
                                               kWarps * block_columns);
  const size_t scratch = std::max(
      {sums, static_cast<size_t>(plan.parts * part_bytes),
       args.expert_ids == nullptr ? select_scratch_size(kTokens, args.num_experts) : size_t{0}});
  const size_t shared = sizeof(float) * (kTokens + 1) * static_cast<size_t>(plan.capacity) +
                        8 * static_cast<size_t>(args.num_experts) + 16 + scratch;
  allow_shared(kernel, shared, device);
  launch("ffn", kernel, dim3(plan.blocks, static_cast<unsigned>(tiles)), kThreads, shared,
         compute_major(device), stream, args, plan);
}

template <typename W, int kVec, int kTokens>
void launch_router_of(const FfnArgs& args, int device, cudaStream_t stream) {
  const size_t shared = compute_major(device) >= 9 ? kRouterShared : 0;
  allow_shared(router_kernel<W, kVec, kTokens>, shared, device);
  const auto tiles = static_cast<unsigned>((args.num_tokens + kTokens - 1) / kTokens);
  launch("routed_ffn", router_kernel<W, kVec, kTokens>, dim3(args.num_experts, tiles),
         kRouterThreads, shared, compute_major(device), stream, args);
}

template <typename W>
void launch_router_dtype(const FfnArgs& args, int device, cudaStream_t stream) {
  constexpr int kVec = kFullVector<W>;
  const auto run = !is_vectorised(args, sizeof(W)) ? launch_router_of<W, 1, kTileTokens>
                   : args.num_tokens == 1          ? launch_router_of<W, kVec, 1>
                                                   : launch_router_of<W, kVec, kTileTokens>;
  run(args, device, stream);
}

template <typename W>
void launch_dtype(const FfnArgs& args, int device, cudaStream_t stream) {
  constexpr int kVec = kFullVector<W>;
  const auto run = [&]() {
    const bool gated = args.per_neuron == 2;
    if (!is_vectorised(args, sizeof(W))) {
      return gated ? launch_ffn<W, 1, kTileTokens, 2> : launch_ffn<W, 1, kTileTokens, 1>;
    }
    if (args.num_tokens == 1) {
      return gated ? launch_ffn<W, kVec, 1, 2> : launch_ffn<W, kVec, 1, 1>;
    }
    return gated ? launch_ffn<W, kVec, kTileTokens, 2> : launch_ffn<W, kVec, kTileTokens, 1>;
  }();
  run(args, device, stream);
}

}  // namespace

void launch_router(const FfnArgs& args, ScalarType dtype, int device, cudaStream_t stream) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return launch_router_dtype<__nv_bfloat16>(args, device, stream);
    case ScalarType::Half:
      return launch_router_dtype<__half>(args, device, stream);
    default:
      return launch_router_dtype<float>(args, device, stream);
  }
}

void launch_few_tokens(const FfnArgs& args, ScalarType dtype, int device, cudaStream_t stream) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return launch_dtype<__nv_bfloat16>(args, device, stream);
    case ScalarType::Half:
      return launch_dtype<__half>(args, device, stream);
    default:
      return launch_dtype<float>(args, device, stream);
  }
}

int64_t few_tokens_counters(int64_t tokens) { return (tokens + kTileTokens - 1) / kTileTokens; }

int64_t few_tokens_partial_size(int64_t tokens, const ExpertLayout& layout, int device) {
  const int64_t tiles = (tokens + kTileTokens - 1) / kTileTokens;
  const int64_t blocks = std::max<int64_t>(
      sm_count(device), tiles * blocks_of_tile(0, tiles, num_neurons(layout), kTileTokens * 2));
  return blocks * kTileTokens * layout.hidden_size;
}

}  // namespace prunepath
