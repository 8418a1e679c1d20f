// `route` and `select` on the GPU: a block finds a token's last active expert and, for `route`,
// sorts the active ones. Compile with -fmad=false: the arithmetic has to be the CPU's, bit for bit.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <bit>
#include <tuple>

#include "cuda/select.cuh"
#include "cuda/tensors.cuh"

namespace prunepath {
namespace {

// Rows of up to kSmallRow experts take blocks of kSmallBlock threads, longer ones of kLargeBlock.
// With as many tokens as training has, `select` keeps the GPU busy without large blocks, whose
// threads wait for each other.
constexpr int kSmallRow = 512;
constexpr int kSmallBlock = 128;
constexpr int kManyTokens = 1024;
constexpr int kManyBlock = 256;
constexpr int kLargeBlock = 1024;
// Up to this many active experts are sorted in shared memory, more in global memory.
template <int kThreads>
constexpr int kSharedKeys = 4 * kThreads;
static_assert(kSharedKeys<kSmallBlock> >= kSmallRow);
// Blocks that share the workspace of long rows.
constexpr int64_t kMaxGlobalBlocks = 256;

struct RouteArgs {
  const void* logits;
  int64_t token_stride;
  int64_t expert_stride;
  const float* thresholds;  // null: `threshold` for every token
  int64_t threshold_stride;
  float threshold;
  int64_t num_tokens;
  int32_t num_experts;
  int32_t min_experts;
  int32_t num_columns;
  int32_t* counts;
  // Of `select`.
  bool* mask;
  // Of `route`.
  int32_t* expert_ids;
  float* probs;
  uint64_t* workspace;  // num_global_keys for each block, where shared memory may not suffice
  int64_t num_global_keys;
};

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

template <typename Element>
__device__ void write_sorted(const RouteArgs& args, const LogitRow<Element>& row,
                             const Cutoff& cutoff, int64_t token, uint64_t* keys) {
  __shared__ int32_t num_keys;
  int32_t size = 1;
  while (size < cutoff.count) {
    size *= 2;
  }
  if (threadIdx.x == 0) {
    num_keys = 0;
  }
  for (int32_t k = cutoff.count + threadIdx.x; k < size; k += blockDim.x) {
    keys[k] = ~uint64_t{0};  // after every expert
  }
  __syncthreads();
  for (int32_t e = threadIdx.x; e < row.size; e += blockDim.x) {
    const uint64_t key = routing_key(row[e], e);
    if (key <= cutoff.key) {
      keys[atomicAdd(&num_keys, 1)] = key;  // in any order: they are sorted next
    }
  }
  sort_keys(keys, size);
  int32_t* expert_ids = args.expert_ids + token * args.num_columns;
  float* probs = args.probs + token * args.num_columns;
  for (int32_t k = threadIdx.x; k < args.num_columns; k += blockDim.x) {
    const bool active = k < cutoff.count;
    expert_ids[k] = active ? index_of(keys[k]) : -1;
    probs[k] = active ? probability(mass_units(cutoff.max, logit_of(keys[k])), cutoff.total) : 0.0f;
  }
}

template <typename Element, int kThreads>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads) route_kernel(const RouteArgs args) {
  __shared__ uint64_t scratch[kSharedKeys<kThreads>];
  static_assert(kNumBins<kThreads> <= kSharedKeys<kThreads>);
  wait_for_previous_kernel();
  let_next_kernel_start();
  for (int64_t token = blockIdx.x; token < args.num_tokens; token += gridDim.x) {
    __syncthreads();  // the previous token's keys have been read
    LogitRow<Element> row{static_cast<const Element*>(args.logits) + token * args.token_stride,
                          args.expert_stride, args.num_experts};
    const float threshold = args.thresholds == nullptr
                                ? args.threshold
                                : args.thresholds[token * args.threshold_stride];
    const Cutoff cutoff =
        find_cutoff<kThreads>(row, threshold, args.min_experts, args.num_columns, scratch);
    if (threadIdx.x == 0) {
      args.counts[token] = cutoff.count;
    }
    if (args.mask == nullptr) {
      uint64_t* keys = cutoff.count <= kSharedKeys<kThreads>
                           ? scratch
                           : args.workspace + blockIdx.x * args.num_global_keys;
      write_sorted(args, row, cutoff, token, keys);
    } else {
      for (int32_t e = threadIdx.x; e < row.size; e += kThreads) {
        args.mask[token * row.size + e] = routing_key(row[e], e) <= cutoff.key;
      }
    }
  }
}

template <typename Element>
void launch_element(const Target& target, const RouteArgs& args) {
  const int64_t most = args.workspace != nullptr ? kMaxGlobalBlocks : 0x7fffffff;
  const auto blocks = static_cast<unsigned>(std::min(args.num_tokens, most));
  if (args.num_experts <= kSmallRow) {
    launch(target, route_kernel<Element, kSmallBlock>, dim3(blocks), kSmallBlock, args);
  } else if (args.mask != nullptr && args.num_tokens >= kManyTokens) {
    launch(target, route_kernel<Element, kManyBlock>, dim3(blocks), kManyBlock, args);
  } else {
    launch(target, route_kernel<Element, kLargeBlock>, dim3(blocks), kLargeBlock, args);
  }
}

struct Threshold {
  const float* data;  // null: `value`
  int64_t stride;
  float value;
};

Threshold threshold_of(const char* op, double threshold, const RouteShape&, const Tensor&) {
  const float value = static_cast<float>(threshold);
  check_threshold_value(op, value);
  return {nullptr, 0, value};
}

// The values of a tensor are not checked: that would wait for the GPU.
Threshold threshold_of(const char* op, const Tensor& threshold, const RouteShape& shape,
                       const Tensor& logits) {
  check_threshold_tensor(op, threshold, shape.num_tokens, "logits", logits);
  return {static_cast<const float*>(threshold.const_data_ptr()),
          threshold.dim() == 1 ? threshold.stride(0) : 0, 0.0f};
}

// Launches with what `args` does not have yet: the logits and the rule.
void run(const char* op, RouteArgs args, const Tensor& logits, const Threshold& threshold,
         int64_t min_experts, const RouteShape& shape) {
  if (shape.num_tokens == 0) {
    return;
  }
  args.logits = logits.const_data_ptr();
  args.token_stride = logits.stride(0);
  args.expert_stride = logits.stride(1);
  args.thresholds = threshold.data;
  args.threshold_stride = threshold.stride;
  args.threshold = threshold.value;
  args.num_tokens = shape.num_tokens;
  args.num_experts = static_cast<int32_t>(shape.num_experts);
  args.min_experts = static_cast<int32_t>(min_experts);
  args.num_columns = static_cast<int32_t>(shape.num_columns);
  const Target target = target_of(op, logits);
  switch (logits.scalar_type()) {
    case ScalarType::BFloat16:
      return launch_element<__nv_bfloat16>(target, args);
    case ScalarType::Half:
      return launch_element<__half>(target, args);
    default:
      return launch_element<float>(target, args);
  }
}

template <typename AnyThreshold>
std::tuple<Tensor, Tensor, Tensor> route(const Tensor& logits, AnyThreshold threshold,
                                         int64_t min_experts, int64_t max_experts) {
  const RouteShape shape = check_route("route", logits, min_experts, max_experts);
  const Threshold tau = threshold_of("route", threshold, shape, logits);
  const auto [T, E, K] = shape;
  const DeviceGuard guard(logits.get_device_index());
  Tensor expert_ids = torch::stable::new_empty(logits, {T, K}, ScalarType::Int);
  Tensor probs = torch::stable::new_empty(logits, {T, K}, ScalarType::Float);
  Tensor counts = torch::stable::new_empty(logits, {T}, ScalarType::Int);
  RouteArgs args{};
  args.expert_ids = static_cast<int32_t*>(expert_ids.mutable_data_ptr());
  args.probs = static_cast<float*>(probs.mutable_data_ptr());
  args.counts = static_cast<int32_t*>(counts.mutable_data_ptr());
  Tensor workspace;
  if (K > kSharedKeys<kLargeBlock> && T > 0) {
    args.num_global_keys = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(K)));
    workspace = torch::stable::new_empty(
        logits, {std::min(T, kMaxGlobalBlocks) * args.num_global_keys}, ScalarType::Long);
    args.workspace = static_cast<uint64_t*>(workspace.mutable_data_ptr());
  }
  run("route", args, logits, tau, min_experts, shape);
  return {expert_ids, probs, counts};
}

