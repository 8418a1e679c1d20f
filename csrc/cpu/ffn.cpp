#include "cpu/ffn.h"

#include <algorithm>
#include <cstring>

#include "cpu/kernels.h"

namespace prunepath {
namespace {

// A second thread has to save more than it costs to wake.
constexpr int64_t kMinMultiplyAddsPerChunk = 1 << 16;
// Every chunk has its own sums; on many cores their memory is bounded.
constexpr int64_t kMaxSumBytes = int64_t{128} << 20;

struct Workspace {
  void* x;           // [tile, H] of the weights' dtype
  float* sums;       // [chunks, 2, tile, H]
  uint64_t* masks;   // [E]
  int32_t* experts;  // [E]
  float* logits;     // [tile, E]
  int32_t* ids;      // [E]
  void* route_scratch;
  int64_t max_chunks;
  int64_t size;
};

// Lays the workspace out from `base`, which need not be aligned and may be null to ask for the
// size.
Workspace lay_out(const ExpertLayout& layout, int64_t num_tokens, bool routed, void* base) {
  const int64_t tile = std::min(num_tokens, kTileTokens);
  const int64_t E = layout.num_experts;
  const int64_t H = layout.hidden_size;
  const int64_t row_bytes = 2 * tile * H * static_cast<int64_t>(sizeof(float));

  Workspace w;
  w.max_chunks = std::clamp<int64_t>(kMaxSumBytes / std::max<int64_t>(row_bytes, 1), 1,
                                     torch::stable::get_num_threads());
  const uintptr_t start = (reinterpret_cast<uintptr_t>(base) + 63) / 64 * 64;
  uintptr_t at = start;
  const auto take = [&](int64_t bytes) {
    const uintptr_t taken = at;
    at += static_cast<uintptr_t>((bytes + 63) / 64 * 64);
    return reinterpret_cast<void*>(taken);
  };
  w.x = take(row_bytes / 2);  // enough for the widest dtype
  // Never less for more tokens, so that a workspace serves fewer tokens too.
  w.sums = static_cast<float*>(take(
      std::min(torch::stable::get_num_threads() * row_bytes, std::max(kMaxSumBytes, row_bytes))));
  w.masks = static_cast<uint64_t*>(take(8 * E));
  w.experts = static_cast<int32_t*>(take(4 * E));
  w.logits = static_cast<float*>(take(routed ? 4 * tile * E : 0));
  w.ids = static_cast<int32_t*>(take(routed ? 4 * E : 0));
  w.route_scratch = take(routed ? route_scratch_size(E) : 0);
  w.size = static_cast<int64_t>(at - start) + 63;
  return w;
}

// A tile's tokens, each of them contiguous.
struct TileX {
  const void* data;
  int64_t stride;  // elements from a token to the next
};

TileX tile_x(const FfnProblem& problem, int64_t begin, int64_t tokens, void* buffer) {
  const int64_t H = problem.weights.layout.hidden_size;
  TileX tile{buffer, H};
  with_element_type(problem.weights.dtype, [&](auto* type) {
    using T = std::remove_cvref_t<decltype(*type)>;
    const T* x = static_cast<const T*>(problem.x) + begin * problem.x_token_stride;
    if (problem.x_hidden_stride == 1) {
      tile = {x, problem.x_token_stride};
      return;
    }
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t i = 0; i < H; ++i) {
        static_cast<T*>(buffer)[t * H + i] =
            x[t * problem.x_token_stride + i * problem.x_hidden_stride];
      }
    }
  });
  return tile;
}

