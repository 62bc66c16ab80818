#include "schedule.h"

#include <unistd.h>

namespace bn {
namespace {

std::int64_t last_level_cache() {
#if defined(_SC_LEVEL3_CACHE_SIZE)
  const long bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return std::int64_t{32} << 20;
}

}  // namespace

bool JobBase::stream_pays(const Problem& p, std::int64_t outputs) {
  static const std::int64_t cache = last_level_cache();
  const std::int64_t bytes = p.n * p.c * p.s * static_cast<std::int64_t>(size_of(p.dtype));
  const std::int64_t run = (p.channels_last ? p.c : p.s) * static_cast<std::int64_t>(size_of(p.dtype));
  // a row that no vector starts at, or a run that is mostly head and tail
  if (p.channels_last ? run % 64 != 0 : run < 1024) return false;
  return bytes * outputs >= cache;
}

}  // namespace bn
