#pragma once

// Top-mass selection of a few tokens by one block, for the FFN kernels. The arithmetic is
// core/routing.h's; nothing in it is a product followed by a sum, so that it needs no flag against
// fused multiply-add.

#include "cuda/ffn.cuh"

#ifdef __CUDACC__

namespace prunepath {

// An expert of a row: its place in the order (more is earlier) and its mass.
struct __align__(16) Standing {
  int64_t order;
  int64_t mass;
};

// Larger for a larger logit, and of equal ones for the lower index.
__device__ __forceinline__ int64_t order_of(float logit, int32_t index) {
  const int32_t bits = __float_as_int(logit);
  const int32_t ascending = bits ^ ((bits >> 31) & 0x7fffffff);
  return static_cast<int64_t>(ascending) << 32 | static_cast<uint32_t>(0x7fffffff - index);
}

// Bytes of scratch for selecting `tokens` tokens at a time.
__host__ __device__ inline size_t select_scratch_size(int tokens, int num_experts) {
  return static_cast<size_t>(tokens) * num_experts * sizeof(Standing);
}

// Sets bit `t` of mask[e] for every expert e that token first + t runs; kTokens divides the number
// of warps. Logits are the sums of `kSplits` parts. The block's threads all call it, and see the
// masks when it returns. `scratch` is aligned to 16 bytes.
template <int kTokens, int kSplits>
__device__ void select_tokens(const FfnArgs& args, int first, int tokens, bool writes_counts,
                              void* scratch, uint32_t* mask) {
  const int E = args.num_experts;
  const int pairs = tokens * E;
  Standing* standings = static_cast<Standing*>(scratch);  // [tokens, E]
  __shared__ unsigned long long totals[kTokens];
  __shared__ float thresholds[kTokens];
  __shared__ int32_t counts[kTokens];
  const int lane = threadIdx.x % kWarp;

  for (int e = threadIdx.x; e < E; e += blockDim.x) {
    mask[e] = 0;
  }
  if (threadIdx.x < kTokens) {
    totals[threadIdx.x] = 0;
    counts[threadIdx.x] = 0;
  }
  __syncthreads();

  // All warps of a token read all of its logits, which waits once, and share the experts' masses.
  const int token = threadIdx.x / kWarp % kTokens;
  if (token < tokens) {
    const float* read = args.logits + static_cast<int64_t>(first + token) * E;
    const int64_t split = static_cast<int64_t>(args.num_tokens) * E;
    const auto logit = [&](int e) {
      float part[kSplits];  // all under way at once
#pragma unroll
      for (int s = 0; s < kSplits; ++s) {
        part[s] = e < E ? __ldcg(read + s * split + e) : 0.0f;
      }
      float z = 0.0f;
#pragma unroll
      for (int s = 0; s < kSplits; ++s) {
        z += part[s];
      }
      return e < E ? (z == 0.0f ? 0.0f : z) : -INFINITY;  // -0 and +0 are a tie
    };
    constexpr int kHeld = 4;  // logits of a lane that stay in registers
    float held[kHeld];
#pragma unroll
    for (int u = 0; u < kHeld; ++u) {
      held[u] = logit(u * kWarp + lane);
    }
    float top = -INFINITY;
    bool nan = false;
    const auto see = [&](float z) {
      nan |= z != z;
      top = fmaxf(top, z);
    };
#pragma unroll
    for (int u = 0; u < kHeld; ++u) {
      see(held[u]);
    }
    for (int e = kHeld * kWarp + lane; e < E; e += kWarp) {
      see(logit(e));
    }
    nan = __any_sync(kAllLanes, nan);  // fails open: equal logits at a threshold of 1
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, offset));
    }
    const int sharers = blockDim.x / kWarp / kTokens;
    const int sharer = threadIdx.x / kWarp / kTokens;
    unsigned long long total = 0;
    for (int chunk = sharer; chunk * kWarp < E; chunk += sharers) {
      const int e = chunk * kWarp + lane;
      float z = held[0];
#pragma unroll
      for (int u = 1; u < kHeld; ++u) {
        z = chunk == u ? held[u] : z;
      }
      z = chunk < kHeld ? z : logit(e);
      z = nan ? 0.0f : z;
      if (e < E) {
        const int64_t mass = nan ? 1 : mass_units(top, z);
        standings[token * E + e] = {order_of(z, e), mass};
        total += mass;
      }
    }
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      total += __shfl_xor_sync(kAllLanes, total, offset);
    }
    if (lane == 0) {
      atomicAdd(&totals[token], total);
      thresholds[token] = nan ? 1.0f : args.thresholds[(first + token) * args.threshold_stride];
    }
  }
  __syncthreads();

  // Each expert is compared with all of its token's experts, by several lanes where there are
  // threads to spare; `use` gets what stands before it.
  int parts = 1;
  while (parts < kWarp && 2 * parts * pairs <= static_cast<int>(blockDim.x)) {
    parts *= 2;
  }
  const int part = threadIdx.x % parts;
  const int at_once = blockDim.x / parts;
  const auto compare = [&](const auto& use) {
    for (int base = 0; base < pairs; base += at_once) {
      const int i = base + threadIdx.x / parts;
      const int t = i < pairs ? i / E : 0;
      int64_t mass = 0;
      int32_t experts = 0;
      if (i < pairs) {
        const int64_t order = standings[i].order;
        const Standing* row = standings + t * E;
#pragma unroll 4
        for (int j = part; j < E; j += parts) {
          const Standing other = row[j];
          const bool before = other.order > order;
          mass += before ? other.mass : 0;
          experts += before;
        }
      }
      for (int offset = parts / 2; offset > 0; offset /= 2) {
        mass += __shfl_xor_sync(kAllLanes, mass, offset);
        experts += __shfl_xor_sync(kAllLanes, experts, offset);
      }
      if (i < pairs && part == 0) {
        use(t, i - t * E, mass, experts);
      }
    }
    __syncthreads();
  };
  // The last expert that is needed has as many before it as are needed besides.
  compare([&](int t, int e, int64_t mass, int32_t experts) {
    if (is_needed(mass, thresholds[t], static_cast<int64_t>(totals[t]))) {
      atomicMax(&counts[t], experts + 1);
      atomicOr(&mask[e], 1u << t);
    }
  });
  bool bounds = false;
  for (int t = 0; t < tokens; ++t) {
    bounds |= counts[t] < args.min_experts || counts[t] > args.num_columns;
  }
  if (bounds) {
    __syncthreads();
    if (threadIdx.x < tokens) {
      counts[threadIdx.x] = ::min(::max(counts[threadIdx.x], args.min_experts), args.num_columns);
    }
    for (int e = threadIdx.x; e < E; e += blockDim.x) {
      mask[e] = 0;
    }
    __syncthreads();
    compare([&](int t, int e, int64_t, int32_t experts) {
      if (experts < counts[t]) {
        atomicOr(&mask[e], 1u << t);
      }
    });
  }
  if (writes_counts && threadIdx.x < tokens) {
    args.counts_out[first + threadIdx.x] = counts[threadIdx.x];
  }
}

