#if defined(__AVX512BF16__)
#define PRUNEPATH_LANES 16
#define PRUNEPATH_KERNELS kFfnKernelsAvx512Bf16
#include "cpu/ffn_kernels_impl.h"
#endif
