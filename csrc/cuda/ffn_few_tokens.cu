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
constexpr double kWorthSmallerClusters = 1.15;
// Of shared memory: for the dot products of a cluster's neurons, in one part and in several.
constexpr int64_t kMaxHiddenBytes = 48 << 10;
constexpr int64_t kMaxDotBytes = 112 << 10;
constexpr int kPartVectors = 4 * kWarp;  // what a warp has under way

// How the launch is cut; see `plan`.
struct Plan {
  int32_t cluster;    // blocks of a cluster: 1 without clusters
  int32_t clusters;   // for each tile of tokens
  int32_t per_block;  // chunks of columns for each block of a cluster
  int32_t capacity;   // active neurons of a cluster at most
  int32_t parts;      // of a neuron's rows of w_in, each by one warp
  int32_t part_vectors;
  bool reduces;  // in the same launch
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

// A part of a neuron's rows of w_in: what a warp multiplies at a time.
struct Part {
  int neuron;  // its position among the cluster's
  int begin;   // vectors
  int end;
};

// dots = the products of the parts from `first_part` on, in steps of `stride`, with the tokens:
// use( part's number, dots), the same in all lanes. The loads of the next vectors are under way
// while these are multiplied.
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
  // In turn what selecting takes, the parts' dot products and the sums over the block's neurons.
  float* dots = reinterpret_cast<float*>(scratch);  // [capacity, parts, kGates, kTokens]
  float* sums = reinterpret_cast<float*>(scratch);  // [sharers, per_block, kTokens, kColumns]

  wait_for_previous_kernel();
  let_next_kernel_start();
  if (args.expert_ids != nullptr) {
    mask_given_experts(args, first, tokens, mask);
  } else {
    select_tokens<kTokens>(args, first, tokens, blockIdx.x == 0, scratch, mask);
  }
  const int active = list_active_experts(mask, E, list) * n;
  const int base = active / plan.clusters;
  const int more = active % plan.clusters;  // clusters that have one neuron more
  const int begin = cluster * base + ::min(cluster, more);
  const int count = base + (cluster < more);
  for (int j = threadIdx.x; j < count; j += kThreads) {
    neurons[j] = list[(begin + j) / n] * n + (begin + j) % n;
  }
  // The others' shared memory may be written once they have started and selected.
  __syncthreads();
  cluster_arrive();
  cluster_wait();

  multiply_parts<W, kVec, kTokens, kGates>(
      args, plan, first, tokens, neurons, count, rank * kWarps + warp, plan.cluster * kWarps,
      [&](int part, const float (&dot)[kGates][kTokens]) {
        if (lane < plan.cluster) {
#pragma unroll
          for (int g = 0; g < kGates; ++g) {
#pragma unroll
            for (int t = 0; t < kTokens; ++t) {
              store_in_block(&dots[(part * kGates + g) * kTokens + t], lane, dot[g][t]);
            }
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
  const W* w_out = static_cast<const W*>(args.w_out);
  const auto finish = [&]() {
    cluster_wait();
    for (int i = threadIdx.x; i < count * kTokens; i += kThreads) {
      const int j = i / kTokens;
      const int t = i % kTokens;
      const bool chosen = mask[neurons[j] / n] >> t & 1;
      hidden[i] = chosen ? activation_of<W, kTokens, kGates>(
                               args, plan, neurons[j], dots + j * plan.parts * kGates * kTokens, t)
                         : 0.0f;
    }
    __syncthreads();
  };
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
    if (waits) {  // the first rows are under way before the activations are there
      finish();
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
    finish();
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
  const int vectors = args.hidden_size / kVec;
  const auto shared_of = [&](Plan& plan, int available) {
    plan.clusters = clusters_of_tile(available, tiles, neurons, kTokens * kGates);
    plan.capacity = static_cast<int32_t>((neurons + plan.clusters - 1) / plan.clusters);
    // As many parts as a warp's loads under way make, if their dot products fit.
    const int64_t part_bytes =
        sizeof(float) * kTokens * kGates * std::max<int64_t>(plan.capacity, 1);
    plan.parts = static_cast<int32_t>(std::clamp<int64_t>(
        kMaxDotBytes / part_bytes, 1, (vectors + kPartVectors - 1) / kPartVectors));
    plan.part_vectors = (vectors + plan.parts - 1) / plan.parts;
    const size_t dots = static_cast<size_t>(plan.parts * part_bytes);
    const size_t sums =
        sizeof(float) * kTokens * kColumns * static_cast<size_t>(std::max(kWarps, plan.per_block));
    const size_t scratch = std::max(
        {sums, dots, selects ? select_scratch_size(kTokens, args.num_experts) : size_t{0}});
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
      sm_count(device), tiles * clusters_of_tile(0, tiles, num_neurons(layout), kTileTokens * 2));
  return clusters * kTileTokens * layout.hidden_size;
}

}  // namespace prunepath
