#pragma once

// The FFN on the GPU: what its kernels are told, and how they read, write and launch.
//
// A call is cut into tiles of a few tokens. A tile's tokens share the reading of weights: every
// expert that any of them chose is read once, and a bit for each token says whether it chose that
// expert. The active neurons of a tile are numbered through, and blocks take equal ranges of them,
// so that the grid does not depend on the counts, which are known on the device alone.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "core/activations.h"
#include "core/layout.h"
#include "core/routing.h"
#include "cuda/tensors.cuh"

namespace prunepath {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffff;
constexpr int64_t kMaxCallTokens = 64;   // longer calls are cut
constexpr int kMaxSelectExperts = 1024;  // more are routed by the kernel of `route`

// A vector of parameters that may be missing: float32, or of the weights' dtype.
struct DeviceParameter {
  const void* data;
  bool is_float;
};

struct FfnArgs {
  const void* x;  // [T, H] of the weights' dtype
  int64_t x_token_stride;
  int64_t x_hidden_stride;
  const void* w_in;
  const void* w_out;
  DeviceParameter b_in;
  DeviceParameter b_out;
  DeviceParameter center;
  void* y;  // [T, H] contiguous
  int64_t in_neuron_stride;
  int64_t in_inner_stride;
  int32_t num_tokens;
  int32_t hidden_size;
  int32_t num_experts;
  int32_t expert_width;
  int32_t per_neuron;
  Activation activation;

  // The selection: the experts themselves, or logits and thresholds to select by.
  const int32_t* expert_ids;  // [T, num_columns]; null: select
  const int32_t* counts;      // [T]
  int32_t num_columns;
  const float* thresholds;
  int64_t threshold_stride;
  int32_t min_experts;
  int32_t* counts_out;  // [T], written when selecting

  const void* router_weight;  // [E, H]
  DeviceParameter router_bias;

  // Workspace.
  float* logits;       // [T, E], or in parts [.., T, E] to be added up
  uint32_t* counters;  // [num_counters], zero when the first kernel after the router's begins
  int32_t num_counters;
  uint32_t* active_bits;  // [T, ceil(E / 32)]
  int32_t* union_list;    // [tiles, 1 + E]: how many experts the tile's tokens run, and which
  void* hidden;           // [T, hidden_stride] of the weights' dtype
  int64_t hidden_stride;
  float* partial;  // sums of blocks, [.., tokens, H]
};

// Whether rows of weights and of x can be read 16 bytes at a time.
bool is_vectorised(const FfnArgs& args, int64_t element_size);

// The kernels of a call of at most kMaxCallTokens tokens. With logits to select by,
// `launch_many_tokens` makes them itself, and `launch_router` does for `launch_few_tokens`. Both
// routers zero the counters.
void launch_router(const FfnArgs& args, ScalarType dtype, int device, cudaStream_t stream);
void launch_few_tokens(const FfnArgs& args, ScalarType dtype, int device, cudaStream_t stream);
void launch_many_tokens(const FfnArgs& args, ScalarType dtype, int device, cudaStream_t stream);

// Whether `launch_many_tokens` can and should run this call.
bool suits_many_tokens(const FfnArgs& args, ScalarType dtype);

// Counters and floats of FfnArgs::partial that `launch_few_tokens` needs.
int64_t few_tokens_counters(int64_t tokens);
int64_t few_tokens_partial_size(int64_t tokens, const ExpertLayout& layout, int device);

// What `launch_many_tokens` needs of the workspace, in elements. All grow with the tokens.
struct ManyTokensWorkspace {
  int64_t logits, counters, active_bits, union_list, hidden_stride, hidden, partial;
};
ManyTokensWorkspace many_tokens_workspace(int64_t tokens, const ExpertLayout& layout, int device);

int sm_count(int device);
int compute_major(int device);
int max_shared(int device);  // bytes of a block

#ifdef __CUDACC__

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename W>
__device__ __forceinline__ W from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

template <typename W>
__device__ __forceinline__ float parameter_at(const DeviceParameter& parameter, int64_t index) {
  return parameter.is_float ? static_cast<const float*>(parameter.data)[index]
                            : to_float(static_cast<const W*>(parameter.data)[index]);
}

// kVec consecutive elements: 16 bytes, or a single element where rows are not aligned.
template <typename W, int kVec>
struct Vector {
  uint32_t words[4];

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

template <typename W, int kVec>
__device__ __forceinline__ Vector<W, kVec> vector_of(uint4 bits) {
  return {bits.x, bits.y, bits.z, bits.w};
}

template <typename W>
__device__ __forceinline__ uint32_t element_bits(const W* data) {
  if constexpr (sizeof(W) == 4) {
    return *reinterpret_cast<const uint32_t*>(data);
  } else {
    return *reinterpret_cast<const uint16_t*>(data);
  }
}

template <typename W>
constexpr int kFullVector = 16 / sizeof(W);

// Expert weights are read once: they are kept out of L1, where x stays. Their addresses come from
// the selection, so that the compiler cannot move these loads before it.
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
    return {element_bits(data)};
  } else {
    return vector_of<W, kVec>(load_expert_bits(data));
  }
}

template <typename W, int kVec>
__device__ __forceinline__ Vector<W, kVec> load_vector(const W* data) {
  if constexpr (kVec == 1) {
    return {element_bits(data)};
  } else {
    return vector_of<W, kVec>(*reinterpret_cast<const uint4*>(data));
  }
}

// Brings a line into L2, where it stays true whoever writes it.
__device__ __forceinline__ void prefetch(const void* data) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(data));
}

__device__ __forceinline__ float sum_warp(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, offset);
  }
  return value;
}

// Programmatic dependent launch: a kernel may start while the one before it on the stream runs,
// reads what that one does not write, and waits before it touches the rest. Without the launch
// attribute both do nothing.
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

__device__ __forceinline__ uint32_t add_release(uint32_t* counter) {
  uint32_t before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(counter)
               : "memory");
  return before;
}

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* counter) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

// Whether this block is the last of `expected` to come by the counter; then it sees what the others
// wrote before.
__device__ __forceinline__ bool arrives_last(uint32_t* counter, uint32_t expected) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    last = add_release(counter) + 1 == expected;
  }
  __syncthreads();
  return last;
}

__device__ __forceinline__ void zero_counters(const FfnArgs& args) {
  if (blockIdx.x == 0 && blockIdx.y == 0) {
    for (int i = threadIdx.x; i < args.num_counters; i += blockDim.x) {
      args.counters[i] = 0;
    }
  }
}

#endif  // __CUDACC__

// Lets blocks of the kernel ask for so much shared memory, where it is more than any kernel's 48
// KB: for all that there is, since another thread may be launching it for other shapes.
template <typename Kernel>
void allow_shared(Kernel kernel, size_t bytes, int device) {
  constexpr size_t kAlwaysAllowed = 48 << 10;
  constexpr int kStatic = 1 << 10;  // that a kernel which asks has beside it at most
  if (bytes > kAlwaysAllowed) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         max_shared(device) - kStatic);
  }
}

// Launches a kernel that may overlap the end of the one before it (see wait_for_previous_kernel).
template <typename... Parameters, typename... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
            int device_major, cudaStream_t stream, Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = device_major >= 9 ? 1 : 0;
  const cudaError_t status =
      cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  if (status != cudaSuccess) {
    fail(op, "the CUDA kernel did not start: ", cudaGetErrorString(status));
  }
}

}  // namespace prunepath
