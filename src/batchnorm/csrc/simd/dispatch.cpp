#include <cstdlib>
#include <cstring>

#include "../kernels/kernel_table.h"

namespace bn {
namespace {

const Kernels& choose() {
#if defined(__x86_64__)
  const char* limit = std::getenv("BATCHNORM_CPU_CAPABILITY");
  const bool only_default = limit && !std::strcmp(limit, "default");
  const bool only_avx2 = limit && !std::strcmp(limit, "avx2");
  __builtin_cpu_init();
  // F16C is not tested: every processor with AVX2 has it, and older versions of clang do not know its name here
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && !only_default && !only_avx2) return kernels_avx512();
  if (avx2 && !only_default) return kernels_avx2();
#endif
  return kernels_default();
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace bn
