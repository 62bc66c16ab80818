#include <cstdlib>
#include <cstring>

#include "leaf.h"

namespace bn {
namespace {

const Kernels& choose() {
#if defined(__x86_64__)
  const char* wish = std::getenv("BATCHNORM_CPU_CAPABILITY");
  const bool only_default = wish && !std::strcmp(wish, "default");
  const bool only_avx2 = wish && !std::strcmp(wish, "avx2");
  __builtin_cpu_init();
  // F16C came before AVX2, and older clangs do not know its name here
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