// The same masks from expert_ids and counts. What is no expert is left out.
__device__ inline void mask_given_experts(const FfnArgs& args, int first, int tokens,
                                          uint32_t* mask) {
  for (int e = threadIdx.x; e < args.num_experts; e += blockDim.x) {
    mask[e] = 0;
  }
  __syncthreads();
  const int K = args.num_columns;
  for (int i = threadIdx.x; i < tokens * K; i += blockDim.x) {
    const int t = i / K;
    if (i % K < args.counts[first + t]) {
      const int32_t e = args.expert_ids[static_cast<int64_t>(first) * K + i];
      if (e >= 0 && e < args.num_experts) {
        atomicOr(&mask[e], 1u << t);
      }
    }
  }
  __syncthreads();
}

// Writes the experts that any token runs to `list`, ascending, and returns how many there are. The
// block's threads all call it, and see the list when it returns.
__device__ inline int list_active_experts(const uint32_t* mask, int num_experts, int32_t* list) {
  __shared__ int32_t warp_counts[32];
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int warps = blockDim.x / kWarp;
  int listed = 0;
  for (int base = 0; base < num_experts; base += blockDim.x) {
    const int e = base + threadIdx.x;
    const bool active = e < num_experts && mask[e] != 0;
    const unsigned ballot = __ballot_sync(kAllLanes, active);
    if (lane == 0) {
      warp_counts[warp] = __popc(ballot);
    }
    __syncthreads();
    int before = listed + __popc(ballot & ((1u << lane) - 1));
    for (int w = 0; w < warps; ++w) {
      before += w < warp ? warp_counts[w] : 0;
      listed += warp_counts[w];
    }
    if (active) {
      list[before] = e;
    }
    __syncthreads();
  }
  return listed;
}

}  // namespace prunepath

#endif  // __CUDACC__
