#if defined(__AVX512F__)
#define PRUNEPATH_LANES 16
#define PRUNEPATH_KERNELS kFfnKernelsAvx512
#include "cpu/ffn_kernels_impl.h"
#endif
