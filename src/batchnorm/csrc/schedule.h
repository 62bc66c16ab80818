// Who does what when: a job's items and chunks over the threads.
#pragma once

#include <memory>

#include "coefficients.h"
#include "partition.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace bn {

// A job has: items(), chunks(item), most_chunks(), partial_size() and work() (values touched);
//   reduce(item, chunk, fused, partial)  one chunk's sums; `fused`: the item's map follows
//   finish(item, channels, partials)  all chunks' sums of some channels put together; what follows from them
//   map(item, chunk, fused)       one chunk's output; `fused`: right after the item's sums, from its last chunk back
struct Steps {
  bool reduce, map;
};

// Below this many values a second thread costs more than it brings.
constexpr std::int64_t kLeastWork = 65536;
// The same for sums to be put together: waking the threads takes longer than a few thousand additions.
constexpr std::int64_t kLeastSums = 16384;
// Channels that are finished at once: their sums of all chunks are to stay in cache, and there is to be some for each thread.
constexpr std::int64_t kFinishedAtOnce = 128;

template <class F> void parallel(const Pool& pool, std::int64_t count, bool alone, const F& f) {
  if (alone || pool.threads < 2 || count < 2) return f(0, count);
  pool.run(
      count, [](std::int64_t begin, std::int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

inline void drain_stores() {  // streaming stores are ordered by no lock
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Not zeroed: each chunk writes its own part first, by the thread that has it.
inline std::unique_ptr<double[]> room(std::int64_t values) {
  return std::unique_ptr<double[]>(new double[static_cast<std::size_t>(values)]);
}

// An item at a time: between its two passes its data are still in cache.
template <class Job> void run_items(Job& job, const Pool& pool, Steps steps, bool alone) {
  parallel(pool, job.items(), alone, [&](std::int64_t begin, std::int64_t end) {
    const auto partials = room(job.most_chunks() * job.partial_size());
    for (std::int64_t item = begin; item < end; ++item) {
      const std::int64_t chunks = job.chunks(item);
      for (std::int64_t c = 0; c < chunks; ++c) job.reduce(item, c, steps.map, partials.get() + c * job.partial_size());
      job.finish(item, job.all_channels(item), partials.get());
      // backwards: what was read last is the likeliest to be in cache
      for (std::int64_t c = chunks; steps.map && c-- > 0;) job.map(item, c, true);
    }
    drain_stores();
  });
}

// A pass at a time, in the order of memory: for fewer items than would keep the threads evenly busy.
template <class Job> void run_passes(Job& job, const Pool& pool, Steps steps, bool alone) {
  const std::int64_t most = job.most_chunks(), units = job.items() * most, size = job.partial_size();
  const std::int64_t side = job.items_a_slice();  // a slice's items lie side by side, its chunks one behind the other
  const auto item_of = [&](std::int64_t u) { return u / (side * most) * side + u % side; };
  const auto chunk_of = [&](std::int64_t u) { return u % (side * most) / side; };
  if (steps.reduce) {
    const auto partials = room(units * size);
    parallel(pool, units, alone, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t u = begin; u < end; ++u) {
        const std::int64_t item = item_of(u), chunk = chunk_of(u);
        if (chunk < job.chunks(item)) job.reduce(item, chunk, false, partials.get() + (item * most + chunk) * size);
      }
    });
    job.over_channels(pool, alone || units * size < kLeastSums, [&](std::int64_t item, Channels which) {
      job.finish(item, which, partials.get() + item * most * size);
    });
  }
  if (!steps.map) return;
  parallel(pool, units, alone, [&](std::int64_t begin, std::int64_t end) {
    // backwards where the first pass has just been here: what was read last is the likeliest to be in cache
    for (std::int64_t i = 0; i < end - begin; ++i) {
      const std::int64_t u = steps.reduce ? end - 1 - i : begin + i;
      if (chunk_of(u) < job.chunks(item_of(u))) job.map(item_of(u), chunk_of(u), false);
    }
    drain_stores();
  });
}

template <class Job> void run(Job& job, const Pool& pool, Steps steps) {
  const bool alone = job.work() < kLeastWork;
  if (steps.reduce && (alone || job.items() >= 4 * pool.threads)) run_items(job, pool, steps, alone);
  else run_passes(job, pool, steps, alone);
}

// What both directions share: items, their slices and channels, and the way to their slabs.
class JobBase {
 public:
  // Of how many tensors it reads and writes.
  JobBase(const Problem& p, std::int64_t inputs, std::int64_t outputs)
      : p_(p), parts_(p), width_(parts_.width()), coefficients_(p, items(), width_),
        stream_(outputs && p.out != p.x && exceeds_cache(p, inputs + outputs) && whole_lines(p)) {}

  std::int64_t items() const { return p_.rows() * parts_.items_a_slice(); }
  std::int64_t items_a_slice() const { return parts_.items_a_slice(); }
  std::int64_t slice(std::int64_t item) const { return item / parts_.items_a_slice(); }
  std::int64_t channel(std::int64_t item) const { return item % parts_.items_a_slice() * width_; }
  std::int64_t channels(std::int64_t item) const { return std::min(width_, p_.c - channel(item)); }
  std::int64_t chunks(std::int64_t item) const { return parts_.chunks(slice(item)); }
  std::int64_t most_chunks() const { return parts_.most_chunks(); }
  std::int64_t work() const { return p_.n * p_.c * p_.s; }

  // Coefficients that need no reduction first.
  void set_affine(const Pool& pool) {
    over_channels(pool, items() * width_ < kLeastSums, [&](std::int64_t i, Channels which) {
      coefficients_.set_affine(i, slice(i), channel(i), which);
    });
  }

  Channels all_channels(std::int64_t item) const { return {0, channels(item)}; }

  // Calls f(item, some of its channels) for all.
  template <class F> void over_channels(const Pool& pool, bool alone, const F& f) const {
    const std::int64_t parts = width_ ? (width_ + kFinishedAtOnce - 1) / kFinishedAtOnce : 0;
    parallel(pool, items() * parts, alone, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t u = begin; u < end; ++u) {
        const std::int64_t item = u / parts, first = u % parts * kFinishedAtOnce, left = channels(item) - first;
        if (left > 0) f(item, Channels{first, std::min(left, kFinishedAtOnce)});
      }
    });
  }

 protected:
  // Of a pass that sums; `fused`: the pass that writes the item is next.
  Slab slab_to_sum(std::int64_t item, std::int64_t chunk, bool fused) const {
    Slab s = parts_.slab(slice(item), chunk, channel(item));
    if (!fused || stream_ || p_.channels_last) s.out = s.grad_residual = nullptr;
    return s;
  }
  // Of a pass that writes; `fused`: the item's own first pass has just been here, the next item's is to come.
  Slab slab_to_write(std::int64_t item, std::int64_t chunk, bool fused) const {
    Slab s = parts_.slab(slice(item), chunk, channel(item));
    s.stream = stream_;
    if (p_.channels_last) return s;
    if (fused) {
      s.turn = -s.turn;
      // what comes next while this is written: else memory rests in one pass and is the bound in the other
      s.next = width_ * p_.s;
    } else if (s.runs > 1) {
      s.turn = s.stride;
      s.next = 4 * s.stride;
    } else {
      s.turn = s.channels * s.length;
      s.next = kDeepBytes / static_cast<std::int64_t>(size_of(p_.dtype));
    }
    return s;
  }
  double* row(double* rows, std::int64_t item) const { return rows + slice(item) * p_.c + channel(item); }

  // Such outputs are written around the caches, without a read for ownership: nobody finds them there anyhow. Not over
  // x, whose lines are there and owned: throwing them out first costs more than it saves.
  static bool exceeds_cache(const Problem& p, std::int64_t tensors);
  // Whether most stores are whole cache lines.
  static bool whole_lines(const Problem& p);

  const Problem& p_;
  Partition parts_;
  std::int64_t width_;
  Coefficients coefficients_;
  bool stream_;
};

}  // namespace bn
