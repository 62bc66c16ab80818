#include "blocks.h"

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#define BN_HAS_MMAP 1
#endif

namespace bn {

#if defined(BN_HAS_MMAP)
namespace {

constexpr std::size_t kPage = 4096, kHuge = std::size_t{2} << 20;

using Clock = std::chrono::steady_clock;

struct Idle {
  Block* block;
  Clock::time_point since;
};

std::size_t max_idle_bytes() {
  if (const char* limit = std::getenv("BATCHNORM_CACHE_MIB"))
    return static_cast<std::size_t>(std::strtoull(limit, nullptr, 10)) << 20;
  const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
  return pages > 0 && page > 0 ? static_cast<std::size_t>(pages) / 8 * static_cast<std::size_t>(page)
                               : std::size_t{1} << 30;
}

struct Cache {
  std::mutex mutex;
  std::vector<Idle> idle;  // the one that is idle longest comes first
  std::size_t bytes = 0, max_bytes = max_idle_bytes();
};

// Never destroyed, because tensors may outlive static objects.
Cache& cache() {
  static Cache* const one = [] {
    auto* made = new Cache;
    // A child process has one thread only. If another thread held the lock at the fork, nobody would release it.
    pthread_atfork([] { cache().mutex.lock(); }, [] { cache().mutex.unlock(); }, [] { cache().mutex.unlock(); });
    return made;
  }();
  return *one;
}

void unmap(Block* block) {
  munmap(block->data, block->bytes);
  delete block;
}

// Maps full pages. A block of at least one huge page starts at the boundary of one.
void* map(std::size_t bytes) {
  const std::size_t slack = bytes >= kHuge ? kHuge : 0;
  void* const raw = mmap(nullptr, bytes + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
  if (raw == MAP_FAILED) return nullptr;
  if (!slack) return raw;
  char* const begin = static_cast<char*>(raw);
  char* const data = begin + (kHuge - reinterpret_cast<std::uintptr_t>(raw) % kHuge) % kHuge;
  if (data != begin) munmap(begin, static_cast<std::size_t>(data - begin));
  if (data != begin + slack) munmap(data + bytes, static_cast<std::size_t>(begin + slack - data));
#if defined(MADV_HUGEPAGE)
  (void)madvise(data, bytes, MADV_HUGEPAGE);  // a hint: without it the tensor is only slower
#endif
  return data;
}

// Removes from the list the blocks to return to the system. The caller unmaps them after it released the lock.
std::vector<Block*> remove_expired(Cache& c, std::size_t max_bytes, Clock::time_point now) {
  std::vector<Block*> expired;
  std::size_t n = 0;
  for (; n < c.idle.size(); ++n) {
    if (c.bytes <= max_bytes && now - c.idle[n].since < std::chrono::seconds(kMaxIdleSeconds)) break;
    c.bytes -= c.idle[n].block->bytes;
    expired.push_back(c.idle[n].block);
  }
  c.idle.erase(c.idle.begin(), c.idle.begin() + static_cast<std::ptrdiff_t>(n));
  return expired;
}

// Removes and returns the smallest idle block that is large enough and at most an eighth larger. Null: there is none.
Block* reuse(Cache& c, std::size_t bytes) {
  std::size_t best = c.idle.size();
  for (std::size_t i = 0; i < c.idle.size(); ++i) {
    const std::size_t size = c.idle[i].block->bytes;
    if (size >= bytes && size <= bytes + bytes / 8 && (best == c.idle.size() || size <= c.idle[best].block->bytes))
      best = i;
  }
  if (best == c.idle.size()) return nullptr;
  Block* const found = c.idle[best].block;
  c.bytes -= found->bytes;
  c.idle.erase(c.idle.begin() + static_cast<std::ptrdiff_t>(best));
  return found;
}

}  // namespace

Block* take_block(std::size_t bytes) {
  bytes = (bytes + kPage - 1) / kPage * kPage;
  Cache& c = cache();
  Block* found = nullptr;
  std::vector<Block*> expired;
  {
    const std::lock_guard<std::mutex> lock(c.mutex);
    found = reuse(c, bytes);
    expired = remove_expired(c, c.max_bytes, Clock::now());
  }
  for (Block* block : expired) unmap(block);
  if (found) return found;
  void* const data = map(bytes);
  return data ? new Block{data, bytes} : nullptr;
}

void give_block(Block* block) {
  Cache& c = cache();
  std::vector<Block*> expired;
  {
    const std::lock_guard<std::mutex> lock(c.mutex);
    const Clock::time_point now = Clock::now();
    c.idle.push_back({block, now});
    c.bytes += block->bytes;
    expired = remove_expired(c, c.max_bytes, now);
  }
  for (Block* old : expired) unmap(old);
}

std::size_t empty_cache() {
  Cache& c = cache();
  std::vector<Block*> expired;
  {
    const std::lock_guard<std::mutex> lock(c.mutex);
    expired = remove_expired(c, 0, Clock::now());
  }
  std::size_t freed = 0;
  for (Block* block : expired) {
    freed += block->bytes;
    unmap(block);
  }
  return freed;
}

#else  // without mmap all outputs are allocated by torch
Block* take_block(std::size_t) { return nullptr; }
void give_block(Block*) {}
std::size_t empty_cache() { return 0; }
#endif

}  // namespace bn