// y = b_out + the chunks' sums, in the order of the chunks.
template <typename T>
void write_rows(const FfnProblem& problem, int64_t begin, int64_t tokens, const float* sums,
                int64_t chunks) {
  const int64_t H = problem.weights.layout.hidden_size;
  T* y = static_cast<T*>(problem.y) + begin * H;
  const int64_t size = tokens * H;
  torch::stable::parallel_for(0, size, 1 << 15, [&](int64_t from, int64_t to) {
    constexpr int64_t kStep = 256;
    for (int64_t at = from; at < to; at += kStep) {
      const int64_t step = std::min(kStep, to - at);
      float total[kStep];
      for (int64_t i = 0; i < step; ++i) {
        total[i] = problem.b_out.data == nullptr
                       ? 0.0f
                       : load_as_float(problem.b_out.data, problem.b_out.dtype, (at + i) % H);
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

// Runs one tile whose masks are set.
void run_tile(const FfnProblem& problem, int64_t begin, int64_t tokens, const TileX& x,
              const Workspace& w) {
  const ExpertLayout& layout = problem.weights.layout;
  int64_t num_active = 0;
  int64_t pairs = 0;  // of a token and an expert that it needs
  for (int64_t e = 0; e < layout.num_experts; ++e) {
    if (w.masks[e] != 0) {
      w.experts[num_active++] = static_cast<int32_t>(e);
      pairs += __builtin_popcountll(w.masks[e]);
    }
  }
  const ActiveExperts active{w.experts, w.masks, tokens};
  const int64_t neurons = num_active * layout.expert_width;
  const int64_t work = pairs * layout.expert_width * (layout.per_neuron + 1) * layout.hidden_size;
  const int64_t chunks = std::clamp<int64_t>(work / kMinMultiplyAddsPerChunk, 1, w.max_chunks);
  const int64_t size = tokens * layout.hidden_size;
  const FfnKernels& kernels = cpu_kernels().ffn;
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t from, int64_t to) {
    for (int64_t c = from; c < to; ++c) {
      float* sum = w.sums + c * 2 * size;
      std::memset(sum, 0, static_cast<size_t>(2 * size) * sizeof(float));
      kernels.run_neurons(problem.weights, active, x.data, x.stride, neurons * c / chunks,
                          neurons * (c + 1) / chunks, sum, sum + size);
    }
  });
  with_element_type(problem.weights.dtype, [&](auto* type) {
    write_rows<std::remove_cvref_t<decltype(*type)>>(problem, begin, tokens, w.sums, chunks);
  });
}

}  // namespace

int64_t ffn_workspace_size(const ExpertLayout& layout, int64_t num_tokens, bool routed) {
  return lay_out(layout, num_tokens, routed, nullptr).size;
}

void run_sparse_ffn(const FfnProblem& problem, const int32_t* expert_ids, const int32_t* counts,
                    int64_t num_columns, void* workspace) {
  const ExpertLayout& layout = problem.weights.layout;
  const int64_t E = layout.num_experts;
  const Workspace w = lay_out(layout, problem.num_tokens, false, workspace);
  for (int64_t begin = 0; begin < problem.num_tokens; begin += kTileTokens) {
    const int64_t tokens = std::min(kTileTokens, problem.num_tokens - begin);
    std::fill(w.masks, w.masks + E, 0);
    for (int64_t t = begin; t < begin + tokens; ++t) {
      if (counts[t] < 0 || counts[t] > num_columns) {
        fail("sparse_ffn", "expected counts from 0 to ", num_columns,
             ", the columns of expert_ids, got ", counts[t], " for token ", t);
      }
      const uint64_t bit = uint64_t{1} << (t - begin);
      for (int64_t k = 0; k < counts[t]; ++k) {
        const int32_t expert = expert_ids[t * num_columns + k];
        if (expert < 0 || expert >= E) {
          fail("sparse_ffn", "expected expert_ids from 0 to ", E - 1, ", got ", expert,
               " for token ", t);
        }
        if (w.masks[expert] & bit) {
          fail("sparse_ffn", "expected expert_ids without repetition, got expert ", expert,
               " twice for token ", t);
        }
        w.masks[expert] |= bit;
      }
    }
    run_tile(problem, begin, tokens, tile_x(problem, begin, tokens, w.x), w);
  }
}

void run_routed_ffn(const FfnProblem& problem, const Router& router, int32_t* counts,
                    void* workspace) {
  const ExpertLayout& layout = problem.weights.layout;
  const int64_t E = layout.num_experts;
  const int64_t H = layout.hidden_size;
  const Workspace w = lay_out(layout, problem.num_tokens, true, workspace);
  const CpuKernels& kernels = cpu_kernels();
  for (int64_t begin = 0; begin < problem.num_tokens; begin += kTileTokens) {
    const int64_t tokens = std::min(kTileTokens, problem.num_tokens - begin);
    const TileX x = tile_x(problem, begin, tokens, w.x);
    const int64_t grain =
        std::max<int64_t>(1, kMinMultiplyAddsPerChunk / std::max<int64_t>(1, tokens * H));
    torch::stable::parallel_for(0, E, grain, [&](int64_t from, int64_t to) {
      kernels.ffn.router_logits(x.data, x.stride, tokens, H, E, router.weight,
                                problem.weights.dtype, router.bias, from, to, w.logits);
    });
    std::fill(w.masks, w.masks + E, 0);
    for (int64_t t = 0; t < tokens; ++t) {
      const int32_t count = kernels.route.route_row({w.logits + t * E, DType::kFloat32, 1}, E,
                                                    router.thresholds[begin + t], router.limits,
                                                    w.route_scratch, w.ids, nullptr);
      for (int32_t k = 0; k < count; ++k) {
        w.masks[w.ids[k]] |= uint64_t{1} << t;
      }
      counts[begin + t] = count;
    }
    run_tile(problem, begin, tokens, x, w);
  }
}

}  // namespace prunepath
