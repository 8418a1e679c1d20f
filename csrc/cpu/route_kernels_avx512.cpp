#if defined(__AVX512F__)
#define PRUNEPATH_LANES 16
#define PRUNEPATH_KERNELS kRouteKernelsAvx512
#include "cpu/route_kernels_impl.h"
#endif
