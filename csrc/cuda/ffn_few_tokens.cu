// The FFN of up to four tokens at a time, on CUDA cores: any dtype, shape and stride.
//
// On Hopper one launch does all after the router's logits. A cluster of blocks takes a range of the
// active neurons; each of its warps computes the activations of some of them and gives these to all
// blocks of the cluster, each of which then adds up its share of the columns of W_down over the
// whole range. The clusters' sums are added, in their order, by the last one to finish a share.
// Older GPUs have no clusters: there blocks work alone, and a launch of its own adds up.

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

#include "cuda/ffn.cuh"
#include "cuda/select.cuh"

namespace prunepath {
namespace {

constexpr int kTileTokens = 4;
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
// One block runs on each multiprocessor, and leaves registers for one of the next router's.
constexpr int kThreadsWithRouter = kThreads + 64;
constexpr int kMaxCluster = 8;
constexpr int kRouterThreads = 128;
// So much shared memory that a multiprocessor takes two blocks of the router at most: started while
// the FFN before it ends, they would else all be put on the few that are idle.
constexpr int kRouterShared = 100 << 10;
// How many times the work a smaller cluster has to do at once to be preferred.
constexpr double kWorthSmallerClusters = 1.08;
constexpr int64_t kMaxHiddenBytes = 96 << 10;  // of shared memory, for a cluster's activations

// How the launch is cut; see `plan`.
struct Plan {
  int32_t cluster;    // blocks of a cluster: 1 without clusters
  int32_t clusters;   // for each tile of tokens
  int32_t per_block;  // chunks of columns for each block of a cluster
  int32_t capacity;   // active neurons of a cluster at most
  bool reduces;       // in the same launch
};

__device__ __forceinline__ uint32_t cluster_rank() {
#if __CUDA_ARCH__ >= 900
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Stores into the same place of another block's shared memory.
__device__ __forceinline__ void store_in_block(float* place, uint32_t rank, float value) {
#if __CUDA_ARCH__ >= 900
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(place));
  asm volatile("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
#else
  *place = value;
#endif
}

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

// A neuron's activations for the tile's tokens, from the sums over a warp's lanes; the same in all
// lanes.
template <typename W, int kTokens, int kGates>
__device__ __forceinline__ void finish_neuron(const FfnArgs& args, int64_t neuron, uint32_t mask,
                                              const float (&dot)[kGates][kTokens],
                                              float (&hidden)[kTokens]) {
  float bias[kGates] = {};
  if (args.b_in.data != nullptr) {
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      bias[g] = parameter_at<W>(args.b_in, neuron * kGates + g);
    }
  }
  const float center = args.center.data == nullptr ? 0.0f : parameter_at<W>(args.center, neuron);
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    float h = activate(args.activation, sum_warp(dot[0][t]) + bias[0]);
    if constexpr (kGates == 2) {
      h *= sum_warp(dot[1][t]) + bias[1];
    }
    hidden[t] = mask >> t & 1 ? h - center : 0.0f;
  }
}

// Runs the neurons from `begin` to `end` in steps of `stride`, one at a time, and calls
// `use(j, activations)` for each. The loads of the next part of a row, or of the next row, are
// under way while this part is multiplied.
template <typename W, int kVec, int kTokens, int kGates, typename Use>
__device__ __forceinline__ void run_neurons(const FfnArgs& args, int first, int tokens,
                                            const int32_t* neurons, const uint32_t* mask, int begin,
                                            int end, int stride, const Use& use) {
  constexpr int kUnroll = 4;
  const int lane = threadIdx.x % kWarp;
  const int vectors = args.hidden_size / kVec;
  const W* w_in = static_cast<const W*>(args.w_in);
  const auto load = [&](Vector<W, kVec>(&w)[kGates][kUnroll], int j, int part) {
    const W* row = w_in + static_cast<int64_t>(neurons[j]) * args.in_neuron_stride;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int v = part + u * kWarp + lane;
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        if (v < vectors) {
          w[g][u] = load_expert<W, kVec>(row + g * args.in_inner_stride + v * kVec);
        }
      }
    }
  };
  Vector<W, kVec> next[kGates][kUnroll];
  float dot[kGates][kTokens] = {};
  int j = begin;
  int part = 0;
  if (j < end) {
    load(next, j, part);
  }
  while (j < end) {
    Vector<W, kVec> w[kGates][kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        w[g][u] = next[g][u];
      }
    }
    const bool ends_row = part + kUnroll * kWarp >= vectors;
    const int next_j = ends_row ? j + stride : j;
    const int next_part = ends_row ? 0 : part + kUnroll * kWarp;
    if (next_j < end) {
      load(next, next_j, next_part);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int v = part + u * kWarp + lane;
      if (v < vectors) {
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
          const W* x =
              static_cast<const W*>(args.x) + (first + ::min(t, tokens - 1)) * args.x_token_stride;
          const Vector<W, kVec> in =
              load_vector<W, kVec>(x + static_cast<int64_t>(v) * kVec * args.x_hidden_stride);
#pragma unroll
          for (int g = 0; g < kGates; ++g) {
#pragma unroll
            for (int i = 0; i < kVec; ++i) {
              dot[g][t] = fmaf(w[g][u][i], in[i], dot[g][t]);
            }
          }
        }
      }
    }
    if (ends_row) {
      const int32_t neuron = neurons[j];
      float hidden[kTokens];
      finish_neuron<W, kTokens, kGates>(args, neuron, mask[neuron / args.expert_width], dot,
                                        hidden);
      use(j, hidden);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
#pragma unroll
        for (int g = 0; g < kGates; ++g) {
          dot[g][t] = 0.0f;
        }
      }
    }
    j = next_j;
    part = next_part;
  }
}

