// Which experts a tile of tokens runs: a router's logits, the selection, and the list. Compile with
// -fmad=false: the arithmetic of selecting has to be the CPU's, bit for bit.

#include <algorithm>
#include <bit>

#include "cuda/ffn.cuh"
#include "cuda/select.cuh"

namespace prunepath {
namespace {

constexpr int kProductThreads = 128;
constexpr int kTogether = 8;  // tokens that share a reading of the router's weights
// Rows of up to kSmallRow experts are selected by blocks of kSmallBlock threads.
constexpr int kSmallRow = 512;
constexpr int kSmallBlock = 128;
constexpr int kLargeBlock = 1024;

// out[t, row] = weight[row]·in[t] + bias[row] in float32, the same whatever the number of tokens.
// With factors, out has the logits that they make: factor f of an expert is weight's row
// f * rows + row.
struct Products {
  const void* weight;     // [rows, width], or [factors * rows, width]
  DeviceParameter scale;  // of each row of weight, which is in 4 bits; missing: it is not
  const void* in;         // [tokens, width]
  DeviceParameter bias;
  float* out;  // [tokens, rows]
  int32_t num_tokens;
  int32_t rows;
  int32_t width;
  int32_t lanes;  // threads of a row: a power of two up to a warp, or the whole block
  // With factors.
  DeviceParameter floor;
  DeviceParameter log_scale;
  Activation activation;
};

// P: the dtype of parameters that are not float32. They are all loaded first: between steps that
// depend on them, the compiler would copy the steps for every dtype.
template <typename P, typename W, int kFactors, int kRows>
__device__ __forceinline__ float output_of(const Products& args, int row,
                                           const float (&sums)[kRows]) {
  const auto load = [&](const DeviceParameter& parameter, float (&values)[kRows]) {
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      values[k] = parameter_at<P>(parameter, k * args.rows + row);
    }
  };
  float products[kRows];
  load(args.bias, products);
  float scales[kRows];
  if constexpr (std::is_same_v<W, Int4Pair>) {
    load(args.scale, scales);
  }
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    products[k] += std::is_same_v<W, Int4Pair> ? sums[k] * scales[k] : sums[k];
  }
  if constexpr (kFactors == 0) {
    return products[0];
  } else {
    float floors[kRows];
    load(args.floor, floors);
    const float log_scale = parameter_at<P>(args.log_scale, row);
    float logs = 0.0f;
#pragma unroll
    for (int f = 0; f < kFactors; ++f) {
      const float factor = f == 0 ? router_activate(args.activation, products[f]) : products[f];
      logs += 0.25f * logf(factor * factor + floors[f] * floors[f]);
    }
    return logs + log_scale;
  }
}

template <typename P, typename W, typename In, int kVec, int kTokens, int kFactors>
__global__ void __launch_bounds__(kProductThreads) products_kernel(const Products args) {
  constexpr int kRows = kFactors == 0 ? 1 : kFactors;  // of weight, for one of out
  constexpr int kUnroll = 4 / kRows;                   // so that as many loads are on their way
  constexpr int kStep = kVec / kElements<W>;
  __shared__ float warp_sums[kProductThreads / kWarp][kTokens][kRows];
  const int row = blockIdx.x * (kProductThreads / args.lanes) + threadIdx.x / args.lanes;
  const int lane = threadIdx.x % args.lanes;
  const int first = blockIdx.y * kTokens;
  const int tokens = ::min(kTokens, args.num_tokens - first);
  const int vectors = row < args.rows ? args.width / kVec : 0;
  const W* weights[kRows];
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    weights[k] = static_cast<const W*>(args.weight) +
                 (static_cast<int64_t>(k) * args.rows + row) * (args.width / kElements<W>);
  }
  for (int v = lane; v < vectors; v += args.lanes) {
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      prefetch(weights[k] + v * kStep);
    }
  }
  wait_for_previous_kernel();
  let_next_kernel_start();
  float sums[kTokens][kRows] = {};
