// Included once by each route_kernels_*.cpp, which is compiled for one instruction set and defines
// PRUNEPATH_LANES and PRUNEPATH_KERNELS as ffn_kernels_impl.h says.

#include <algorithm>
#include <limits>

#include "core/routing.h"
#include "cpu/route_kernels.h"
#include "cpu/simd.h"

namespace prunepath {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Counting how many experts go before each one is quadratic, but has no branches to mispredict.
constexpr int64_t kMaxCounted = 64 * kLanes;

struct Row {
  int64_t num_experts;  // E
  int64_t padded;       // E rounded up to whole pairs of vectors
  float* logits;        // [padded], -inf after E
  int32_t* mass;        // [padded], 0 after E
  float max;
  int64_t total;

  // Candidates for being active, in the order of their index, with room for a vector more.
  float* candidate_logits;
  int32_t* candidates;
  int32_t* ranks;
  int32_t* order;  // the candidates, most mass first
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
  row.candidate_logits = static_cast<float*>(take());
  row.candidates = static_cast<int32_t*>(take());
  row.ranks = static_cast<int32_t*>(take());
  row.order = static_cast<int32_t*>(take());
  return row;
}

// Widens the logits and finds the largest. False if there is a NaN.
template <typename T>
bool load_row(const T* logits, int64_t stride, Row& row) {
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
  bool has_nan = false;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    row.max = max[lane] > row.max ? max[lane] : row.max;
    has_nan |= is_nan[lane] != 0;
  }
  return !has_nan;
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

// Sets `mass` and `total`.
PRUNEPATH_INLINE void weigh(Row& row) {
  Longs totals = {};
  for (int64_t i = 0; i < row.padded; i += kLanes) {
    const Ints mass = mass_of(row.max, row.logits + i);
    store(row.mass + i, mass);
    totals += ((Longs)mass & 0xffffffff) + (Longs)((LongWords)mass >> 32);
  }
  row.total = 0;
  for (int64_t lane = 0; lane < kLanes / 2; ++lane) {
    row.total += totals[lane];
  }
  for (int64_t e = row.num_experts; e < row.padded; ++e) {  // not 0 if every logit is -inf
    row.total -= row.mass[e];
    row.mass[e] = 0;
  }
}

// A logit such that the experts of that logit and more cover the threshold, and not many more than
// it takes. Float sums will do: what comes of it is checked.
PRUNEPATH_INLINE float find_pivot(const Row& row, float threshold) {
  const float needed = threshold * static_cast<float>(row.total);
  float below = 0.0f;  // as far below the largest logit, experts do not cover the threshold
  float step = 5.6f;
  for (; step > 0.15f; step *= 0.5f) {
    const float pivot = row.max - (below + step);
    Floats sum = {};
    for (int64_t i = 0; i < row.padded; i += kLanes) {
      const Ints mass = load_bits<Ints>(row.mass + i) & (Ints)(load(row.logits + i) >= pivot);
      sum += __builtin_convertvector(mass, Floats);
    }
    below += sum_lanes(sum) < needed ? step : 0.0f;
  }
  return row.max - (below + 2 * step);
}

// Lists the experts of logits from `pivot` on; returns how many there are.
PRUNEPATH_INLINE int64_t list_candidates(const Row& row, float pivot) {
  int64_t count = 0;
  for (int64_t i = 0; i < row.padded; i += kLanes) {
    const Floats z = load(row.logits + i);
#if defined(__AVX512F__) && PRUNEPATH_LANES == 16
    const __mmask16 chosen = _mm512_cmp_ps_mask((__m512)z, _mm512_set1_ps(pivot), _CMP_GE_OQ);
    store(row.candidate_logits + count, (Floats)_mm512_maskz_compress_ps(chosen, (__m512)z));
    store(row.candidates + count,
          (Ints)_mm512_maskz_compress_epi32(chosen, (__m512i)(lane_numbers() + (int32_t)i)));
    count += __builtin_popcount(chosen);
#else
    uint32_t chosen = lane_bits(z >= pivot);
    for (; chosen != 0; chosen &= chosen - 1) {
      const int64_t e = i + __builtin_ctz(chosen);
      row.candidate_logits[count] = row.logits[e];
      row.candidates[count] = static_cast<int32_t>(e);
      ++count;
    }
#endif
  }
  // Padding follows all experts, and only -inf lets it in.
  return count < row.num_experts ? count : row.num_experts;
}

// Adds 1 to the lanes of `counts` whose `b` is less than `a`, or equal to it too.
template <bool kOrEqual>
PRUNEPATH_INLINE Ints count_less(Ints counts, float a, Floats b) {
#if defined(__AVX512F__) && PRUNEPATH_LANES == 16
  const __mmask16 less =
      _mm512_cmp_ps_mask((__m512)b, _mm512_set1_ps(a), kOrEqual ? _CMP_LE_OQ : _CMP_LT_OQ);
  return (Ints)_mm512_mask_add_epi32((__m512i)counts, less, (__m512i)counts, _mm512_set1_epi32(1));
#else
  return counts - (kOrEqual ? (Ints)(b <= a) : (Ints)(b < a));
#endif
}

// ranks[i] = how many candidates go before candidate i, for the B vectors of them from `first` on.
template <int B>
PRUNEPATH_INLINE void count_before(const Row& row, int64_t count, int64_t first) {
  const float* logits = row.candidate_logits;
  Floats z[B];
  Ints ranks[B] = {};
  for (int b = 0; b < B; ++b) {
    z[b] = load(logits + first + b * kLanes);
  }
  for (int64_t j = 0; j < first; ++j) {
    for (int b = 0; b < B; ++b) {
      ranks[b] = count_less<true>(ranks[b], logits[j], z[b]);
    }
  }
  for (int of_j = 0; of_j < B; ++of_j) {  // the vector that j is in
    const int64_t begin = first + of_j * kLanes;
    const int64_t end = std::min(begin + kLanes, count);
    for (int64_t j = begin; j < end; ++j) {
      for (int b = 0; b < of_j; ++b) {
        ranks[b] = count_less<false>(ranks[b], logits[j], z[b]);
      }
      const Ints is_later = lane_numbers() > static_cast<int32_t>(j - begin);
      ranks[of_j] -= (Ints)(z[of_j] < logits[j]) | ((Ints)(z[of_j] == logits[j]) & is_later);
      for (int b = of_j + 1; b < B; ++b) {
        ranks[b] = count_less<true>(ranks[b], logits[j], z[b]);
      }
    }
  }
  for (int64_t j = first + B * kLanes; j < count; ++j) {
    for (int b = 0; b < B; ++b) {
      ranks[b] = count_less<false>(ranks[b], logits[j], z[b]);
    }
  }
  for (int b = 0; b < B; ++b) {
    store(row.ranks + first + b * kLanes, ranks[b]);
  }
}

// Sets `order`.
void sort_candidates(const Row& row, int64_t count) {
  if (count > kMaxCounted) {
    std::copy(row.candidates, row.candidates + count, row.order);
    std::sort(row.order, row.order + count, [&](int32_t a, int32_t b) {
      return goes_before(row.logits[a], a, row.logits[b], b);
    });
    return;
  }
  int64_t first = 0;
  for (; first + 4 * kLanes <= count; first += 4 * kLanes) {
    count_before<4>(row, count, first);
  }
  for (; first < count; first += kLanes) {
    count_before<1>(row, count, first);
  }
  for (int64_t i = 0; i < count; ++i) {
    row.order[row.ranks[i]] = row.candidates[i];
  }
}

int32_t route_row(const LogitRow& logits, int64_t num_experts, float threshold, RouteLimits limits,
                  void* scratch, int32_t* expert_ids, float* probs) {
  Row row = lay_out(num_experts, scratch);
  const bool is_ordered = [&] {
    switch (logits.dtype) {
      case DType::kBFloat16:
        return load_row(static_cast<const BFloat16*>(logits.data), logits.stride, row);
      case DType::kFloat16:
        return load_row(static_cast<const Float16*>(logits.data), logits.stride, row);
      default:
        return load_row(static_cast<const float*>(logits.data), logits.stride, row);
    }
  }();
  if (!is_ordered) {
    // Fails open: routed as equal logits at a threshold of 1.
    for (int64_t e = 0; e < limits.num_columns; ++e) {
      expert_ids[e] = static_cast<int32_t>(e);
      if (probs != nullptr) {
        probs[e] = probability(1, num_experts);
      }
    }
    return static_cast<int32_t>(limits.num_columns);
  }

  weigh(row);
  float pivot = threshold < 1.0f ? find_pivot(row, threshold) : -kInfinity;
  int64_t count;
  while (true) {
    const int64_t candidates = list_candidates(row, pivot);
    sort_candidates(row, candidates);
    int64_t before = 0;
    const auto is_active = [&] {
      return count < limits.num_columns &&
             (count < limits.min_experts || is_needed(before, threshold, row.total));
    };
    for (count = 0; count < candidates && is_active(); ++count) {
      expert_ids[count] = row.order[count];
      before += row.mass[row.order[count]];
    }
    if (candidates == num_experts || !is_active()) {
      break;
    }
    pivot = -kInfinity;
  }
  if (probs != nullptr) {
    for (int64_t i = 0; i < count; ++i) {
      probs[i] = probability(row.mass[expert_ids[i]], row.total);
    }
  }
  return static_cast<int32_t>(count);
}

}  // namespace

const RouteKernels PRUNEPATH_KERNELS = {route_row};

}  // namespace prunepath
