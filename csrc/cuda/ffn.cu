// A call of the FFN: its tiles of tokens and their workspace.

#include <algorithm>

#include "cuda/ffn.cuh"

namespace prunepath {
namespace {

constexpr uintptr_t kAlignment = 256;

// Takes arrays one after the other from memory at `at`, which may be null to ask for the size.
struct Arena {
  uintptr_t at;

  template <typename T>
  void take(T*& pointer, int64_t elements) {
    pointer = reinterpret_cast<T*>(at);
    const uintptr_t bytes = static_cast<uintptr_t>(elements) * sizeof(T);
    at += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }
};

void take_workspace(Arena&, const FfnArgs&, GivenExperts&) {}

void take_workspace(Arena& arena, const FfnArgs& args, Router& router) {
  arena.take(router.projected, int64_t{args.num_tokens} * router.rank);
  arena.take(router.logits, int64_t{args.num_tokens} * args.num_experts);
}

// Sets the workspace's pointers for args.num_tokens tokens and returns its end.
template <typename Rule>
uintptr_t lay_out(FfnArgs& args, Rule& rule, void* base) {
  Arena arena{reinterpret_cast<uintptr_t>(base)};
  const int64_t T = args.num_tokens;
  const int64_t E = args.num_experts;
  const int64_t rows = E * args.expert_width;
  take_workspace(arena, args, rule);
  arena.take(args.bits, (E + 31) / 32 * T);
  arena.take(args.list, E);
  arena.take(args.masks, E);
  arena.take(args.num_active, 1);
  args.hidden_stride = (rows + 15) / 16 * 16;
  float* hidden;
  arena.take(hidden, T * args.hidden_stride);
  args.hidden = hidden;
  arena.take(args.partial, args.splits * T * args.hidden_size);
  return arena.at;
}

template <typename T>
void advance(T*& pointer, int64_t elements) {
  pointer = pointer == nullptr ? nullptr : pointer + elements;
}

void launch_tile(const Target& target, const FfnArgs& args, GivenExperts given, int64_t begin,
                 ScalarType) {
  advance(given.expert_ids, begin * given.num_columns);
  advance(given.counts, begin);
  launch_selection(target, args, given);
}

void launch_tile(const Target& target, const FfnArgs& args, Router router, int64_t begin,
                 ScalarType dtype) {
  advance(router.thresholds, begin * router.threshold_stride);
  advance(router.counts, begin);
  launch_selection(target, args, router, dtype);
}

bool is_vectorised(const FfnArgs& args, int64_t element_size) {
  const auto row_aligned = [&](int64_t stride) { return stride * element_size % 16 == 0; };
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  return row_aligned(args.hidden_size) && row_aligned(args.gate_stride) &&
         row_aligned(args.up_stride) && row_aligned(args.down_stride) && aligned(args.x) &&
         aligned(args.gate) && aligned(args.up) && aligned(args.down_t);
}

}  // namespace

template <typename Rule>
void run_ffn(const char* op, const FfnTensors& tensors, const Tensor& x, const FfnShape& shape,
             const Rule& rule, const Tensor& y) {
  const int64_t T = shape.num_tokens;
  if (T == 0) {
    return;
  }
  const FfnLayout& layout = shape.layout;
  const ScalarType dtype = x.scalar_type();
  const int64_t element_size = dtype == ScalarType::Float ? 4 : 2;
  const Target target = target_of(op, x);
  FfnArgs args{};
  args.x = x.const_data_ptr();
  args.gate = layout.gated ? tensors.gate->const_data_ptr() : nullptr;
  args.up = tensors.up.const_data_ptr();
  args.down_t = tensors.down_t.const_data_ptr();
  args.gate_stride = layout.gate_stride;
  args.up_stride = layout.up_stride;
  args.down_stride = layout.down_stride;
  args.gate_bias = device_parameter(tensors.gate_bias);
  args.up_bias = device_parameter(tensors.up_bias);
  args.down_bias = device_parameter(tensors.down_bias);
  args.num_tokens = static_cast<int32_t>(std::min<int64_t>(T, kTileTokens));
  args.hidden_size = static_cast<int32_t>(layout.hidden_size);
  args.num_experts = static_cast<int32_t>(layout.num_experts);
  args.expert_width = static_cast<int32_t>(layout.expert_width);
  args.activation = shape.activation;
  args.is_vectorised = is_vectorised(args, element_size);
  args.splits = num_splits(args, dtype, target.device);

  Rule tile_rule = rule;
  const auto bytes = static_cast<int64_t>(lay_out(args, tile_rule, nullptr));
  const Tensor workspace =
      torch::stable::new_empty(x, {bytes + static_cast<int64_t>(kAlignment) - 1}, ScalarType::Byte);
  const auto start = reinterpret_cast<uintptr_t>(workspace.mutable_data_ptr());
  lay_out(args, tile_rule,
          reinterpret_cast<void*>((start + kAlignment - 1) / kAlignment * kAlignment));
  for (int64_t begin = 0; begin < T; begin += kTileTokens) {
    FfnArgs tile = args;
    const int64_t bytes_before = begin * layout.hidden_size * element_size;
    tile.x = static_cast<const char*>(args.x) + bytes_before;
    tile.y = static_cast<char*>(y.mutable_data_ptr()) + bytes_before;
    tile.num_tokens = static_cast<int32_t>(std::min<int64_t>(T - begin, kTileTokens));
    launch_tile(target, tile, tile_rule, begin, dtype);
    launch_ffn(target, tile, dtype);
  }
}

template void run_ffn<GivenExperts>(const char*, const FfnTensors&, const Tensor&, const FfnShape&,
                                    const GivenExperts&, const Tensor&);
template void run_ffn<Router>(const char*, const FfnTensors&, const Tensor&, const FfnShape&,
                              const Router&, const Tensor&);

}  // namespace prunepath
