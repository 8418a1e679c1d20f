#if defined(__AVX2__)
#define PRUNEPATH_LANES 8
#define PRUNEPATH_KERNELS kRouteKernelsAvx2
#include "cpu/route_kernels_impl.h"
#endif
