// AVX2: the same loops on 32-byte vectors. Empty on other processors.
#include "std_headers.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,prfchw"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,prfchw")
#endif

#define BN_ISA avx2
#define BN_VECTOR_BYTES 32
#include "fill_table.h"

namespace bn {
const Kernels& kernels_avx2() {
  static const Kernels table = avx2::make_kernels("avx2");
  return table;
}
}  // namespace bn

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
