// Included once by each route_kernels_*.cpp, which is compiled for one instruction set and defines
// PRUNEPATH_LANES and PRUNEPATH_KERNELS as ffn_kernels_impl.h says.

#include <algorithm>
#include <cstring>
#include <limits>

#include "core/routing.h"
#include "cpu/route_kernels.h"
#include "cpu/simd.h"

namespace prunepath {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Row {
  int64_t num_experts;  // E
  int64_t padded;       // E rounded up to whole pairs of vectors
  union {
    float* logits;   // [padded], -inf after E
    uint32_t* keys;  // what `weigh` makes of them: ordered_key of each, 0 after E
  };
  int32_t* mass;  // [padded], 0 after E
  float max;
  RoutingRule rule;

  // Experts that are left to look at, with room for a vector more.
  uint32_t* candidate_keys;
  int32_t* candidates;  // their mass in the search, then their ids
  // For sorting.
  int32_t* ranks;
  int32_t* order;
};

Row lay_out(int64_t num_experts, void* scratch) {
  Row row{};
  row.num_experts = num_experts;
  row.padded = (num_experts + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes);
  const auto take = [&]() {
    void* taken = scratch;
    scratch = static_cast<float*>(scratch) + padded_experts(num_experts);
    return taken;
  };
  row.logits = static_cast<float*>(take());
  row.mass = static_cast<int32_t*>(take());
  row.candidate_keys = static_cast<uint32_t*>(take());
  row.candidates = static_cast<int32_t*>(take());
  row.ranks = static_cast<int32_t*>(take());
  row.order = static_cast<int32_t*>(take());
  return row;
}

// Widens the logits and finds the largest. A row with a NaN is taken as equal logits at a threshold
// of 1.
template <typename T>
void load_row(const T* logits, int64_t stride, Row& row) {
  const int64_t E = row.num_experts;
  int64_t e = 0;
  if (stride == 1) {
    for (; e + 2 * kLanes <= E; e += 2 * kLanes) {
      const Pair pair = in_order(load_pair(logits + e), logits);
      store(row.logits + e, pair.a);
      store(row.logits + e + kLanes, pair.b);
    }
  }
  for (; e < E; ++e) {
    row.logits[e] = to_float(logits[e * stride]);
  }
  std::fill(row.logits + E, row.logits + row.padded, -kInfinity);

  Floats max = Floats{} - kInfinity;
  Ints is_nan = {};
  for (int64_t i = 0; i < row.padded; i += kLanes) {
    const Floats z = load(row.logits + i);
    is_nan |= (Ints)(z != z);
    max = z > max ? z : max;
  }
  row.max = -kInfinity;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    row.max = max[lane] > row.max ? max[lane] : row.max;
  }
  if (lane_bits(is_nan) != 0) {
    std::fill(row.logits, row.logits + E, 0.0f);
    row.max = 0.0f;
    row.rule.threshold = 1.0f;
  }
}

#if defined(__AVX2__)
// The products of the lower halves of 64-bit lanes.
PRUNEPATH_INLINE Longs multiply_low(Longs a, Longs b) {
#if PRUNEPATH_LANES == 16
  return (Longs)_mm512_mul_epi32((__m512i)a, (__m512i)b);
#else
  return (Longs)_mm256_mul_epi32((__m256i)a, (__m256i)b);
#endif
}

// mass_units's polynomial of the lower halves of 64-bit lanes, in the lower halves: shifted
// logically, a product has the bits there that it would have shifted arithmetically.
PRUNEPATH_INLINE Longs mass_polynomial(Longs f) {
  Longs a = Longs{} + kMassC5;
  for (const int64_t c : {kMassC4, kMassC3, kMassC2, kMassC1, kMassC0}) {
    a = (Longs)((LongWords)multiply_low(a, f) >> kMassFractionBits) + c;
  }
  return a;
}

