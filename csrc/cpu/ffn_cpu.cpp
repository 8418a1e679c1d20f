// sparse_ffn and routed_ffn on the CPU: tiles of tokens, parallel over the neurons that any of a
// tile's tokens needs.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>

#include "cpu/kernels.h"
#include "cpu/tensors.h"

namespace prunepath {
namespace {

using torch::stable::parallel_for;

// A second thread has to save more than it costs to wake.
constexpr int64_t kMinMultiplyAddsPerChunk = 1 << 16;
constexpr int64_t kMinExpertsPerChunk = 1 << 15;
// Every chunk has its own sums; on many cores their memory is bounded.
constexpr int64_t kMaxSumBytes = int64_t{128} << 20;

Parameter make_parameter(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? Parameter{tensor->const_data_ptr(), element_type(*tensor)}
                            : Parameter{};
}

RouterTable make_table(const Tensor& table, const std::optional<Tensor>& scale, int64_t size,
                       Parameter bias) {
  return {table.const_data_ptr(), scale.has_value() ? DType::kInt4 : element_type(table),
          table.size(0),          size,
          make_parameter(scale),  bias};
}

struct Router {
  RouterTable in;  // no data, no rows: a router of full rank
  RouterTable out;
  std::optional<RouterFactors> factors;  // none of a linear router
  Thresholds thresholds;
  RouteLimits limits;
};

// One call's work, tile by tile. Scratch memory belongs to the call, so that calls can overlap.
class Ffn {
 public:
  Ffn(const FfnShape& shape, const FfnTensors& tensors)
      : x_(tensors.x),
        down_bias_(make_parameter(tensors.down_bias)),
        weights_{shape.layout,
                 element_type(tensors.x),
                 tensors.gate.has_value() ? tensors.gate->const_data_ptr() : nullptr,
                 tensors.up.const_data_ptr(),
                 tensors.down_t.const_data_ptr(),
                 make_parameter(tensors.gate_bias),
                 make_parameter(tensors.up_bias),
                 shape.activation},
        num_tokens_(shape.num_tokens),
        hidden_size_(shape.layout.hidden_size),
        num_experts_(shape.layout.num_experts),
        tile_size_(std::min(num_tokens_, kTileTokens)),
        max_chunks_(std::clamp<int64_t>(kMaxSumBytes / std::max<int64_t>(row_bytes(), 1), 1,
                                        torch::stable::get_num_threads())),
        y_(new_tensor({num_tokens_, hidden_size_}, tensors.x.scalar_type())),
        copied_(tensors.x.stride(1) == 1 ? 0 : row_bytes() / 2),
        wide_(row_bytes() / 2),
        sums_(max_chunks_ * row_bytes()),
        expert_masks_(8 * num_experts_),
        masks_(8 * num_neurons(weights_.layout)),
        neurons_(4 * num_neurons(weights_.layout)) {}

  Tensor sparse(const int32_t* expert_ids, const int32_t* counts, int64_t num_columns) {
    for (begin_ = 0; begin_ < num_tokens_; begin_ += kTileTokens) {
      start_tile();
      list_selection(expert_ids, counts, num_columns);
      run_tile();
    }
    return y_;
  }

  Tensor routed(const Router& router, int32_t* counts) {
    const Scratch low_rank(4 * tile_size_ * router.in.rows);
    const Scratch ordered(4 * tile_size_ * std::max(hidden_size_, router.in.rows));
    const Scratch logits(4 * tile_size_ * router.out.rows);
    const Scratch selected(tile_size_ * num_experts_);
    for (begin_ = 0; begin_ < num_tokens_; begin_ += kTileTokens) {
      start_tile();
      make_logits(router, static_cast<float*>(low_rank.data()), static_cast<float*>(ordered.data()),
                  static_cast<float*>(logits.data()));
      select(router, static_cast<const float*>(logits.data()),
             static_cast<uint8_t*>(selected.data()), counts + begin_);
      run_tile();
    }
    return y_;
  }

 private:
  // Of the two sums [tile, H] of a chunk.
  int64_t row_bytes() const { return 2 * tile_size_ * hidden_size_ * 4; }

