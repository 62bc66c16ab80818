#include "schedule.h"

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
  const std::int64_t run = (p.channels_last ? p.c : p.s) * static_cast<std::int64_t>(size_of(p.dtype));
  return p.channels_last ? run % 64 == 0 : run >= 1024;
}

}  // namespace bn
