#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/tensors.h"

namespace prunepath {
namespace {

using RouteResult = std::tuple<Tensor, Tensor, Tensor>;

// A second thread has to save more than it costs to wake.
constexpr int64_t kMinExpertsPerChunk = 1 << 15;

void route_rows(const Tensor& logits, Thresholds thresholds, int64_t min_experts,
                const RouteShape& shape, Tensor& expert_ids, Tensor& probs, Tensor& counts) {
  const int64_t E = shape.num_experts;
  const int64_t K = shape.num_columns;
  const RouteLimits limits{min_experts, K};
  const DType dtype = element_type(logits);
  const int64_t row_bytes = logits.stride(0) * static_cast<int64_t>(logits.element_size());
  const int64_t stride = logits.stride(1);
  const char* data = static_cast<const char*>(logits.const_data_ptr());
  int32_t* ids_out = static_cast<int32_t*>(expert_ids.mutable_data_ptr());
  float* probs_out = static_cast<float*>(probs.mutable_data_ptr());
  int32_t* counts_out = static_cast<int32_t*>(counts.mutable_data_ptr());

  const RouteKernels& kernels = cpu_kernels().route;

  const auto route_range = [&](int64_t begin, int64_t end, void* scratch) {
    for (int64_t t = begin; t < end; ++t) {
      int32_t* ids = ids_out + t * K;
      float* p = probs_out + t * K;
      const int32_t count = kernels.route_row({data + t * row_bytes, dtype, stride}, E,
                                              thresholds[t], limits, scratch, ids, p);
      std::fill(ids + count, ids + K, -1);
      std::fill(p + count, p + K, 0.0f);
      counts_out[t] = count;
    }
  };

  const int64_t grain = std::max<int64_t>(1, kMinExpertsPerChunk / E);
  torch::stable::parallel_for(0, shape.num_tokens, grain, [&](int64_t begin, int64_t end) {
    constexpr int64_t kOnStack = 1024;
    if (E <= kOnStack) {
      alignas(64) unsigned char scratch[route_scratch_size(kOnStack)];
      route_range(begin, end, scratch);
    } else {
      // Kept, so that only a thread's first call allocates.
      thread_local std::vector<float> scratch;
      const size_t size = static_cast<size_t>(route_scratch_size(E)) / sizeof(float);
      scratch.resize(std::max(scratch.size(), size));
      route_range(begin, end, scratch.data());
    }
  });
}

RouteResult new_route_outputs(const RouteShape& shape) {
  return {new_tensor({shape.num_tokens, shape.num_columns}, ScalarType::Int),
          new_tensor({shape.num_tokens, shape.num_columns}, ScalarType::Float),
          new_tensor({shape.num_tokens}, ScalarType::Int)};
}

void route_out(const Tensor& logits, double threshold, int64_t min_experts, int64_t max_experts,
               Tensor& expert_ids, Tensor& probs, Tensor& counts) {
  const RouteShape shape = check_route("route", logits, min_experts, max_experts);
  const float value = static_cast<float>(threshold);
  check_threshold_value("route", value);
  check_route_out("route", shape, logits, expert_ids, probs, counts);
  route_rows(logits, {&value, 0}, min_experts, shape, expert_ids, probs, counts);
}

void route_tensor_out(const Tensor& logits, const Tensor& threshold, int64_t min_experts,
                      int64_t max_experts, Tensor& expert_ids, Tensor& probs, Tensor& counts) {
  const RouteShape shape = check_route("route", logits, min_experts, max_experts);
  const Thresholds thresholds =
      check_thresholds("route", threshold, shape.num_tokens, "logits", logits);
  check_route_out("route", shape, logits, expert_ids, probs, counts);
  route_rows(logits, thresholds, min_experts, shape, expert_ids, probs, counts);
}

RouteResult route(const Tensor& logits, double threshold, int64_t min_experts,
                  int64_t max_experts) {
  const RouteShape shape = check_route("route", logits, min_experts, max_experts);
  const float value = static_cast<float>(threshold);
  check_threshold_value("route", value);
  auto [expert_ids, probs, counts] = new_route_outputs(shape);
  route_rows(logits, {&value, 0}, min_experts, shape, expert_ids, probs, counts);
  return {expert_ids, probs, counts};
}

RouteResult route_tensor(const Tensor& logits, const Tensor& threshold, int64_t min_experts,
                         int64_t max_experts) {
  const RouteShape shape = check_route("route", logits, min_experts, max_experts);
  const Thresholds thresholds =
      check_thresholds("route", threshold, shape.num_tokens, "logits", logits);
  auto [expert_ids, probs, counts] = new_route_outputs(shape);
  route_rows(logits, thresholds, min_experts, shape, expert_ids, probs, counts);
  return {expert_ids, probs, counts};
}

}  // namespace
}  // namespace prunepath

STABLE_TORCH_LIBRARY_IMPL(prunepath, CPU, m) {
  m.impl("route", TORCH_BOX(&prunepath::route));
  m.impl("route.out", TORCH_BOX(&prunepath::route_out));
  m.impl("route.tensor", TORCH_BOX(&prunepath::route_tensor));
  m.impl("route.tensor_out", TORCH_BOX(&prunepath::route_tensor_out));
}
