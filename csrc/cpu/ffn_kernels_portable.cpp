#define PRUNEPATH_LANES 4
#define PRUNEPATH_KERNELS kFfnKernelsPortable
#define PRUNEPATH_KERNELS_NAME "portable"
#include "cpu/ffn_kernels_impl.h"