PRUNEPATH_INLINE Ints mass_of(float max, const float* logits) {
  const Floats z = load(logits);
  const Floats t = (Floats)((Ints)(z != max) & (Ints)((max - z) * kLog2E));
  const Floats capped = t < kMassMaxExponent ? t : Floats{} + kMassMaxExponent;
  const Ints u = __builtin_convertvector(capped * static_cast<float>(1 << kMassFractionBits), Ints);
  const Ints k = u >> kMassFractionBits;
  const Ints f = u & ((1 << kMassFractionBits) - 1);
  const Longs even = mass_polynomial((Longs)f);
  const Longs odd = mass_polynomial((Longs)((LongWords)f >> 32));
  return (Ints)((even & 0xffffffff) | (odd << 32)) >> k;
}
#else
PRUNEPATH_INLINE Ints mass_of(float max, const float* logits) {
  Ints mass;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    mass[lane] = static_cast<int32_t>(mass_units(max, logits[lane]));
  }
  return mass;
}
#endif

// Sets `mass`, its total and `keys`.
PRUNEPATH_INLINE void weigh(Row& row) {
  Longs totals = {};
  for (int64_t i = 0; i < row.padded; i += kLanes) {
    const Ints mass = mass_of(row.max, row.logits + i);
    store(row.mass + i, mass);
    totals += ((Longs)mass & 0xffffffff) + (Longs)((LongWords)mass >> 32);
    const Ints bits = (Ints)(load(row.logits + i) + 0.0f);
    store(row.keys + i, (Words)bits ^ ((Words)(bits >> 31) | 0x80000000u));
  }
  row.rule.total = 0;
  for (int64_t lane = 0; lane < kLanes / 2; ++lane) {
    row.rule.total += totals[lane];
  }
  for (int64_t e = row.num_experts; e < row.padded; ++e) {  // not 0 if every logit is -inf
    row.rule.total -= row.mass[e];
    row.mass[e] = 0;
    row.keys[e] = 0;
  }
}

Row make_row(const LogitRow& logits, int64_t num_experts, float threshold, RouteLimits limits,
             void* scratch) {
  Row row = lay_out(num_experts, scratch);
  row.rule = {threshold, 0, limits.min_experts, limits.max_experts};
  switch (logits.dtype) {
    case DType::kBFloat16:
      load_row(static_cast<const BFloat16*>(logits.data), logits.stride, row);
      break;
    case DType::kFloat16:
      load_row(static_cast<const Float16*>(logits.data), logits.stride, row);
      break;
    default:
      load_row(static_cast<const float*>(logits.data), logits.stride, row);
      break;
  }
  weigh(row);
  return row;
}

// Writes those of `values` whose bit is set to `out`, which has room for a vector.
PRUNEPATH_INLINE void compress(uint32_t chosen, Ints values, void* out) {
#if defined(__AVX512F__) && PRUNEPATH_LANES == 16
  store(out, (Ints)_mm512_maskz_compress_epi32(static_cast<__mmask16>(chosen), (__m512i)values));
#else
  for (int32_t* to = static_cast<int32_t*>(out); chosen != 0; chosen &= chosen - 1) {
    *to++ = values[__builtin_ctz(chosen)];
  }
#endif
}

// Experts are active iff their key is more than `key`, or equal and they are among the first
// `ties`.
struct Cutoff {
  uint32_t key;
  int64_t ties;
  int64_t count;  // of active experts
};

// Mass and number of experts in one word: a row has at most 2^16 experts and 2^46 units of mass.
constexpr int kCountShift = 47;
constexpr uint64_t kMassMask = (uint64_t{1} << kCountShift) - 1;
constexpr int kDigitBits = 11;
constexpr uint32_t kDigits = 1 << kDigitBits;
constexpr int64_t kMaxWalked = 32;

