#include "host/cpu_features.h"

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace prunepath {

#if defined(__x86_64__)

namespace {

struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

bool bit(uint32_t word, int index) { return (word >> index) & 1; }

// XCR0: the register files that the operating system saves when it switches processes.
uint64_t saved_state() {
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
}

}  // namespace

std::vector<std::pair<std::string, bool>> cpu_features() {
  const Registers basic = cpuid(1, 0), extended = cpuid(7, 0), more = cpuid(7, 1);
  constexpr uint64_t kYmm = 0x6, kZmm = 0xe6, kTiles = 0x60000;
  const uint64_t state = bit(basic.ecx, 27) ? saved_state() : 0;
  const bool ymm = (state & kYmm) == kYmm, zmm = (state & kZmm) == kZmm;
  const bool tiles = (state & kTiles) == kTiles;
  return {
      {"avx2", ymm && bit(extended.ebx, 5)},        {"fma", ymm && bit(basic.ecx, 12)},
      {"f16c", ymm && bit(basic.ecx, 29)},          {"avx_vnni", ymm && bit(more.eax, 4)},
      {"avx512f", zmm && bit(extended.ebx, 16)},    {"avx512bw", zmm && bit(extended.ebx, 30)},
      {"avx512dq", zmm && bit(extended.ebx, 17)},   {"avx512vl", zmm && bit(extended.ebx, 31)},
      {"avx512vnni", zmm && bit(extended.ecx, 11)}, {"avx512bf16", zmm && bit(more.eax, 5)},
      {"avx512fp16", zmm && bit(extended.edx, 23)}, {"amx_tile", tiles && bit(extended.edx, 24)},
      {"amx_bf16", tiles && bit(extended.edx, 22)}, {"amx_int8", tiles && bit(extended.edx, 25)},
  };
}

#elif defined(__aarch64__) && defined(__linux__)

std::vector<std::pair<std::string, bool>> cpu_features() {
  // Bits of the kernel's AT_HWCAP and AT_HWCAP2 words; older C libraries' headers lack names for
  // the later ones.
  const unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
  return {
      {"neon", (first >> 1) & 1},   {"fp16", (first >> 10) & 1}, {"dotprod", (first >> 20) & 1},
      {"sve", (first >> 22) & 1},   {"sve2", (second >> 1) & 1}, {"i8mm", (second >> 13) & 1},
      {"bf16", (second >> 14) & 1},
  };
}

#elif defined(__aarch64__) && defined(__APPLE__)

std::vector<std::pair<std::string, bool>> cpu_features() {
  const auto has = [](const char* name) {
    int value = 0;
    size_t size = sizeof(value);
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
  };
  return {
      {"neon", true},
      {"fp16", has("hw.optional.arm.FEAT_FP16")},
      {"dotprod", has("hw.optional.arm.FEAT_DotProd")},
      {"i8mm", has("hw.optional.arm.FEAT_I8MM")},
      {"bf16", has("hw.optional.arm.FEAT_BF16")},
  };
}

#else

std::vector<std::pair<std::string, bool>> cpu_features() { return {}; }

#endif

}  // namespace prunepath
