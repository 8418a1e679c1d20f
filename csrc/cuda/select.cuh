#pragma once

// Top-mass selection of a token by one block, without a sort. The active experts are a prefix of
// the order of routing (core/routing.h), so that the key of the last of them says which they are.

#include <cstdint>

#include "core/routing.h"
#include "cuda/elements.cuh"

namespace prunepath {

constexpr int kIndexBits = 16;
static_assert(kMaxExperts == int64_t{1} << kIndexBits);

// Ascending keys are the order of routing. No two experts of a row have the same key.
PRUNEPATH_HD uint64_t routing_key(float logit, int32_t index) {
  return static_cast<uint64_t>(~ordered_key(logit)) << kIndexBits | static_cast<uint32_t>(index);
}

PRUNEPATH_HD int32_t index_of(uint64_t key) {
  return static_cast<int32_t>(key & (kMaxExperts - 1));
}

__device__ __forceinline__ float logit_of(uint64_t key) {
  const uint32_t ordered = ~static_cast<uint32_t>(key >> kIndexBits);
  return __uint_as_float(ordered ^ (ordered >> 31 ? 0x80000000u : 0xffffffffu));
}

// Mass and number of experts in one integer: 2^16 experts have less than 2^46 mass.
constexpr int kCountBits = 17;
PRUNEPATH_HD int64_t mass_of(uint64_t sum) { return static_cast<int64_t>(sum >> kCountBits); }
PRUNEPATH_HD int32_t count_of(uint64_t sum) {
  return static_cast<int32_t>(sum & ((1 << kCountBits) - 1));
}

template <typename Element>
struct LogitRow {
  const Element* data;
  int64_t stride;
  int32_t size;
  bool has_nan = false;  // then it counts as a row of equal logits

  __device__ float operator[](int32_t e) const {
    return has_nan ? 0.0f : to_float(data[e * stride]);
  }
};

struct Cutoff {
  uint64_t key;  // experts up to it are active
  int32_t count;
  float max;
  int64_t total;  // mass of the row
};

__device__ __forceinline__ uint64_t sum_up_to_lane(uint64_t value) {
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const uint64_t other = __shfl_up_sync(kAllLanes, value, offset);
    value += threadIdx.x % kWarp >= offset ? other : 0;
  }
  return value;
}

// Eight bytes of scratch for each bin.
template <int kThreads>
constexpr int kNumBins = 2 * kThreads;

// So many experts of a bin are put in order one against all others.
constexpr int kMaxCandidates = 128;

// The greatest of all threads' values, in all of them.
template <int kThreads>
__device__ uint32_t block_max(uint32_t value) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ uint32_t warp_max[kWarps];
  const int lane = threadIdx.x % kWarp;
  value = __reduce_max_sync(kAllLanes, value);
  __syncthreads();  // the values of a call before have been read
  if (lane == 0) {
    warp_max[threadIdx.x / kWarp] = value;
  }
  __syncthreads();
  return __reduce_max_sync(kAllLanes, warp_max[lane % kWarps]);
}

