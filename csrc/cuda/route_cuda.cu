// Top-mass routing on the GPU: a block sorts a token's experts and sums their integer mass in that
// order. Compile with -fmad=false: the arithmetic has to be the CPU's, bit for bit.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "core/routing.h"
#include "cuda/route.cuh"

namespace prunepath {
namespace {

using RouteResult = std::tuple<Tensor, Tensor, Tensor>;

constexpr int kWarp = 32;
constexpr int kMaxThreads = 512;
// Rows of up to this many experts are sorted in shared memory, longer ones in global memory.
constexpr int kMaxSharedKeys = 4096;
// Blocks that share the workspace of long rows.
constexpr int64_t kMaxGlobalBlocks = 256;

// Ascending order of the keys is descending order of the logits, ties by index.
__device__ uint64_t key_of(float logit, int32_t index) {
  const uint32_t bits = __float_as_uint(logit == 0.0f ? 0.0f : logit);  // -0 and +0 are a tie
  const uint32_t descending = bits & 0x80000000 ? bits : bits ^ 0x7fffffff;
  return static_cast<uint64_t>(descending) << 32 | static_cast<uint32_t>(index);
}

__device__ float logit_of(uint64_t key) {
  const uint32_t descending = static_cast<uint32_t>(key >> 32);
  return __uint_as_float(descending & 0x80000000 ? descending : descending ^ 0x7fffffff);
}

// Bitonic sort by one block; `size` is a power of two.
__device__ void sort_keys(uint64_t* keys, int32_t size) {
  for (int32_t run = 2; run <= size; run *= 2) {
    for (int32_t distance = run / 2; distance > 0; distance /= 2) {
      __syncthreads();
      for (int32_t pair = threadIdx.x; pair < size / 2; pair += blockDim.x) {
        const int32_t low = 2 * pair - (pair & (distance - 1));
        const int32_t high = low + distance;
        const uint64_t a = keys[low];
        const uint64_t b = keys[high];
        const bool ascending = (low & run) == 0;  // the last run is the whole, ascending
        if ((a > b) == ascending) {
          keys[low] = b;
          keys[high] = a;
        }
      }
    }
  }
  __syncthreads();
}

// The sum of `value` over the block's threads before this one, and over all of them.
__device__ int64_t sum_before(int64_t value, int64_t* warp_sums, int64_t* total) {
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  int64_t inclusive = value;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int64_t other = __shfl_up_sync(0xffffffff, inclusive, offset);
    inclusive += lane >= offset ? other : 0;
  }
  __syncthreads();  // the previous call's sums have been read
  if (lane == kWarp - 1) {
    warp_sums[warp] = inclusive;
  }
  __syncthreads();
  int64_t before = inclusive - value;
  int64_t sum = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) {
    before += w < warp ? warp_sums[w] : 0;
    sum += warp_sums[w];
  }
  *total = sum;
  return before;
}