template <typename AnyThreshold>
std::tuple<Tensor, Tensor> select(const Tensor& logits, AnyThreshold threshold, int64_t min_experts,
                                  int64_t max_experts) {
  const RouteShape shape = check_route("select", logits, min_experts, max_experts);
  const Threshold tau = threshold_of("select", threshold, shape, logits);
  const auto [T, E, K] = shape;
  const DeviceGuard guard(logits.get_device_index());
  Tensor mask = torch::stable::new_empty(logits, {T, E}, ScalarType::Bool);
  Tensor counts = torch::stable::new_empty(logits, {T}, ScalarType::Int);
  RouteArgs args{};
  args.mask = static_cast<bool*>(mask.mutable_data_ptr());
  args.counts = static_cast<int32_t*>(counts.mutable_data_ptr());
  run("select", args, logits, tau, min_experts, shape);
  return {mask, counts};
}

}  // namespace
}  // namespace prunepath

STABLE_TORCH_LIBRARY_IMPL(prunepath, CUDA, m) {
  m.impl("route", TORCH_BOX(&prunepath::route<double>));
  m.impl("route.tensor", TORCH_BOX(&prunepath::route<const torch::stable::Tensor&>));
  m.impl("select", TORCH_BOX(&prunepath::select<double>));
  m.impl("select.tensor", TORCH_BOX(&prunepath::select<const torch::stable::Tensor&>));
}
