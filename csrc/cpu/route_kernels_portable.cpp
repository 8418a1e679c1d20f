#define PRUNEPATH_LANES 4
#define PRUNEPATH_KERNELS kRouteKernelsPortable
#include "cpu/route_kernels_impl.h"