template <typename W, int kVec, int kTokens, int kGates>
__global__ void __launch_bounds__(kTokens == 1 ? kThreadsWithRouter : kThreads, 1)
    ffn_kernel(const FfnArgs args, const Plan plan) {
  constexpr int kColumns = kWarp * kVec;  // of a chunk
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
  const int rank = cluster_rank();
  const int cluster = blockIdx.x / plan.cluster;

  float* hidden = reinterpret_cast<float*>(shared);  // [capacity, kTokens]
  int32_t* neurons = reinterpret_cast<int32_t*>(hidden + plan.capacity * kTokens);  // [capacity]
  int32_t* list = neurons + plan.capacity;                                          // [E]
  uint32_t* mask = reinterpret_cast<uint32_t*>(list + E);                           // [E]
  unsigned char* scratch =
      reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(mask + E) + 15) / 16 * 16);

  cluster_arrive();  // the others' shared memory may be written once all have started
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (args.expert_ids != nullptr) {
    mask_given_experts(args, first, tokens, mask);
  } else {
    select_tokens<kTokens>(args, first, tokens, blockIdx.x == 0, scratch, mask);
  }
  const int64_t active = static_cast<int64_t>(list_active_experts(mask, E, list)) * n;
  const int begin = static_cast<int>(active * cluster / plan.clusters);
  const int count = static_cast<int>(active * (cluster + 1) / plan.clusters) - begin;
  for (int j = threadIdx.x; j < count; j += kThreads) {
    neurons[j] = list[(begin + j) / n] * n + (begin + j) % n;
  }
  __syncthreads();

  cluster_wait();
  run_neurons<W, kVec, kTokens, kGates>(args, first, tokens, neurons, mask, rank * kWarps + warp,
                                        count, plan.cluster * kWarps,
                                        [&](int j, const float (&h)[kTokens]) {
                                          if (lane < plan.cluster) {
#pragma unroll
                                            for (int t = 0; t < kTokens; ++t) {
                                              store_in_block(&hidden[j * kTokens + t], lane, h[t]);
                                            }
                                          }
                                        });
  cluster_arrive();

  // Warps share the block's chunks of columns, and the rows of a chunk where there are more warps
  // than chunks.
  const int chunks = (H + kColumns - 1) / kColumns;
  const int chunk_begin = rank * plan.per_block;
  const int chunk_end = ::min(chunk_begin + plan.per_block, chunks);
  const int sharers = ::max(1, kWarps / plan.per_block);
  const int sharer = warp % sharers;
  float* sums = reinterpret_cast<float*>(scratch);  // [sharers, per_block, kTokens, kColumns]
  const W* w_out = static_cast<const W*>(args.w_out);
  bool waits = true;
  for (int chunk = chunk_begin + warp / sharers; warp / sharers < plan.per_block;
       chunk += kWarps / sharers) {
    const int column = chunk * kColumns + lane * kVec;
    const bool exists = chunk < chunk_end && column < H;
    Vector<W, kVec> rows[kBatch];
    const auto load = [&](int j) {
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (exists && j + b * sharers < count) {
          rows[b] = load_expert<W, kVec>(
              w_out + static_cast<int64_t>(neurons[j + b * sharers]) * H + column);
        }
      }
    };
    load(sharer);
    if (waits) {
      cluster_wait();  // the first rows are under way before the activations are there
      waits = false;
    }
    if (chunk >= chunk_end) {
      break;
    }
    float acc[kTokens][kVec] = {};
    for (int j = sharer; j < count; j += kBatch * sharers) {
      Vector<W, kVec> current[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        current[b] = rows[b];
      }
      load(j + kBatch * sharers);
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
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      float* sum = sums +
                   ((sharer * plan.per_block + chunk - chunk_begin) * kTokens + t) * kColumns +
                   lane * kVec;
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        sum[i] = acc[t][i];
      }
    }
  }
  if (waits) {
    cluster_wait();
  }
  __syncthreads();

  const int columns = plan.per_block * kColumns;
  const auto place = [&](int c, int t, int column) {
    return args.partial +
           ((static_cast<int64_t>(blockIdx.y) * plan.clusters + c) * kTokens + t) * H + column;
  };
  for (int i = threadIdx.x; i < tokens * columns; i += kThreads) {
    const int t = i / columns;
    const int local = i % columns;
    const int column = chunk_begin * kColumns + local;
    if (column < H) {
      float sum = 0.0f;
      for (int s = 0; s < sharers; ++s) {
        sum += sums[((s * plan.per_block + local / kColumns) * kTokens + t) * kColumns +
                    local % kColumns];
      }
      *place(cluster, t, column) = sum;
    }
  }
  if (!plan.reduces ||
      !arrives_last(args.counters + blockIdx.y * kMaxCluster + rank, plan.clusters)) {
    return;
  }
  W* y = static_cast<W*>(args.y);
  for (int i = threadIdx.x; i < tokens * columns; i += kThreads) {
    const int t = i / columns;
    const int column = chunk_begin * kColumns + i % columns;
    if (column < H) {
      float sum = args.b_out.data == nullptr ? 0.0f : parameter_at<W>(args.b_out, column);
#pragma unroll 16
      for (int c = 0; c < plan.clusters; ++c) {
        sum += __ldcg(place(c, t, column));
      }
      y[static_cast<int64_t>(first + t) * H + column] = from_float<W>(sum);
    }
  }
}