  float* wide() const { return static_cast<float*>(wide_.data()); }
  uint64_t* expert_masks() const { return static_cast<uint64_t*>(expert_masks_.data()); }

  void start_tile() {
    const int64_t H = hidden_size_;
    tile_ = {std::min(kTileTokens, num_tokens_ - begin_), copied_.data(), H, wide()};
    with_element_type(weights_.dtype, [&](auto* type) {
      using T = std::remove_cvref_t<decltype(*type)>;
      const T* x = static_cast<const T*>(x_.const_data_ptr()) + begin_ * x_.stride(0);
      const int64_t stride = x_.stride(1);
      for (int64_t t = 0; t < tile_.num_tokens; ++t) {
        cpu_kernels().ffn.widen(x + t * x_.stride(0), weights_.dtype, stride, H, weights_.dtype,
                                wide() + t * H);
        for (int64_t i = 0; stride != 1 && i < H; ++i) {
          static_cast<T*>(copied_.data())[t * H + i] = x[t * x_.stride(0) + i * stride];
        }
      }
      if (stride == 1) {
        tile_.data = x;
        tile_.stride = x_.stride(0);
      }
    });
  }

  void list_selection(const int32_t* expert_ids, const int32_t* counts, int64_t num_columns) {
    const int64_t E = num_experts_;
    std::fill_n(expert_masks(), E, 0);
    for (int64_t t = begin_; t < begin_ + tile_.num_tokens; ++t) {
      if (counts[t] < 0 || counts[t] > num_columns) {
        fail("sparse_ffn", "expected counts from 0 to ", num_columns,
             ", the columns of expert_ids, got ", counts[t], " for token ", t);
      }
      const uint64_t bit = uint64_t{1} << (t - begin_);
      for (int64_t k = 0; k < counts[t]; ++k) {
        const int32_t expert = expert_ids[t * num_columns + k];
        if (expert < 0 || expert >= E) {
          fail("sparse_ffn", "expected expert_ids from 0 to ", E - 1, ", got ", expert,
               " for token ", t);
        }
        if (expert_masks()[expert] & bit) {
          fail("sparse_ffn", "expected expert_ids without repetition, got expert ", expert,
               " twice for token ", t);
        }
        expert_masks()[expert] |= bit;
      }
    }
  }

  // Rows of a table [., size] that are worth a thread, if `groups` of them are read at once.
  int64_t row_grain(int64_t size, int64_t groups) const {
    return std::max<int64_t>(1, kMinMultiplyAddsPerChunk / (tile_.num_tokens * size * groups));
  }

  // Writes the logits to the first E of each token's row of `out`, which has the router's rows.
  void make_logits(const Router& router, float* low_rank, float* ordered, float* out) {
    const int64_t tokens = tile_.num_tokens;
    const auto order_for = [&](const RouterTable& table, const float* x) {
      for (int64_t at = 0; at < tokens * table.size; at += table.size) {
        cpu_kernels().ffn.widen(x + at, DType::kFloat32, 1, table.size, table.dtype, ordered + at);
      }
      return ordered;
    };
    const RouterTable& first = router.in.rows > 0 ? router.in : router.out;
    const float* x = wide();
    if (first.dtype == DType::kInt4 && weights_.dtype != DType::kBFloat16) {
      x = order_for(first, x);
    }
    if (router.in.rows > 0) {
      parallel_for(0, router.in.rows, row_grain(hidden_size_, 1), [&](int64_t from, int64_t to) {
        cpu_kernels().ffn.dot_rows(x, tokens, router.in, from, to, low_rank);
      });
      x = order_for(router.out, low_rank);
    }
    const int64_t E = num_experts_;
    const int64_t groups = router.out.rows / E;
    parallel_for(0, E, row_grain(router.out.size, groups), [&](int64_t from, int64_t to) {
      for (int64_t begin = 0; begin < groups * E; begin += E) {
        cpu_kernels().ffn.dot_rows(x, tokens, router.out, begin + from, begin + to, out);
      }
      if (router.factors.has_value()) {
        cpu_kernels().ffn.combine_factors(*router.factors, tokens, from, to, out);
      }
    });
  }