#pragma unroll kUnroll
  for (int v = lane; v < vectors; v += args.lanes) {
    Vector<W, kVec> w[kRows];
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      w[k] = load_vector<W, kVec>(weights[k] + v * kStep);
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const int64_t token = first + ::min(t, tokens - 1);
      float in[kVec];
      load_floats(static_cast<const In*>(args.in) + token * args.width + v * kVec, in);
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          sums[t][k] = fmaf(w[k][i], in[i], sums[t][k]);
        }
      }
    }
  }
  const auto write = [&](int t, const float (&sum)[kRows]) {
    args.out[static_cast<int64_t>(first + t) * args.rows + row] =
        output_of<P, W, kFactors>(args, row, sum);
  };
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      sums[t][k] = sum_lanes(sums[t][k], ::min(args.lanes, kWarp));
      if (args.lanes > kWarp && threadIdx.x % kWarp == 0) {
        warp_sums[threadIdx.x / kWarp][t][k] = sums[t][k];
      }
    }
  }
  if (args.lanes > kWarp) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < tokens) {
      float sum[kRows] = {};
      for (int warp = 0; warp < kProductThreads / kWarp; ++warp) {
#pragma unroll
        for (int k = 0; k < kRows; ++k) {
          sum[k] += warp_sums[warp][threadIdx.x][k];
        }
      }
      write(threadIdx.x, sum);
    }
    return;
  }
  // Every lane has the sums, and each writes another token's.
  for (int t = lane; t < tokens && row < args.rows; t += args.lanes) {
    float sum[kRows] = {};
#pragma unroll
    for (int other = 0; other < kTokens; ++other) {
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        sum[k] = other == t ? sums[other][k] : sum[k];
      }
    }
    write(t, sum);
  }
}

template <typename P, typename W, typename In, int kVec, int kFactors>
void launch_products_vec(const Target& target, Products args) {
  const auto vectors = static_cast<unsigned>(args.width / kVec);
  args.lanes = vectors >= kProductThreads
                   ? kProductThreads
                   : static_cast<int32_t>(std::bit_ceil(std::min<unsigned>(vectors, kWarp)));
  const int block_rows = kProductThreads / args.lanes;
  const auto blocks = static_cast<unsigned>((args.rows + block_rows - 1) / block_rows);
  if (args.num_tokens == 1) {
    launch(target, products_kernel<P, W, In, kVec, 1, kFactors>, dim3(blocks), kProductThreads,
           args);
  } else {
    const auto groups = static_cast<unsigned>((args.num_tokens + kTogether - 1) / kTogether);
    launch(target, products_kernel<P, W, In, kVec, kTogether, kFactors>, dim3(blocks, groups),
           kProductThreads, args);
  }
}

template <typename P, typename W, typename In, int kFactors>
void launch_products_of(const Target& target, const Products& args) {
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  if (args.width % kFullVector<W> == 0 && aligned(args.weight) && aligned(args.in)) {
    launch_products_vec<P, W, In, kFullVector<W>, kFactors>(target, args);
  } else {
    launch_products_vec<P, W, In, kElements<W>, kFactors>(target, args);
  }
}

template <typename P, typename In, int kFactors>
void launch_products(const Target& target, const Products& args) {
  if (args.scale.data == nullptr) {
    launch_products_of<P, P, In, kFactors>(target, args);
  } else {
    launch_products_of<P, Int4Pair, In, kFactors>(target, args);
  }
}

template <typename P, typename In>
void launch_logits(const Target& target, const Products& args, int32_t factors) {
  switch (factors) {
    case 2:
      launch_products<P, In, 2>(target, args);
      break;
    case 1:
      launch_products<P, In, 1>(target, args);
      break;
    default:
      launch_products<P, In, 0>(target, args);
  }
}

template <typename P>
void launch_router(const Target& target, const FfnArgs& args, const Router& router) {
  Products products{};
  products.in = args.x;
  products.num_tokens = args.num_tokens;
  products.width = args.hidden_size;
  if (router.in != nullptr) {
    products.weight = router.in;
    products.scale = router.in_scale;
    products.out = router.projected;
    products.rows = router.rank;
    launch_products<P, P, 0>(target, products);
    products.in = router.projected;
    products.width = router.rank;
  }
  products.weight = router.out;
  products.scale = router.out_scale;
  products.bias = router.bias;
  products.out = router.logits;
  products.rows = args.num_experts;
  products.floor = router.floor;
  products.log_scale = router.log_scale;
  products.activation = args.activation;
  if (router.in != nullptr) {
    launch_logits<P, float>(target, products, router.factors);
  } else {
    launch_logits<P, P>(target, products, router.factors);
  }
}

