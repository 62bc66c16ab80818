// AVX-512: the same loops on 64-byte vectors. Empty on other processors.
#include "std_headers.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prfchw"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prfchw")
#endif

#define BN_ISA avx512
#define BN_VECTOR_BYTES 64
#include "fill_table.h"

namespace bn {
const Kernels& kernels_avx512() {
  static const Kernels table = avx512::make_kernels("avx512");
  return table;
}
}  // namespace bn

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
