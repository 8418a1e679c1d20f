#include <algorithm>
#include <array>
#include <atomic>

#include "cuda/ffn.cuh"
#include "cuda/ffn_problem.cuh"
#include "cuda/route.cuh"

namespace prunepath {
namespace {

// An attribute of a device, asked for once.
template <cudaDeviceAttr kAttribute>
int device_attribute(int device) {
  constexpr size_t kRemembered = 64;
  static std::array<std::atomic<int>, kRemembered> known{};
  const auto index = static_cast<size_t>(device);
  int value = index < kRemembered ? known[index].load(std::memory_order_relaxed) : 0;
  if (value == 0) {
    cudaDeviceGetAttribute(&value, kAttribute, device);
    if (index < kRemembered) {
      known[index].store(value, std::memory_order_relaxed);
    }
  }
  return value;
}

// The selection of a call whose experts are too many to be selected within the FFN's kernels.
struct WideSelection {
  int32_t* expert_ids = nullptr;  // [T, E]
  float* probs = nullptr;         // [T, E]
  uint64_t* keys = nullptr;
};

// Sets the pointers of `args` into a workspace at `base`, which need not be aligned and may be null
// to ask for the size. It suffices for fewer tokens too.
int64_t lay_out(FfnArgs& args, WideSelection& wide, const ExpertLayout& layout, int64_t num_tokens,
                bool routed, int device, void* base) {
  const int64_t T = std::min(num_tokens, kMaxCallTokens);
  const int64_t E = layout.num_experts;
  const bool is_wide = routed && E > kMaxSelectExperts;
  const ManyTokensWorkspace many = many_tokens_workspace(T, layout, device);
  constexpr uintptr_t kAlignment = 256;
  const uintptr_t start =
      (reinterpret_cast<uintptr_t>(base) + kAlignment - 1) / kAlignment * kAlignment;
  uintptr_t at = start;
  const auto take = [&](auto*& pointer, int64_t elements, int64_t element_size) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(at);
    at += (static_cast<uintptr_t>(elements * element_size) + kAlignment - 1) / kAlignment *
          kAlignment;
  };
  args.num_counters =
      static_cast<int32_t>(std::max<int64_t>(many.counters, few_tokens_counters(T)));
  take(args.counters, args.num_counters, sizeof(uint32_t));
  take(args.logits, routed ? std::max(many.logits, T * E) : 0, sizeof(float));
  take(args.active_bits, many.active_bits, sizeof(uint32_t));
  take(args.union_list, many.union_list, sizeof(int32_t));
  take(args.hidden, many.hidden, 2);
  args.hidden_stride = many.hidden_stride;
  take(args.partial, std::max(many.partial, few_tokens_partial_size(T, layout, device)),
       sizeof(float));
  take(wide.expert_ids, is_wide ? T * E : 0, sizeof(int32_t));
  take(wide.probs, is_wide ? T * E : 0, sizeof(float));
  take(wide.keys, is_wide ? route_workspace_size(T, E) : 0, sizeof(uint64_t));
  if (!is_wide || route_workspace_size(T, E) == 0) {
    wide.keys = nullptr;
  }
  return static_cast<int64_t>(at - start) + static_cast<int64_t>(kAlignment) - 1;
}

// `args` for the tokens from `begin`.
FfnArgs tokens_from(const FfnArgs& args, int64_t begin, int64_t tokens, int64_t element_size) {
  const auto advance = [&](auto* pointer, int64_t bytes) {
    using Pointer = decltype(pointer);
    return pointer == nullptr ? pointer
                              : reinterpret_cast<Pointer>(reinterpret_cast<uintptr_t>(pointer) +
                                                          static_cast<uintptr_t>(bytes));
  };
  FfnArgs part = args;
  part.num_tokens = static_cast<int32_t>(tokens);
  part.x = advance(args.x, begin * args.x_token_stride * element_size);
  part.y = advance(args.y, begin * args.hidden_size * element_size);
  part.expert_ids = advance(args.expert_ids, begin * args.num_columns * 4);
  part.counts = advance(args.counts, begin * 4);
  part.thresholds = advance(args.thresholds, begin * args.threshold_stride * 4);
  part.counts_out = advance(args.counts_out, begin * 4);
  return part;
}

void select_wide(FfnArgs& args, const WideSelection& wide, ScalarType dtype, int device,
                 cudaStream_t stream) {
  launch_router(args, dtype, device, stream);
  launch_route({args.logits, args.num_experts, 1, args.thresholds, args.threshold_stride, 0.0f,
                args.num_tokens, args.num_experts, args.min_experts, args.num_columns, wide.keys,
                wide.expert_ids, wide.probs, args.counts_out},
               ScalarType::Float, stream);
  args.expert_ids = wide.expert_ids;
  args.counts = args.counts_out;
}

// Where no router's kernel comes first. Unlike a memset, it lets the next kernel start beside it.
__global__ void zero_kernel(const FfnArgs args) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  zero_counters(args);
}

}  // namespace

int sm_count(int device) { return device_attribute<cudaDevAttrMultiProcessorCount>(device); }
int compute_major(int device) {
  return device_attribute<cudaDevAttrComputeCapabilityMajor>(device);
}
int max_shared(int device) {
  return device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(device);
}

bool is_vectorised(const FfnArgs& args, int64_t element_size) {
  const auto aligned = [&](int64_t elements) { return elements * element_size % 16 == 0; };
  const auto pointer_aligned = [](const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  };
  return aligned(args.hidden_size) && aligned(args.in_neuron_stride) &&
         aligned(args.in_inner_stride) && args.x_hidden_stride == 1 &&
         (args.num_tokens == 1 || aligned(args.x_token_stride)) && pointer_aligned(args.x) &&
         pointer_aligned(args.w_in) && pointer_aligned(args.w_out) &&
         pointer_aligned(args.router_weight);
}

int64_t ffn_workspace_size(const ExpertLayout& layout, int64_t num_tokens, bool routed,
                           int device) {
  FfnArgs args{};
  WideSelection wide;
  return lay_out(args, wide, layout, num_tokens, routed, device, nullptr);
}

void run_ffn(FfnArgs args, const ExpertLayout& layout, int64_t num_tokens, ScalarType dtype,
             int device, cudaStream_t stream, void* workspace) {
  const int64_t element_size = dtype == ScalarType::Float ? 4 : 2;
  const bool routed = args.expert_ids == nullptr;
  WideSelection wide;
  lay_out(args, wide, layout, num_tokens, routed, device, workspace);
  for (int64_t begin = 0; begin < num_tokens; begin += kMaxCallTokens) {
    FfnArgs part =
        tokens_from(args, begin, std::min(kMaxCallTokens, num_tokens - begin), element_size);
    const bool many = suits_many_tokens(part, dtype);
    if (routed && part.num_experts > kMaxSelectExperts) {
      select_wide(part, wide, dtype, device, stream);
    } else if (!routed) {
      launch("sparse_ffn", zero_kernel, dim3(1), kWarp, 0, compute_major(device), stream, part);
    } else if (!many) {
      launch_router(part, dtype, device, stream);
    }
    (many ? launch_many_tokens : launch_few_tokens)(part, dtype, device, stream);
  }
}

}  // namespace prunepath
