// Baseline of the platform: SSE2 on x86-64, NEON on ARM64; 16-byte vectors.
#include "isa/std.h"

#define BN_ISA baseline
#define BN_VECTOR_BYTES 16
#include "isa/all.h"

namespace bn {
const Kernels& kernels_default() {
  static const Kernels table = baseline::make("default");
  return table;
}
}  // namespace bn
