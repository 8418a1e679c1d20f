#pragma once

// Top-mass selection of a few tokens by one block, for the FFN kernels. The arithmetic is
// core/routing.h's; nothing in it is a product followed by a sum, so that it needs no flag against
// fused multiply-add.

#include <cstdint>

#include "cuda/ffn.cuh"

#ifdef __CUDACC__

namespace prunepath {

// An expert of a row: its logit's place in the order and its mass.
struct __align__(8) Standing {
  int32_t order;
  uint32_t mass;
};

// Larger for a larger logit; neither the least integer nor the largest, which are NaNs.
__device__ __forceinline__ int32_t order_of(float logit) {
  const int32_t bits = __float_as_int(logit);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

__device__ __forceinline__ float logit_of(int32_t order) {
  return __int_as_float(order ^ ((order >> 31) & 0x7fffffff));
}

// The sum of a warp's masses.
__device__ __forceinline__ int64_t sum_masses(uint32_t mass) {
  const uint32_t low = __reduce_add_sync(kAllLanes, mass & 0xffff);
  const uint32_t high = __reduce_add_sync(kAllLanes, mass >> 16);
  return (static_cast<int64_t>(high) << 16) + low;
}

// Experts are compared two at a time.
__host__ __device__ constexpr int padded_experts(int num_experts) {
  return (num_experts + 1) / 2 * 2;
}

// Bytes of scratch for selecting `tokens` tokens at a time.
__host__ __device__ inline size_t select_scratch_size(int tokens, int num_experts) {
  return static_cast<size_t>(tokens) * padded_experts(num_experts) *
         (sizeof(Standing) + sizeof(int32_t));
}

// Sets bit `t` of mask[e] for every expert e that token first + t runs, and no other; kTokens
// divides the number of warps. Logits are the sums of `kSplits` parts. The block's threads all call
// it, and see the masks when it returns. `scratch` is aligned to 16 bytes.
template <int kTokens, int kSplits>
__device__ void select_tokens(const FfnArgs& args, int first, int tokens, bool writes_counts,
                              void* scratch, uint32_t* mask) {
  const int E = args.num_experts;
  const int stride = padded_experts(E);
  Standing* standings = static_cast<Standing*>(scratch);                     // [tokens, stride]
  int32_t* ranks = reinterpret_cast<int32_t*>(standings + tokens * stride);  // [tokens, stride]
  __shared__ int64_t totals[kWarp];                                          // of warps
  __shared__ float thresholds[kTokens];
  __shared__ int32_t counts[kTokens];
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int sharers = blockDim.x / kWarp / kTokens;  // warps of a token
  const int chunks = (E + kWarp - 1) / kWarp;

  if (threadIdx.x < kTokens) {
    counts[threadIdx.x] = 0;
  }
  // All warps of a token read all of its logits, which waits once, and share the experts' masses.
  const int token = warp % kTokens;
  if (token < tokens) {
    const float threshold = args.thresholds[(first + token) * args.threshold_stride];
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
    int32_t top_order = order_of(-INFINITY);
    bool nan = false;
    const auto see = [&](float z) {
      nan |= z != z;
      top_order = ::max(top_order, order_of(z));
    };
#pragma unroll
    for (int u = 0; u < kHeld; ++u) {
      see(held[u]);
    }
    for (int e = kHeld * kWarp + lane; e < E; e += kWarp) {
      see(logit(e));
    }
    nan = __any_sync(kAllLanes, nan);  // fails open: equal logits at a threshold of 1
    const float top = logit_of(__reduce_max_sync(kAllLanes, top_order));
    int64_t total = 0;
    for (int chunk = warp / kTokens; chunk < chunks; chunk += sharers) {
      const int e = chunk * kWarp + lane;
      float z = held[0];
#pragma unroll
      for (int u = 1; u < kHeld; ++u) {
        z = chunk == u ? held[u] : z;
      }
      z = chunk < kHeld ? z : logit(e);
      z = nan ? 0.0f : z;
      const uint32_t mass = e >= E ? 0 : nan ? 1 : static_cast<uint32_t>(mass_units(top, z));
      if (e < stride) {
        standings[token * stride + e] = {e < E ? order_of(z) : INT32_MIN, mass};
      }
      total += sum_masses(mass);
    }
    if (lane == 0) {
      totals[warp] = total;
      thresholds[token] = nan ? 1.0f : threshold;
    }
  }
  __syncthreads();

  // Each expert is compared with all of its token's experts, by several lanes where there are
  // threads to spare.
  const int pairs = tokens * E;
  int shift = 0;
  while (shift < 5 && (pairs << (shift + 1)) <= static_cast<int>(blockDim.x)) {
    ++shift;
  }
  const int parts = 1 << shift;
  const int part = threadIdx.x & (parts - 1);
  for (int base = 0; base < pairs; base += blockDim.x >> shift) {
    const int i = base + (threadIdx.x >> shift);
    const int t = kTokens == 1 ? 0 : ::min(i / E, tokens - 1);
    const int e = ::min(i - t * E, E - 1);
    const int32_t order = standings[t * stride + e].order;
    const int4* row = reinterpret_cast<const int4*>(standings + t * stride);
    int64_t mass = 0;  // of the experts before this one
    int32_t rank = 0;
#pragma unroll 8
    for (int two = part; two < stride / 2; two += parts) {
      const int4 other = row[two];
      // Of equal logits the lower index is earlier.
      const bool first_is_before = other.x >= order + (two >= (e + 1) / 2);
      const bool second_is_before = other.z >= order + (two >= e / 2);
      mass += (first_is_before ? static_cast<uint32_t>(other.y) : 0) +
              (second_is_before ? static_cast<uint32_t>(other.w) : 0);
      rank += first_is_before + second_is_before;
    }
    for (int offset = parts / 2; offset > 0; offset /= 2) {
      mass += __shfl_xor_sync(kAllLanes, mass, offset);
      rank += __shfl_xor_sync(kAllLanes, rank, offset);
    }
    int64_t total = 0;
    for (int sharer = 0; sharer < ::min(sharers, chunks); ++sharer) {
      total += totals[sharer * kTokens + t];
    }
    const bool decides = i < pairs && part == 0;
    const bool needed = decides && is_needed(mass, thresholds[t], total);
    if (decides) {
      ranks[t * stride + e] = rank;
    }
#pragma unroll
    for (int of = 0; of < kTokens; ++of) {
      const unsigned ballot = __ballot_sync(kAllLanes, needed && t == of);
      if (lane == 0 && ballot != 0) {
        atomicAdd(&counts[of], __popc(ballot));
      }
    }
  }
  __syncthreads();
  // The experts needed are the first ones.
  const auto count_of = [&](int t) {
    return ::min(::max(counts[t], args.min_experts), args.num_columns);
  };
  for (int e = threadIdx.x; e < E; e += blockDim.x) {
    uint32_t bits = 0;
    for (int t = 0; t < tokens; ++t) {
      bits |= static_cast<uint32_t>(ranks[t * stride + e] < count_of(t)) << t;
    }
    mask[e] = bits;
  }
  if (writes_counts && threadIdx.x < tokens) {
    args.counts_out[first + threadIdx.x] = count_of(threadIdx.x);
  }
  __syncthreads();
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
  int listed = 0;
  for (int base = 0; base < num_experts; base += blockDim.x) {
    const int warps = (::min(static_cast<int>(blockDim.x), num_experts - base) + kWarp - 1) / kWarp;
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
