#include "schedule.h"

#include <cstdint>
#include <cstdio>

namespace bn {
namespace {

// The size of the last-level cache of one core complex, from Linux's sysfs. sysconf(_SC_LEVEL3_CACHE_SIZE) is no
// alternative: on some virtual machines it multiplies the size by the number of cores, and then nothing is too large.
std::int64_t last_level_cache() {
  constexpr std::int64_t usual = std::int64_t{32} << 20;
  long kib = 0;
  if (std::FILE* file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
    if (std::fscanf(file, "%ldK", &kib) != 1) kib = 0;
    std::fclose(file);
  }
  return kib > 0 ? std::int64_t{kib} << 10 : usual;
}

}  // namespace

bool JobBase::exceeds_cache(const Problem& p, std::int64_t tensors, std::int64_t quarters) {
  static const std::int64_t cache = last_level_cache();
  return p.n * p.c * p.s * static_cast<std::int64_t>(size_of(p.dtype)) * tensors >= cache / 4 * quarters;
}

bool JobBase::writes_full_cache_lines(const Problem& p) {
  // A stream store must be aligned. The prologue of a row aligns one output, and another one with the same
  // misalignment.
  const auto misalignment = [](const void* data) { return reinterpret_cast<std::uintptr_t>(data) % 64; };
  if (p.out && p.grad_residual && misalignment(p.out) != misalignment(p.grad_residual)) return false;
  const std::int64_t row = (p.channels_last ? p.c : p.s) * static_cast<std::int64_t>(size_of(p.dtype));
  if (!p.channels_last) return row >= 1024;
  return row % 64 == 0 && misalignment(p.out ? p.out : p.grad_residual) == 0;
}

}  // namespace bn
