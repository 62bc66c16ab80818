// The baseline of the platform: 16-byte vectors, SSE2 on x86-64 and NEON on ARM64.
#include "std_headers.h"

#define BN_ISA baseline
#define BN_VECTOR_BYTES 16
#include "fill_table.h"

namespace bn {
const Kernels& kernels_default() {
  static const Kernels table = baseline::make_kernels("default");
  return table;
}
}  // namespace bn
