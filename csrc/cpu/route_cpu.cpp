#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/tensors.h"

namespace prunepath {
namespace {

// A second thread has to save more than it costs to wake.
constexpr int64_t kMinExpertsPerChunk = 1 << 15;

// Calls `row_of(kernels, token, logits, scratch)` for every token, in parallel.
template <typename RowOf>
void for_rows(const Tensor& logits, const RouteShape& shape, const RowOf& row_of) {
  const int64_t E = shape.num_experts;
  const DType dtype = element_type(logits);
  const int64_t row_bytes = logits.stride(0) * static_cast<int64_t>(logits.element_size());
  const int64_t stride = logits.stride(1);
  const char* data = static_cast<const char*>(logits.const_data_ptr());
  const RouteKernels& kernels = cpu_kernels().route;
  const int64_t grain = std::max<int64_t>(1, kMinExpertsPerChunk / E);
  torch::stable::parallel_for(0, shape.num_tokens, grain, [&](int64_t begin, int64_t end) {
    constexpr int64_t kOnStack = 1024;
    const auto run = [&](void* scratch) {
      for (int64_t t = begin; t < end; ++t) {
        row_of(kernels, t, LogitRow{data + t * row_bytes, dtype, stride}, scratch);
      }
    };
    if (E <= kOnStack) {
      alignas(64) unsigned char scratch[route_scratch_size(kOnStack)];
      run(scratch);
    } else {
      // Kept, so that only a thread's first call allocates.
      thread_local std::vector<uint64_t> scratch;
      scratch.resize(std::max(scratch.size(), static_cast<size_t>(route_scratch_size(E) / 8)));
      run(scratch.data());
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> route_rows(const Tensor& logits, Thresholds thresholds,
                                              int64_t min_experts, const RouteShape& shape) {
  const int64_t T = shape.num_tokens;
  const int64_t K = shape.num_columns;
  Tensor expert_ids = new_tensor({T, K}, ScalarType::Int);
  Tensor probs = new_tensor({T, K}, ScalarType::Float);
  Tensor counts = new_tensor({T}, ScalarType::Int);
  int32_t* ids_out = static_cast<int32_t*>(expert_ids.mutable_data_ptr());
  float* probs_out = static_cast<float*>(probs.mutable_data_ptr());
  int32_t* counts_out = static_cast<int32_t*>(counts.mutable_data_ptr());
  for_rows(logits, shape,
           [&](const RouteKernels& kernels, int64_t t, const LogitRow& row, void* scratch) {
             int32_t* ids = ids_out + t * K;
             float* p = probs_out + t * K;
             const int32_t count = kernels.route_row(row, shape.num_experts, thresholds[t],
                                                     {min_experts, K}, scratch, ids, p);
             std::fill(ids + count, ids + K, -1);
             std::fill(p + count, p + K, 0.0f);
             counts_out[t] = count;
           });
  return {expert_ids, probs, counts};
}

std::tuple<Tensor, Tensor> select_rows(const Tensor& logits, Thresholds thresholds,
                                       int64_t min_experts, const RouteShape& shape) {
  const int64_t E = shape.num_experts;
  Tensor mask = new_tensor({shape.num_tokens, E}, ScalarType::Bool);
  Tensor counts = new_tensor({shape.num_tokens}, ScalarType::Int);
  uint8_t* mask_out = static_cast<uint8_t*>(mask.mutable_data_ptr());
  int32_t* counts_out = static_cast<int32_t*>(counts.mutable_data_ptr());
  for_rows(logits, shape,
           [&](const RouteKernels& kernels, int64_t t, const LogitRow& row, void* scratch) {
             counts_out[t] =
                 kernels.select_row(row, E, thresholds[t], {min_experts, shape.num_columns},
                                    scratch, mask_out + t * E);
           });
  return {mask, counts};
}

// The two overloads of an operator: a threshold for all tokens, and one in a tensor.
template <auto kRows>
auto with_number(const char* op, const Tensor& logits, double threshold, int64_t min_experts,
                 int64_t max_experts) {
  const RouteShape shape = check_route(op, logits, min_experts, max_experts);
  const float value = static_cast<float>(threshold);
  check_threshold_value(op, value);
  return kRows(logits, {&value, 0}, min_experts, shape);
}

template <auto kRows>
auto with_tensor(const char* op, const Tensor& logits, const Tensor& threshold, int64_t min_experts,
                 int64_t max_experts) {
  const RouteShape shape = check_route(op, logits, min_experts, max_experts);
  const Thresholds thresholds = check_thresholds(op, threshold, shape.num_tokens, "logits", logits);
  return kRows(logits, thresholds, min_experts, shape);
}

auto route(const Tensor& logits, double threshold, int64_t min_experts, int64_t max_experts) {
  return with_number<route_rows>("route", logits, threshold, min_experts, max_experts);
}

auto route_tensor(const Tensor& logits, const Tensor& threshold, int64_t min_experts,
                  int64_t max_experts) {
  return with_tensor<route_rows>("route", logits, threshold, min_experts, max_experts);
}

auto select(const Tensor& logits, double threshold, int64_t min_experts, int64_t max_experts) {
  return with_number<select_rows>("select", logits, threshold, min_experts, max_experts);
}

auto select_tensor(const Tensor& logits, const Tensor& threshold, int64_t min_experts,
                   int64_t max_experts) {
  return with_tensor<select_rows>("select", logits, threshold, min_experts, max_experts);
}

std::string cpu_kernel() { return cpu_kernels().name; }

}  // namespace
}  // namespace prunepath

STABLE_TORCH_LIBRARY_IMPL(prunepath, CPU, m) {
  m.impl("route", TORCH_BOX(&prunepath::route));
  m.impl("route.tensor", TORCH_BOX(&prunepath::route_tensor));
  m.impl("select", TORCH_BOX(&prunepath::select));
  m.impl("select.tensor", TORCH_BOX(&prunepath::select_tensor));
}

// Has no tensor among its arguments, so it belongs to no device.
STABLE_TORCH_LIBRARY_IMPL(prunepath, CompositeExplicitAutograd, m) {
  m.impl("cpu_kernel", TORCH_BOX(&prunepath::cpu_kernel));
}