  void select(const Router& router, const float* logits, uint8_t* selected, int32_t* counts) {
    const int64_t E = num_experts_;
    const int64_t stride = router.out.rows;
    const int64_t grain = std::max<int64_t>(1, kMinExpertsPerChunk / E);
    parallel_for(0, tile_.num_tokens, grain, [&](int64_t from, int64_t to) {
      const Scratch scratch(route_scratch_size(E));
      for (int64_t t = from; t < to; ++t) {
        counts[t] = cpu_kernels().route.select_row({logits + t * stride, DType::kFloat32, 1}, E,
                                                   router.thresholds[begin_ + t], router.limits,
                                                   scratch.data(), selected + t * E);
      }
    });
    std::fill_n(expert_masks(), E, 0);
    for (int64_t t = 0; t < tile_.num_tokens; ++t) {
      for (int64_t e = 0; e < E; ++e) {
        expert_masks()[e] |= static_cast<uint64_t>(selected[t * E + e]) << t;
      }
    }
  }

  // Runs the tile for the experts of `expert_masks`.
  void run_tile() {
    const FfnLayout& layout = weights_.layout;
    const int64_t n = layout.expert_width;
    int32_t* neurons = static_cast<int32_t*>(neurons_.data());
    uint64_t* masks = static_cast<uint64_t*>(masks_.data());
    int64_t num_active = 0;
    int64_t pairs = 0;  // of a token and a neuron that it needs
    for (int64_t e = 0; e < num_experts_; ++e) {
      const uint64_t mask = expert_masks()[e];
      if (mask != 0) {
        for (int64_t j = 0; j < n; ++j) {
          neurons[num_active] = static_cast<int32_t>(e * n + j);
          masks[num_active++] = mask;
        }
        pairs += n * __builtin_popcountll(mask);
      }
    }
    const int64_t work = pairs * (layout.gated ? 3 : 2) * hidden_size_;
    const int64_t chunks = std::clamp<int64_t>(work / kMinMultiplyAddsPerChunk, 1, max_chunks_);
    const int64_t size = tile_.num_tokens * hidden_size_;
    float* sums = static_cast<float*>(sums_.data());
    parallel_for(0, chunks, 1, [&](int64_t from, int64_t to) {
      for (int64_t c = from; c < to; ++c) {
        float* sum = sums + c * 2 * size;
        std::memset(sum, 0, static_cast<size_t>(2 * size) * sizeof(float));
        cpu_kernels().ffn.run_neurons(weights_, {neurons, masks}, tile_, num_active * c / chunks,
                                      num_active * (c + 1) / chunks, sum, sum + size);
      }
    });
    with_element_type(weights_.dtype, [&](auto* type) {
      write_rows<std::remove_cvref_t<decltype(*type)>>(sums, chunks);
    });
  }

  // y = down_bias + the chunks' sums, in the order of the chunks.
  template <typename T>
  void write_rows(const float* sums, int64_t chunks) {
    const int64_t H = hidden_size_;
    const int64_t size = tile_.num_tokens * H;
    T* y = static_cast<T*>(y_.mutable_data_ptr()) + begin_ * H;
    parallel_for(0, size, 1 << 15, [&](int64_t from, int64_t to) {
      constexpr int64_t kStep = 256;
      for (int64_t at = from; at < to; at += kStep) {
        const int64_t step = std::min(kStep, to - at);
        float total[kStep];
        for (int64_t i = 0; i < step; ++i) {
          total[i] = down_bias_.data == nullptr
                         ? 0.0f
                         : load_as_float(down_bias_.data, down_bias_.dtype, (at + i) % H);
        }
        for (int64_t c = 0; c < chunks; ++c) {
          const float* sum = sums + c * 2 * size + at;
          for (int64_t i = 0; i < step; ++i) {
            total[i] += sum[i];
          }
        }
        for (int64_t i = 0; i < step; ++i) {
          from_float(total[i], y + at + i);
        }
      }
    });
  }