template <typename Element>
__device__ void route_token(const RouteArgs& args, int32_t num_keys, int64_t token, uint64_t* keys,
                            int64_t* warp_sums) {
  const int32_t E = args.num_experts;
  const int32_t K = args.num_columns;
  const Element* row = static_cast<const Element*>(args.logits) + token * args.token_stride;
  int32_t* expert_ids = args.expert_ids + token * K;
  float* probs = args.probs + token * K;

  __syncthreads();  // the previous token's keys have been read
  bool sees_nan = false;
  for (int32_t e = threadIdx.x; e < num_keys; e += blockDim.x) {
    uint64_t key = ~uint64_t{0};  // after every expert
    if (e < E) {
      const float logit = static_cast<float>(row[e * args.expert_stride]);
      sees_nan |= logit != logit;
      key = key_of(logit, e);
    }
    keys[e] = key;
  }
  if (__syncthreads_or(sees_nan)) {
    // Fails open: routed as equal logits at a threshold of 1.
    for (int32_t k = threadIdx.x; k < K; k += blockDim.x) {
      expert_ids[k] = k;
      probs[k] = probability(1, E);
    }
    if (threadIdx.x == 0) {
      args.counts[token] = K;
    }
    return;
  }

  sort_keys(keys, num_keys);
  const float max = logit_of(keys[0]);
  int64_t sum = 0;
  for (int32_t e = threadIdx.x; e < E; e += blockDim.x) {
    sum += mass_units(max, logit_of(keys[e]));
  }
  int64_t total;
  sum_before(sum, warp_sums, &total);

  const float threshold =
      args.thresholds == nullptr ? args.threshold : args.thresholds[token * args.threshold_stride];
  int64_t mass_before_tile = 0;
  int32_t count = 0;
  for (int32_t tile = 0; tile < E; tile += blockDim.x) {
    const int32_t e = tile + threadIdx.x;
    int64_t tile_mass;
    const int64_t before =
        mass_before_tile +
        sum_before(e < E ? mass_units(max, logit_of(keys[e])) : 0, warp_sums, &tile_mass);
    count += __syncthreads_count(e < E && is_needed(before, threshold, total));
    mass_before_tile += tile_mass;
  }
  count = ::min(::max(count, args.min_experts), K);

  for (int32_t k = threadIdx.x; k < K; k += blockDim.x) {
    const bool active = k < count;
    expert_ids[k] = active ? static_cast<int32_t>(keys[k] & 0xffffffff) : -1;
    probs[k] = active ? probability(mass_units(max, logit_of(keys[k])), total) : 0.0f;
  }
  if (threadIdx.x == 0) {
    args.counts[token] = count;
  }
}

template <typename Element>
__global__ void __launch_bounds__(kMaxThreads)
    route_kernel(const RouteArgs args, int32_t num_keys) {
  extern __shared__ uint64_t shared_keys[];
  __shared__ int64_t warp_sums[kMaxThreads / kWarp];
  uint64_t* keys = args.workspace == nullptr
                       ? shared_keys
                       : args.workspace + static_cast<int64_t>(blockIdx.x) * num_keys;
  for (int64_t token = blockIdx.x; token < args.num_tokens; token += gridDim.x) {
    route_token<Element>(args, num_keys, token, keys, warp_sums);
  }
}

// A power of two, at least the number of experts.
int32_t num_keys_of(int64_t num_experts) {
  int32_t num_keys = kWarp;
  while (num_keys < num_experts) {
    num_keys *= 2;
  }
  return num_keys;
}

int64_t num_blocks(int64_t tokens, int32_t num_keys) {
  return std::min<int64_t>(tokens, num_keys > kMaxSharedKeys ? kMaxGlobalBlocks : 0x7fffffff);
}

template <typename Element>
void launch_element(const RouteArgs& args, cudaStream_t stream) {
  const int32_t num_keys = num_keys_of(args.num_experts);
  const auto blocks = static_cast<unsigned>(num_blocks(args.num_tokens, num_keys));
  const int threads = std::clamp(num_keys / 2, kWarp, kMaxThreads);
  const size_t shared = args.workspace == nullptr ? num_keys * sizeof(uint64_t) : size_t{0};
  route_kernel<Element><<<blocks, threads, shared, stream>>>(args, num_keys);
  check_launch("route");
}

struct Threshold {
  const float* data;  // null: `value`
  int64_t stride;
  float value;
};

// The values of a tensor are not checked: that would wait for the GPU.
Threshold threshold_of(const Tensor& threshold, const RouteShape& shape, const Tensor& logits) {
  check_threshold_tensor("route", threshold, shape.num_tokens, "logits", logits);
  return {static_cast<const float*>(threshold.const_data_ptr()),
          threshold.dim() == 1 ? threshold.stride(0) : 0, 0.0f};
}

Threshold threshold_of(double threshold) {
  const float value = static_cast<float>(threshold);
  check_threshold_value("route", value);
  return {nullptr, 0, value};
}