// Makes the list and its masks from the bits. All of a block's threads call it.
__device__ void list_active_experts(const FfnArgs& args) {
  __shared__ int32_t warp_counts[kWarp];
  const int tokens = args.num_tokens;
  const int words = (args.num_experts + 31) / 32;
  const int warps = blockDim.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int span = (words + warps - 1) / warps;  // of a warp
  const int begin = ::min(warp * span, words);
  const int end = ::min(begin + span, words);
  const auto word_of = [&](int w, int token) {
    return token < tokens ? args.bits[w * tokens + token] : 0;
  };
  int32_t count = 0;
#pragma unroll 4
  for (int w = begin; w < end; ++w) {
    count += __popc(__reduce_or_sync(kAllLanes, word_of(w, lane) | word_of(w, lane + kWarp)));
  }
  if (lane == 0) {
    warp_counts[warp] = count;
  }
  __syncthreads();
  const int32_t warp_count = lane < warps ? warp_counts[lane] : 0;
  int32_t position = __reduce_add_sync(kAllLanes, lane < warp ? warp_count : 0);
  const int32_t total = __reduce_add_sync(kAllLanes, warp_count);
  if (threadIdx.x == 0) {
    *args.num_active = total;
  }
#pragma unroll 2
  for (int w = begin; w < end; ++w) {
    // Lane t has token t's word, and lane b wants all tokens' bit b.
    const uint32_t low = word_of(w, lane);
    const uint32_t high = word_of(w, lane + kWarp);
    uint64_t mask = 0;
    for (int t = 0; t < tokens; ++t) {
      const uint32_t word = __shfl_sync(kAllLanes, t < kWarp ? low : high, t % kWarp);
      mask |= static_cast<uint64_t>(word >> lane & 1) << t;
    }
    const unsigned active = __ballot_sync(kAllLanes, mask != 0);
    if (mask != 0) {
      const int32_t at = position + __popc(active & ((1u << lane) - 1));
      args.list[at] = w * 32 + lane;
      args.masks[at] = mask;
    }
    position += __popc(active);
  }
}

__global__ void __launch_bounds__(kLargeBlock) list_kernel(const FfnArgs args) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  list_active_experts(args);
}

// A block for each token. A single one makes the list too.
template <int kThreads>
__global__ void __launch_bounds__(kThreads, 1)
    select_kernel(const FfnArgs args, const Router router) {
  __shared__ uint64_t scratch[kNumBins<kThreads>];
  const int token = blockIdx.x;
  const int E = args.num_experts;
  wait_for_previous_kernel();
  let_next_kernel_start();
  LogitRow<float> row{router.logits + static_cast<int64_t>(token) * E, 1, E};
  const float threshold = router.thresholds[token * router.threshold_stride];
  const Cutoff cutoff =
      find_cutoff<kThreads>(row, threshold, router.min_experts, router.max_experts, scratch);
  for (int base = 0; base < E; base += kThreads) {
    const int e = base + threadIdx.x;
    const bool active = e < E && routing_key(row[e], e) <= cutoff.key;
    const unsigned word = __ballot_sync(kAllLanes, active);
    if (e % kWarp == 0 && e < E) {
      args.bits[e / 32 * args.num_tokens + token] = word;
    }
  }
  if (threadIdx.x == 0) {
    router.counts[token] = cutoff.count;
  }
  if (args.num_tokens == 1) {
    __syncthreads();
    list_active_experts(args);
  }
}

// The same for experts that are given. What is no expert is left out.
__global__ void __launch_bounds__(kLargeBlock)
    given_kernel(const FfnArgs args, const GivenExperts given) {
  __shared__ uint32_t bits[kMaxExperts / 32];
  const int token = blockIdx.x;
  const int words = (args.num_experts + 31) / 32;
  wait_for_previous_kernel();
  let_next_kernel_start();
  for (int w = threadIdx.x; w < words; w += blockDim.x) {
    bits[w] = 0;
  }
  __syncthreads();
  const int32_t count = ::min(given.counts[token], given.num_columns);
  const int32_t* ids = given.expert_ids + static_cast<int64_t>(token) * given.num_columns;
  for (int k = threadIdx.x; k < count; k += blockDim.x) {
    const int32_t e = ids[k];
    if (e >= 0 && e < args.num_experts) {
      atomicOr(&bits[e / 32], 1u << e % 32);
    }
  }
  __syncthreads();
  for (int w = threadIdx.x; w < words; w += blockDim.x) {
    args.bits[w * args.num_tokens + token] = bits[w];
  }
  if (args.num_tokens == 1) {
    __syncthreads();
    list_active_experts(args);
  }
}

int block_of(const FfnArgs& args) {
  return args.num_experts <= kSmallRow ? kSmallBlock : kLargeBlock;
}

void launch_list(const Target& target, const FfnArgs& args) {
  if (args.num_tokens > 1) {
    launch(target, list_kernel, dim3(1), block_of(args), args);
  }
}

}  // namespace

void launch_selection(const Target& target, const FfnArgs& args, const GivenExperts& given) {
  launch(target, given_kernel, dim3(args.num_tokens), block_of(args), args, given);
  launch_list(target, args);
}

void launch_selection(const Target& target, const FfnArgs& args, const Router& router,
                      ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16:
      launch_router<__nv_bfloat16>(target, args, router);
      break;
    case ScalarType::Half:
      launch_router<__half>(target, args, router);
      break;
    default:
      launch_router<float>(target, args, router);
  }
  if (block_of(args) == kSmallBlock) {
    launch(target, select_kernel<kSmallBlock>, dim3(args.num_tokens), kSmallBlock, args, router);
  } else {
    launch(target, select_kernel<kLargeBlock>, dim3(args.num_tokens), kLargeBlock, args, router);
  }
  launch_list(target, args);
}

}  // namespace prunepath
