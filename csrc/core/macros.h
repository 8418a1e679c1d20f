#pragma once

// Functions of csrc/core run on the host and, where nvcc compiles them, on the device. They are
// static so that translation units built with different instruction sets never share a copy.
#if defined(__CUDACC__)
#define PRUNEPATH_HD static __host__ __device__ __forceinline__
#else
#define PRUNEPATH_HD static inline __attribute__((always_inline, unused))
#endif
