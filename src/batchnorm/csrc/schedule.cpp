#include "schedule.h"

#include <cstdint>
#include <cstdio>

namespace bn {
namespace {

// Of one core complex. Linux tells it in sysfs; sysconf(_SC_LEVEL3_CACHE_SIZE) multiplies it by the sockets' cores on
// some virtual machines, and then nothing would ever seem too large.
std::int64_t last_level_cache() {
  constexpr std::int64_t common = std::int64_t{32} << 20;
  long kib = 0;
  if (std::FILE* file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
    if (std::fscanf(file, "%ldK", &kib) != 1) kib = 0;
    std::fclose(file);
  }
  return kib > 0 ? std::int64_t{kib} << 10 : common;
}

}  // namespace

bool JobBase::exceeds_cache(const Problem& p, std::int64_t tensors) {
  static const std::int64_t cache = last_level_cache();
  // three quarters: others share it
  return p.n * p.c * p.s * static_cast<std::int64_t>(size_of(p.dtype)) * tensors >= cache / 4 * 3;
}

bool JobBase::whole_lines(const Problem& p) {
  // A streaming store faults where it is not aligned: a run's head can align one output, and another like it.
  const auto over = [](const void* data) { return reinterpret_cast<std::uintptr_t>(data) % 64; };
  if (p.out && p.grad_residual && over(p.out) != over(p.grad_residual)) return false;
  const std::int64_t run = (p.channels_last ? p.c : p.s) * static_cast<std::int64_t>(size_of(p.dtype));
  if (!p.channels_last) return run >= 1024;
  return run % 64 == 0 && over(p.out ? p.out : p.grad_residual) == 0;
}

}  // namespace bn