// Radix search from the highest digit of the keys: mass is summed by digit, and the digit in which
// the last active expert is leaves fewer candidates for the next.
Cutoff find_cutoff(const Row& row) {
  const uint32_t* keys = row.keys;
  const int32_t* mass = row.mass;
  int64_t candidates = row.num_experts;
  int64_t rank = 0;  // experts that are active for sure, and their mass
  int64_t before = 0;
  const auto all_active = [&](int64_t count, int64_t sum) {
    return is_active(row.rule, rank + count, before + sum);
  };
  for (int shift = 32 - kDigitBits; candidates > kMaxWalked && shift > -kDigitBits;
       shift -= kDigitBits) {
    const int down = std::max(shift, 0);
    uint64_t sums[kDigits] = {};
    for (int64_t i = 0; i < candidates; ++i) {
      sums[(keys[i] >> down) % kDigits] +=
          uint64_t{1} << kCountShift | static_cast<uint64_t>(mass[i]);
    }
    uint32_t digit = keys == row.keys ? ordered_key(row.max) >> down : kDigits - 1;
    for (;; --digit) {
      const int64_t count = static_cast<int64_t>(sums[digit] >> kCountShift);
      const int64_t sum = static_cast<int64_t>(sums[digit] & kMassMask);
      if (count > 0 && !all_active(count, sum)) {
        break;
      }
      rank += count;
      before += sum;
    }
    int64_t kept = 0;
    for (int64_t i = 0; i < candidates; i += kLanes) {
      const Words key = load_bits<Words>(keys + i);
      const Ints weight = load_bits<Ints>(mass + i);
      uint32_t chosen = lane_bits((Ints)((key >> down) % kDigits == digit));
      if (candidates - i < kLanes) {
        chosen &= (1u << (candidates - i)) - 1;
      }
      compress(chosen, (Ints)key, row.candidate_keys + kept);
      compress(chosen, weight, row.candidates + kept);
      kept += __builtin_popcount(chosen);
    }
    keys = row.candidate_keys;
    mass = row.candidates;
    candidates = kept;
  }
  // Few are left, or all are equal: from the largest key to the next.
  for (uint32_t limit = UINT32_MAX;;) {
    uint32_t key = 0;
    for (int64_t i = 0; i < candidates; ++i) {
      key = keys[i] <= limit ? std::max(key, keys[i]) : key;
    }
    int64_t count = 0;
    int64_t weight = 0;  // of one of them
    for (int64_t i = 0; i < candidates; ++i) {
      count += keys[i] == key;
      weight = keys[i] == key ? mass[i] : weight;
    }
    if (!all_active(count, count * weight)) {
      const int64_t ties = active_ties(row.rule, rank, before, count, weight);
      return {key, ties, rank + ties};
    }
    rank += count;
    before += count * weight;
    limit = key - 1;
  }
}

// Calls `take` with the first expert of every vector and the bits of those that are active.
template <typename Take>
PRUNEPATH_INLINE void for_active(const Row& row, Cutoff cutoff, const Take& take) {
  for (int64_t i = 0; i < row.padded; i += kLanes) {
    const Words key = load_bits<Words>(row.keys + i);
    uint32_t active = lane_bits((Ints)(key > cutoff.key));
    uint32_t ties = lane_bits((Ints)(key == cutoff.key));
    for (; ties != 0 && cutoff.ties > 0; ties &= ties - 1, --cutoff.ties) {
      active |= ties & -ties;
    }
    take(i, active);
  }
}

int32_t select_row(const LogitRow& logits, int64_t num_experts, float threshold, RouteLimits limits,
                   void* scratch, uint8_t* mask) {
  if (!(threshold < 1.0f) && limits.max_experts == num_experts) {
    std::memset(mask, 1, static_cast<size_t>(num_experts));
    return static_cast<int32_t>(num_experts);
  }
  const Row row = make_row(logits, num_experts, threshold, limits, scratch);
  const Cutoff cutoff = find_cutoff(row);
  for_active(row, cutoff, [&](int64_t first, uint32_t active) {
    if (first + kLanes <= num_experts) {
      spread_bits(active, mask + first);
    } else {
      for (int64_t e = first; e < num_experts; ++e) {
        mask[e] = active >> (e - first) & 1;
      }
    }
  });
  return static_cast<int32_t>(cutoff.count);
}

