#if defined(__AVX2__)
#define PRUNEPATH_LANES 8
#define PRUNEPATH_KERNELS kFfnKernelsAvx2
#include "cpu/ffn_kernels_impl.h"
#endif