  const Tensor& x_;
  const Parameter down_bias_;
  const FfnWeights weights_;
  const int64_t num_tokens_;
  const int64_t hidden_size_;
  const int64_t num_experts_;
  const int64_t tile_size_;
  const int64_t max_chunks_;
  Tensor y_;
  const Scratch copied_;        // a tile of x whose elements are not next to each other
  const Scratch wide_;          // float32 [tile, H]
  const Scratch sums_;          // float32 [chunks, 2, tile, H]
  const Scratch expert_masks_;  // uint64 [E]: bit t is set iff token t of the tile needs the expert
  const Scratch masks_;         // uint64 [D], of the neurons that are listed
  const Scratch neurons_;       // int32 [D]

  int64_t begin_ = 0;  // the tile's first token
  TileX tile_{};
};

Tensor sparse_ffn(const Tensor& x, const std::optional<Tensor>& gate, const Tensor& up,
                  const Tensor& down_t, const Tensor& expert_ids, const Tensor& counts,
                  const std::string& activation, int64_t num_experts,
                  const std::optional<Tensor>& gate_bias, const std::optional<Tensor>& up_bias,
                  const std::optional<Tensor>& down_bias) {
  const char* op = "sparse_ffn";
  const FfnTensors tensors{x, gate, up, down_t, gate_bias, up_bias, down_bias};
  const FfnShape shape = check_ffn(op, tensors, num_experts, activation);
  const int64_t num_columns = check_selection(op, x, expert_ids, counts);
  return Ffn(shape, tensors)
      .sparse(static_cast<const int32_t*>(expert_ids.const_data_ptr()),
              static_cast<const int32_t*>(counts.const_data_ptr()), num_columns);
}

std::tuple<Tensor, Tensor> routed_ffn(
    const Tensor& x, const std::optional<Tensor>& router_in, const Tensor& router_out,
    const std::optional<Tensor>& router_bias, const Tensor& threshold,
    const std::optional<Tensor>& gate, const Tensor& up, const Tensor& down_t,
    const std::string& activation, const std::optional<Tensor>& router_in_scale,
    const std::optional<Tensor>& router_out_scale, const std::optional<Tensor>& router_floor,
    const std::optional<Tensor>& router_log_scale, const std::optional<Tensor>& gate_bias,
    const std::optional<Tensor>& up_bias, const std::optional<Tensor>& down_bias,
    int64_t min_experts, int64_t max_experts) {
  const char* op = "routed_ffn";
  const FfnTensors tensors{x, gate, up, down_t, gate_bias, up_bias, down_bias};
  const RouterTensors router_tensors{router_in,       router_out,       router_bias,
                                     router_in_scale, router_out_scale, router_floor,
                                     router_log_scale};
  const int64_t num_experts = router_num_experts(op, router_tensors);
  const FfnShape shape = check_ffn(op, tensors, num_experts, activation);
  const auto [rank, num_factors] = check_router(op, shape, x, router_tensors);
  std::optional<RouterFactors> factors;
  if (num_factors > 0) {
    factors = {num_experts, num_factors, make_parameter(router_floor),
               make_parameter(router_log_scale), shape.activation};
  }
  const int64_t H = shape.layout.hidden_size;
  const Router router{
      rank > 0 ? make_table(*router_in, router_in_scale, H, {}) : RouterTable{},
      make_table(router_out, router_out_scale, rank > 0 ? rank : H, make_parameter(router_bias)),
      factors,
      check_thresholds(op, threshold, shape.num_tokens, "x", x),
      {min_experts, check_expert_limits(op, min_experts, max_experts, num_experts)}};
  Tensor counts = new_tensor({shape.num_tokens}, ScalarType::Int);
  Tensor y = Ffn(shape, tensors).routed(router, static_cast<int32_t*>(counts.mutable_data_ptr()));
  return {y, counts};
}

}  // namespace
}  // namespace prunepath

STABLE_TORCH_LIBRARY_IMPL(prunepath, CPU, m) {
  m.impl("sparse_ffn", TORCH_BOX(&prunepath::sparse_ffn));
  m.impl("routed_ffn", TORCH_BOX(&prunepath::routed_ffn));
}