// Counting how many experts go before each one is quadratic, but has no branches to mispredict.
constexpr int64_t kMaxCounted = 16 * kLanes;

// ranks[i] = how many of the `count` candidates, which are in the order of their index, go before
// candidate i, for the vector of them from `first` on.
PRUNEPATH_INLINE void count_before(const Row& row, int64_t count, int64_t first) {
  const uint32_t* keys = row.candidate_keys;
  const Words key = load_bits<Words>(keys + first);
  Ints ranks = {};
  for (int64_t j = 0; j < first; ++j) {
    ranks -= (Ints)(key <= keys[j]);
  }
  for (int64_t j = first; j < std::min(first + kLanes, count); ++j) {
    const Ints is_later = lane_numbers() > static_cast<int32_t>(j - first);
    ranks -= (Ints)(key < keys[j]) | ((Ints)(key == keys[j]) & is_later);
  }
  for (int64_t j = first + kLanes; j < count; ++j) {
    ranks -= (Ints)(key < keys[j]);
  }
  store(row.ranks + first, ranks);
}

// Sorts the candidates, most mass first, into `order`; ties keep the order of their index.
void sort_candidates(const Row& row, int64_t count) {
  if (count <= kMaxCounted) {
    for (int64_t first = 0; first < count; first += kLanes) {
      count_before(row, count, first);
    }
    for (int64_t i = 0; i < count; ++i) {
      row.order[row.ranks[i]] = row.candidates[i];
    }
    return;
  }
  // Radix sort from the lowest digit: stable, so it keeps the index order among ties.
  uint32_t* keys = row.candidate_keys;
  int32_t* ids = row.candidates;
  uint32_t* to_keys = reinterpret_cast<uint32_t*>(row.ranks);
  int32_t* to_ids = row.order;
  for (int shift = 0; shift < 32; shift += kDigitBits) {
    int32_t ends[kDigits + 1] = {};  // shifted by one, so that ends[d + 1] counts digit d
    for (int64_t i = 0; i < count; ++i) {
      ++ends[(~keys[i] >> shift) % kDigits + 1];
    }
    for (uint32_t digit = 0; digit < kDigits; ++digit) {
      ends[digit + 1] += ends[digit];
    }
    for (int64_t i = 0; i < count; ++i) {
      const int32_t to = ends[(~keys[i] >> shift) % kDigits]++;
      to_keys[to] = keys[i];
      to_ids[to] = ids[i];
    }
    std::swap(keys, to_keys);
    std::swap(ids, to_ids);
  }
  static_assert((32 + kDigitBits - 1) / kDigitBits % 2 == 1, "the result is in `order`");
}

int32_t route_row(const LogitRow& logits, int64_t num_experts, float threshold, RouteLimits limits,
                  void* scratch, int32_t* expert_ids, float* probs) {
  const Row row = make_row(logits, num_experts, threshold, limits, scratch);
  const Cutoff cutoff = find_cutoff(row);
  int64_t listed = 0;
  for_active(row, cutoff, [&](int64_t first, uint32_t active) {
    compress(active, load_bits<Ints>(row.keys + first), row.candidate_keys + listed);
    compress(active, lane_numbers() + static_cast<int32_t>(first), row.candidates + listed);
    listed += __builtin_popcount(active);
  });
  sort_candidates(row, cutoff.count);
  for (int64_t i = 0; i < cutoff.count; ++i) {
    expert_ids[i] = row.order[i];
    probs[i] = probability(row.mass[row.order[i]], row.rule.total);
  }
  return static_cast<int32_t>(cutoff.count);
}

}  // namespace

const RouteKernels PRUNEPATH_KERNELS = {select_row, route_row};

}  // namespace prunepath
