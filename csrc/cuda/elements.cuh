#pragma once

// How kernels read and write elements, add up within a warp, and overlap each other.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "core/elements.h"

namespace prunepath {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffff;

// A vector of parameters that may be missing: float32, or of the weights' dtype.
struct DeviceParameter {
  const void* data;
  bool is_float;
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename W>
__device__ __forceinline__ W from_float(float value) {
  if constexpr (std::is_same_v<W, float>) {
    return value;
  } else if constexpr (std::is_same_v<W, __half>) {
    return __float2half_rn(value);
  } else {
    return __float2bfloat16_rn(value);
  }
}

// 0 where the parameter is missing.
template <typename W>
__device__ __forceinline__ float parameter_at(const DeviceParameter& parameter, int64_t index) {
  if (parameter.data == nullptr) {
    return 0.0f;
  }
  return parameter.is_float ? static_cast<const float*>(parameter.data)[index]
                            : to_float(static_cast<const W*>(parameter.data)[index]);
}

// Elements that a W holds.
template <typename W>
constexpr int kElements = std::is_same_v<W, Int4Pair> ? 2 : 1;

// Elements of 16 bytes, or as many in 4 bits as of the 16-bit types.
template <typename W>
constexpr int kFullVector = std::is_same_v<W, Int4Pair> ? 8 : 16 / sizeof(W);

// kVec consecutive elements: kFullVector of them, or a single W where rows are not aligned.
template <typename W, int kVec>
struct Vector {
  uint32_t words[kVec == 1 ? 1 : 4];

  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (std::is_same_v<W, float>) {
      return __uint_as_float(words[i]);
    } else if constexpr (std::is_same_v<W, __nv_bfloat16>) {
      return __uint_as_float(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000);
    } else {
      const auto bits = static_cast<uint16_t>(i % 2 == 0 ? words[i / 2] : words[i / 2] >> 16);
      return __half2float(__ushort_as_half(bits));
    }
  }
};

template <int kVec>
struct Vector<Int4Pair, kVec> {
  uint32_t bits;

  __device__ __forceinline__ float operator[](int i) const {
    // As the last bits of 2^23 + the number, which takes no conversion.
    return __uint_as_float((bits >> 4 * i & 15) | 0x4b000000) - (0x1p23f + 8.0f);
  }
};

template <typename W, int kVec>
__device__ __forceinline__ Vector<W, kVec> load_vector(const W* data) {
  if constexpr (std::is_same_v<W, Int4Pair>) {
    return {kVec == 2 ? data->bits : *reinterpret_cast<const uint32_t*>(data)};
  } else if constexpr (kVec == 1 && sizeof(W) == 4) {
    return {{*reinterpret_cast<const uint32_t*>(data)}};
  } else if constexpr (kVec == 1) {
    return {{*reinterpret_cast<const uint16_t*>(data)}};
  } else {
    const uint4 bits = *reinterpret_cast<const uint4*>(data);
    return {{bits.x, bits.y, bits.z, bits.w}};
  }
}

// 16 bytes of an expert's weights, which are read once: they are kept out of L1, where x stays. The
// address must come from the selection, so that the compiler cannot move the load before it.
__device__ __forceinline__ uint4 load_expert_bits(const void* data) {
  uint4 bits;
  asm("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
      : "l"(data));
  return bits;
}

template <typename W, int kVec>
__device__ __forceinline__ Vector<W, kVec> load_expert(const W* data) {
  if constexpr (kVec == 1) {
    return load_vector<W, kVec>(data);
  } else {
    const uint4 bits = load_expert_bits(data);
    return {{bits.x, bits.y, bits.z, bits.w}};
  }
}

// kVec consecutive elements as float32.
template <typename Element, int kVec>
__device__ __forceinline__ void load_floats(const Element* data, float (&values)[kVec]) {
  constexpr int kPiece = kVec < kFullVector<Element> ? 1 : kFullVector<Element>;
#pragma unroll
  for (int i = 0; i < kVec; i += kPiece) {
    const Vector<Element, kPiece> piece = load_vector<Element, kPiece>(data + i);
#pragma unroll
    for (int k = 0; k < kPiece; ++k) {
      values[i + k] = piece[k];
    }
  }
}

// Brings a line into L2, where it stays true whoever writes it.
__device__ __forceinline__ void prefetch(const void* data) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(data));
}

// The sum over the `lanes` (a power of two) neighbours that this lane is one of, in all of them.
__device__ __forceinline__ float sum_lanes(float value, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, offset);
  }
  return value;
}

// Programmatic dependent launch: a kernel may start while the one before it on the stream runs,
// reads what that one does not write, and waits before it touches the rest.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

}  // namespace prunepath