void route_tokens(const Tensor& logits, const Threshold& threshold, int64_t min_experts,
                  const RouteShape& shape, const Tensor& expert_ids, const Tensor& probs,
                  const Tensor& counts) {
  constexpr int64_t kMaxExperts = int64_t{1} << 24;
  if (shape.num_experts > kMaxExperts) {
    fail("route", "expected logits of at most ", kMaxExperts, " experts, got ", shape.num_experts);
  }
  if (shape.num_tokens == 0) {
    return;
  }
  const DeviceGuard guard(logits.get_device_index());
  Tensor workspace;
  uint64_t* keys = nullptr;
  if (const int64_t size = route_workspace_size(shape.num_tokens, shape.num_experts)) {
    workspace = torch::stable::new_empty(logits, {size}, ScalarType::Long);
    keys = static_cast<uint64_t*>(workspace.mutable_data_ptr());
  }
  launch_route(
      {logits.const_data_ptr(), logits.stride(0), logits.stride(1), threshold.data,
       threshold.stride, threshold.value, shape.num_tokens, static_cast<int32_t>(shape.num_experts),
       static_cast<int32_t>(min_experts), static_cast<int32_t>(shape.num_columns), keys,
       static_cast<int32_t*>(expert_ids.mutable_data_ptr()),
       static_cast<float*>(probs.mutable_data_ptr()),
       static_cast<int32_t*>(counts.mutable_data_ptr())},
      logits.scalar_type(), current_stream(logits));
}

RouteResult route_new(const Tensor& logits, const Threshold& threshold, int64_t min_experts,
                      const RouteShape& shape) {
  const int64_t T = shape.num_tokens;
  const int64_t K = shape.num_columns;
  RouteResult result{torch::stable::new_empty(logits, {T, K}, ScalarType::Int),
                     torch::stable::new_empty(logits, {T, K}, ScalarType::Float),
                     torch::stable::new_empty(logits, {T}, ScalarType::Int)};
  const auto& [expert_ids, probs, counts] = result;
  route_tokens(logits, threshold, min_experts, shape, expert_ids, probs, counts);
  return result;
}

RouteResult route(const Tensor& logits, double threshold, int64_t min_experts,
                  int64_t max_experts) {
  const RouteShape shape = check_route("route", logits, min_experts, max_experts);
  return route_new(logits, threshold_of(threshold), min_experts, shape);
}

RouteResult route_tensor(const Tensor& logits, const Tensor& threshold, int64_t min_experts,
                         int64_t max_experts) {
  const RouteShape shape = check_route("route", logits, min_experts, max_experts);
  return route_new(logits, threshold_of(threshold, shape, logits), min_experts, shape);
}

void route_out(const Tensor& logits, double threshold, int64_t min_experts, int64_t max_experts,
               Tensor& expert_ids, Tensor& probs, Tensor& counts) {
  const RouteShape shape = check_route("route", logits, min_experts, max_experts);
  const Threshold value = threshold_of(threshold);
  check_route_out("route", shape, logits, expert_ids, probs, counts);
  route_tokens(logits, value, min_experts, shape, expert_ids, probs, counts);
}

void route_tensor_out(const Tensor& logits, const Tensor& threshold, int64_t min_experts,
                      int64_t max_experts, Tensor& expert_ids, Tensor& probs, Tensor& counts) {
  const RouteShape shape = check_route("route", logits, min_experts, max_experts);
  const Threshold values = threshold_of(threshold, shape, logits);
  check_route_out("route", shape, logits, expert_ids, probs, counts);
  route_tokens(logits, values, min_experts, shape, expert_ids, probs, counts);
}

}  // namespace

int64_t route_workspace_size(int64_t tokens, int64_t num_experts) {
  const int32_t num_keys = num_keys_of(num_experts);
  return num_keys > kMaxSharedKeys ? num_blocks(tokens, num_keys) * num_keys : 0;
}

void launch_route(const RouteArgs& args, ScalarType dtype, cudaStream_t stream) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return launch_element<__nv_bfloat16>(args, stream);
    case ScalarType::Half:
      return launch_element<__half>(args, stream);
    default:
      return launch_element<float>(args, stream);
  }
}

}  // namespace prunepath

STABLE_TORCH_LIBRARY_IMPL(prunepath, CUDA, m) {
  m.impl("route", TORCH_BOX(&prunepath::route));
  m.impl("route.out", TORCH_BOX(&prunepath::route_out));
  m.impl("route.tensor", TORCH_BOX(&prunepath::route_tensor));
  m.impl("route.tensor_out", TORCH_BOX(&prunepath::route_tensor_out));
}
