#define PRUNEPATH_LANES 4
#define PRUNEPATH_KERNELS kFfnKernelsPortable
#include "cpu/ffn_kernels_impl.h"