// Finds the last active expert of a row. The row is cut into bins by mass, mass and experts are
// counted in each, and the few experts of the bin that holds it are put in order. Where they are
// not few, the bin's window of keys is cut into equal bins, and so on. All of the block's kThreads
// threads call it and get the same.
template <int kThreads, typename Element>
__device__ Cutoff find_cutoff(LogitRow<Element>& row, float threshold, int32_t min_experts,
                              int32_t max_experts, uint64_t* scratch) {
  constexpr int kWarps = kThreads / kWarp;
  constexpr int kBins = kNumBins<kThreads>;
  constexpr int kBinBits = kThreads == 1024 ? 11 : kThreads == 256 ? 9 : 8;
  static_assert(1 << kBinBits == kBins && kBins >= 2 * kMaxCandidates);
  constexpr int kMassShift = 5 + kMassFractionBits - kBinBits;  // 30 < 2^5
  __shared__ uint64_t warp_sums[kWarps];
  __shared__ int32_t chosen;
  __shared__ uint64_t chosen_before;
  __shared__ int32_t chosen_count;
  __shared__ int32_t num_candidates;
  __shared__ Cutoff found;
  uint32_t* low_words = reinterpret_cast<uint32_t*>(scratch);  // of the bins' sums
  uint32_t* high_words = low_words + kBins;
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;

  uint32_t greatest = 0;
#pragma unroll 8
  for (int32_t e = threadIdx.x; e < row.size; e += kThreads) {
    const float z = row[e];
    greatest = ::max(greatest, z == z ? ordered_key(z) : ~0u);
  }
  greatest = block_max<kThreads>(greatest);
  row.has_nan = greatest == ~0u;
  if (row.has_nan) {
    greatest = ordered_key(0.0f);
    threshold = 1.0f;
  }

  RoutingRule rule{threshold, 0, min_experts, max_experts};
  const float max = logit_of(static_cast<uint64_t>(~greatest) << kIndexBits);
  uint64_t before = 0;  // the window
  uint64_t low = 0;     // its keys, once it is not the whole row
  uint64_t high = 0;
  for (bool is_whole = true; true; is_whole = false) {
    const int shift = ::max(0, 64 - __clzll(high - low) - kBinBits);
    for (int i = threadIdx.x; i < kBins; i += kThreads) {
      low_words[i] = high_words[i] = 0;
    }
    if (threadIdx.x == 0) {
      chosen = num_candidates = 0;
    }
    __syncthreads();
#pragma unroll 4
    for (int32_t e = threadIdx.x; e < row.size; e += kThreads) {
      const float z = row[e];
      const int32_t exponent = mass_exponent(max, z);
      const uint64_t key = routing_key(z, e);
      if (is_whole || (key >= low && key <= high)) {
        // Shared memory adds up 32 bits at a time: who overflows the low word carries.
        const auto bin = static_cast<int>(is_whole ? exponent >> kMassShift : (key - low) >> shift);
        const uint64_t sum = static_cast<uint64_t>(mass_at(exponent)) << kCountBits | 1;
        const auto word = static_cast<uint32_t>(sum);
        const uint32_t carry = atomicAdd(&low_words[bin], word) + word < word;
        atomicAdd(&high_words[bin], static_cast<uint32_t>(sum >> 32) + carry);
      }
    }
    __syncthreads();

    const int first = 2 * threadIdx.x;  // of this thread's two bins
    const auto bin_sum = [&](int bin) {
      return static_cast<uint64_t>(high_words[bin]) << 32 | low_words[bin];
    };
    const uint64_t first_sum = bin_sum(first);
    const uint64_t second_sum = bin_sum(first + 1);
    const uint64_t in_warp = sum_up_to_lane(first_sum + second_sum);
    if (lane == kWarp - 1) {
      warp_sums[warp] = in_warp;
    }
    __syncthreads();
    const uint64_t up_to_warp = sum_up_to_lane(lane < kWarps ? warp_sums[lane] : 0);
    const uint64_t window = __shfl_sync(kAllLanes, up_to_warp, kWarp - 1);
    const uint64_t warps_before = __shfl_sync(kAllLanes, up_to_warp, warp - 1);
    if (is_whole) {
      rule.total = mass_of(window);
    }
    const uint64_t before_first =
        before + (warp > 0 ? warps_before : 0) + in_warp - first_sum - second_sum;
    const uint64_t before_second = before_first + first_sum;
    const auto begins_active = [&](uint64_t sum, uint64_t sum_before) {
      return count_of(sum) > 0 && is_active(rule, count_of(sum_before), mass_of(sum_before));
    };
    int32_t last = begins_active(second_sum, before_second) ? first + 1
                   : begins_active(first_sum, before_first) ? first
                                                            : 0;
    last = __reduce_max_sync(kAllLanes, last);
    if (lane == 0) {
      atomicMax(&chosen, last);
    }
    __syncthreads();
    const int32_t bin = chosen;
    if (bin / 2 == static_cast<int>(threadIdx.x)) {
      chosen_before = bin % 2 == 0 ? before_first : before_second;
      chosen_count = count_of(bin % 2 == 0 ? first_sum : second_sum);
    }
    __syncthreads();
    before = chosen_before;
    const int32_t count = chosen_count;
    const bool is_few = count <= kMaxCandidates;
    uint64_t* keys = scratch;  // of the candidates
    uint64_t* masses = scratch + kMaxCandidates;
    if (!is_whole) {
      low += static_cast<uint64_t>(bin) << shift;
      high = ::min(high, low + (uint64_t{1} << shift) - 1);
    }
    uint32_t bin_least = ~0u;
    uint32_t bin_greatest = 0;
#pragma unroll 8
    for (int32_t e = threadIdx.x; e < row.size; e += kThreads) {
      const float z = row[e];
      const uint64_t key = routing_key(z, e);
      const int32_t exponent = mass_exponent(max, z);
      if (is_whole ? exponent >> kMassShift == bin : key >= low && key <= high) {
        if (is_few) {
          const int32_t at = atomicAdd(&num_candidates, 1);  // in any order: each finds its rank
          keys[at] = key;
          masses[at] = mass_at(exponent);
        }
        bin_least = ::min(bin_least, static_cast<uint32_t>(key >> kIndexBits));
        bin_greatest = ::max(bin_greatest, static_cast<uint32_t>(key >> kIndexBits));
      }
    }
    if (is_few) {
      __syncthreads();
      if (static_cast<int>(threadIdx.x) < count) {
        const uint64_t key = keys[threadIdx.x];
        int32_t rank = count_of(before);
        int64_t mass_before = mass_of(before);
        for (int c = 0; c < count; ++c) {
          rank += keys[c] < key;
          mass_before += keys[c] < key ? masses[c] : 0;
        }
        const int64_t mass_with = mass_before + static_cast<int64_t>(masses[threadIdx.x]);
        const bool is_last_of_bin = rank + 1 == count_of(before) + count;
        if (is_active(rule, rank, mass_before) &&
            (is_last_of_bin || !is_active(rule, rank + 1, mass_with))) {
          found = {key, rank + 1, max, rule.total};
        }
      }
      __syncthreads();
      return found;
    }
    if (is_whole) {
      low = static_cast<uint64_t>(~block_max<kThreads>(~bin_least)) << kIndexBits;
      high =
          static_cast<uint64_t>(block_max<kThreads>(bin_greatest)) << kIndexBits | (row.size - 1);
    }
  }
}

}  // namespace prunepath