// y = b_out + the blocks' sums, for GPUs without clusters.
template <typename W, int kTokens>
__global__ void __launch_bounds__(kThreads) reduce_kernel(const FfnArgs args, const Plan plan) {
  const int H = args.hidden_size;
  const int column = blockIdx.x * kThreads + threadIdx.x;
  const int token = blockIdx.y;
  wait_for_previous_kernel();
  if (column < H) {
    const int64_t tile = token / kTokens;
    float sum = args.b_out.data == nullptr ? 0.0f : parameter_at<W>(args.b_out, column);
#pragma unroll 8
    for (int c = 0; c < plan.clusters; ++c) {
      sum += __ldcg(args.partial + ((tile * plan.clusters + c) * kTokens + token % kTokens) * H +
                    column);
    }
    static_cast<W*>(args.y)[static_cast<int64_t>(token) * H + column] = from_float<W>(sum);
  }
}

// Clusters of this kernel that run at once on the device, with the registers and the shared memory
// that it takes.
template <typename Kernel>
int active_clusters(Kernel kernel, int cluster, size_t shared, int device) {
  if (cluster == 1) {
    int blocks = 0;
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, shared);
    return std::max(1, blocks) * sm_count(device);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(cluster);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  return std::max(1, clusters);
}

// Blocks that the chunks of columns are dealt out to, `per_block` to each.
Plan share_columns(int64_t hidden_size, int columns, int cluster) {
  const int chunks = std::max<int>(1, static_cast<int>((hidden_size + columns - 1) / columns));
  Plan plan{};
  plan.per_block = (chunks + cluster - 1) / cluster;
  plan.cluster = (chunks + plan.per_block - 1) / plan.per_block;
  return plan;
}

// Clusters for each of `tiles` tiles: what the device runs at once, or as many more as it takes for
// a cluster's activations to fit into shared memory.
int clusters_of_tile(int available, int64_t tiles, int64_t neurons, int tokens) {
  const int64_t fitting =
      (neurons * tokens * static_cast<int64_t>(sizeof(float)) + kMaxHiddenBytes - 1) /
      kMaxHiddenBytes;
  return static_cast<int>(std::max<int64_t>({available / tiles, fitting, 1}));
}

// Raises what blocks of the kernel may ask for, which is 48 KB unless said. Never lowers it: other
// shapes may be about to be launched.
template <typename Kernel>
void allow_shared(Kernel kernel, size_t shared) {
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess &&
      static_cast<size_t>(attributes.maxDynamicSharedSizeBytes) < shared) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         static_cast<int>(shared));
  }
}

struct Launch {
  Plan plan;
  size_t shared;
};

// The launch's cut for these shapes; worked out once, since asking for the occupancy takes as long
// as the FFN.
template <typename W, int kVec, int kTokens, int kGates>
Launch plan_ffn(const FfnArgs& args, int device) {
  constexpr int kColumns = kWarp * kVec;
  const auto kernel = ffn_kernel<W, kVec, kTokens, kGates>;
  const int64_t neurons = static_cast<int64_t>(args.num_experts) * args.expert_width;
  const int64_t tiles = (args.num_tokens + kTokens - 1) / kTokens;
  const bool selects = args.expert_ids == nullptr;

  using Key = std::tuple<int, int32_t, int32_t, int64_t, int64_t, bool>;
  static std::map<Key, Launch> known;
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  const Key key{device, args.hidden_size, args.num_experts, neurons, tiles, selects};
  if (const auto found = known.find(key); found != known.end()) {
    return found->second;
  }
  const auto shared_of = [&](Plan& plan, int available) {
    plan.clusters = clusters_of_tile(available, tiles, neurons, kTokens);
    plan.capacity = static_cast<int32_t>((neurons + plan.clusters - 1) / plan.clusters);
    const size_t sums =
        sizeof(float) * kTokens * kColumns * static_cast<size_t>(std::max(kWarps, plan.per_block));
    const size_t scratch =
        std::max(sums, selects ? select_scratch_size(kTokens, args.num_experts) : size_t{0});
    return sizeof(float) * (kTokens + 1) * static_cast<size_t>(plan.capacity) +
           8 * static_cast<size_t>(args.num_experts) + 16 + scratch;
  };
  // Large clusters leave few sums to add up at the end, but do not use all multiprocessors, which
  // are grouped in numbers that not every size divides.
  Launch best{};
  double best_share = 0.0;
  const bool has_clusters = compute_major(device) >= 9;
  for (int size = has_clusters ? kMaxCluster : 1; size >= 1; --size) {
    Plan plan = share_columns(args.hidden_size, kColumns, size);
    if (plan.cluster != size) {
      continue;
    }
    plan.reduces = has_clusters;
    size_t shared = shared_of(plan, sm_count(device) / size);
    allow_shared(kernel, shared);
    // One more cluster than runs at once would take as long as all the others together.
    const int active =
        std::min(sm_count(device) / size, active_clusters(kernel, size, shared, device));
    shared = shared_of(plan, active);
    const double chunks = static_cast<double>((args.hidden_size + kColumns - 1) / kColumns);
    const double share = active * chunks / plan.per_block;
    if (share > best_share * kWorthSmallerClusters) {
      best_share = share;
      best = {plan, shared};
    }
  }
  allow_shared(kernel, best.shared);
  return known[key] = best;
}

template <typename W, int kVec, int kTokens, int kGates>
void launch_ffn(const FfnArgs& args, int device, cudaStream_t stream) {
  const auto [plan, shared] = plan_ffn<W, kVec, kTokens, kGates>(args, device);
  const int major = compute_major(device);
  const auto tiles = static_cast<unsigned>((args.num_tokens + kTokens - 1) / kTokens);
  launch("ffn", ffn_kernel<W, kVec, kTokens, kGates>, dim3(plan.cluster * plan.clusters, tiles),
         kThreads, shared, plan.cluster, major, stream, args, plan);
  if (!plan.reduces) {
    const dim3 grid((args.hidden_size + kThreads - 1) / kThreads, args.num_tokens);
    launch("ffn", reduce_kernel<W, kTokens>, grid, kThreads, 0, 1, major, stream, args, plan);
  }
}

template <typename W, int kVec, int kTokens>
void launch_router_of(const FfnArgs& args, int device, cudaStream_t stream) {
  cudaFuncSetAttribute(router_kernel<W, kVec, kTokens>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       kRouterShared);
  const auto tiles = static_cast<unsigned>((args.num_tokens + kTokens - 1) / kTokens);
  launch("routed_ffn", router_kernel<W, kVec, kTokens>, dim3(args.num_experts, tiles),
         kRouterThreads, compute_major(device) >= 9 ? kRouterShared : 0, 1, compute_major(device),
         stream, args);
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

int64_t few_tokens_counters(int64_t tokens) {
  return (tokens + kTileTokens - 1) / kTileTokens * kMaxCluster;
}

int64_t few_tokens_partial_size(int64_t tokens, const ExpertLayout& layout, int device) {
  const int64_t tiles = (tokens + kTileTokens - 1) / kTileTokens;
  const int64_t clusters = std::max<int64_t>(
      sm_count(device), tiles * clusters_of_tile(0, tiles, num_neurons(layout), kTileTokens));
  return clusters * kTileTokens * layout.hidden_size;
}

}  // namespace prunepath
