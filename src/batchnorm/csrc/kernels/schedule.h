// Distributes the items and chunks of a job over the threads.
#pragma once

#include <memory>

#include "coefficients.h"
#include "partition.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace bn {

// A job is a class with items(), chunks(item), max_chunks(), partial_size() and size() (values of x), and
//   reduce(item, index, fused, partial)   the sums of one chunk; `fused`: the item's write pass follows
//   finalize(item, channels, partials)    merges the chunks' sums for a range of channels and sets the coefficients
//   write(item, index, fused)             the output of one chunk; `fused`: after the item's sums, last chunk first
struct Passes {
  bool reduce, write;
};

// Fewer values are done by one thread: a second one costs more than it saves.
constexpr std::int64_t kMinParallelValues = 65536;
// The same for sums to merge: to wake the threads takes longer than a few thousand additions.
constexpr std::int64_t kMinParallelSums = 16384;
// Channels to finalize at once. Their sums of all chunks should stay in cache, and each thread should get some.
constexpr std::int64_t kFinalizeChannels = 128;

template <class F> void parallel(const ThreadPool& pool, std::int64_t count, bool serial, const F& f) {
  if (serial || pool.threads < 2 || count < 2) return f(0, count);
  pool.parallel_for(
      count, [](std::int64_t begin, std::int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

inline void fence_stream_stores() {  // a lock does not order stream stores
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Not set to zero: the thread that has a chunk writes the chunk's part first.
inline std::unique_ptr<double[]> uninitialized(std::int64_t values) {
  return std::unique_ptr<double[]>(new double[static_cast<std::size_t>(values)]);
}

// One item after the other, both passes. The data of the item are still in cache for the second pass.
template <class Job> void execute_by_item(Job& job, const ThreadPool& pool, Passes passes, bool serial) {
  parallel(pool, job.items(), serial, [&](std::int64_t begin, std::int64_t end) {
    const auto partials = uninitialized(job.max_chunks() * job.partial_size());
    for (std::int64_t item = begin; item < end; ++item) {
      const std::int64_t chunks = job.chunks(item);
      for (std::int64_t c = 0; c < chunks; ++c)
        job.reduce(item, c, passes.write, partials.get() + c * job.partial_size());
      job.finalize(item, job.all_channels(item), partials.get());
      // last chunk first: what was read last is most likely in cache
      for (std::int64_t c = chunks; passes.write && c-- > 0;) job.write(item, c, true);
    }
    fence_stream_stores();
  });
}

// One pass after the other, in the order of memory, where there are too few items to keep all threads busy.
template <class Job> void execute_by_pass(Job& job, const ThreadPool& pool, Passes passes, bool serial) {
  const std::int64_t max_chunks = job.max_chunks(), tasks = job.items() * max_chunks, size = job.partial_size();
  // in the order of memory: of a slice, the first chunk of every item, then the second chunk of every item, ...
  const std::int64_t items = job.items_per_slice();
  const auto item_of = [&](std::int64_t task) { return task / (items * max_chunks) * items + task % items; };
  const auto index_of = [&](std::int64_t task) { return task % (items * max_chunks) / items; };
  if (passes.reduce) {
    const auto partials = uninitialized(tasks * size);
    parallel(pool, tasks, serial, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t task = begin; task < end; ++task) {
        const std::int64_t item = item_of(task), index = index_of(task);
        if (index < job.chunks(item))
          job.reduce(item, index, false, partials.get() + (item * max_chunks + index) * size);
      }
    });
    job.for_each_range(pool, serial || tasks * size < kMinParallelSums, [&](std::int64_t item, ChannelRange range) {
      job.finalize(item, range, partials.get() + item * max_chunks * size);
    });
  }
  if (!passes.write) return;
  parallel(pool, tasks, serial, [&](std::int64_t begin, std::int64_t end) {
    // backward after a first pass: what was read last is most likely in cache
    for (std::int64_t i = 0; i < end - begin; ++i) {
      const std::int64_t task = passes.reduce ? end - 1 - i : begin + i;
      if (index_of(task) < job.chunks(item_of(task))) job.write(item_of(task), index_of(task), false);
    }
    fence_stream_stores();
  });
}

template <class Job> void execute(Job& job, const ThreadPool& pool, Passes passes) {
  const bool serial = job.size() < kMinParallelValues;
  if (passes.reduce && (serial || job.items() >= 4 * pool.threads)) execute_by_item(job, pool, passes, serial);
  else execute_by_pass(job, pool, passes, serial);
}

// The sums of one chunk in the channels-last form: rows with a value for each column of its channels.
class ColumnSums {
 public:
  ColumnSums(std::int64_t channels, std::int64_t columns)
      : channels_(channels), columns_(columns), values_(uninitialized(3 * channels * columns)) {
    std::fill_n(row(0), 2 * channels * columns, 0.0);
  }

  // Rows 0 and 1 are zero, row 2 is not set.
  double* row(std::int64_t row) const { return values_.get() + row * channels_ * columns_; }
  void spread(const double* of_channels, std::int64_t row) const {
    kernels().channels.spread_float64(of_channels, channels_, columns_, this->row(row));
  }
  void gather(std::int64_t row, double* of_channels) const {
    kernels().channels.gather(this->row(row), channels_, columns_, of_channels);
  }

 private:
  std::int64_t channels_, columns_;
  std::unique_ptr<double[]> values_;
};

// What the forward job and the backward job share: items, their slices and channels, and their chunks.
class JobBase {
 public:
  // `inputs`, `outputs`: how many tensors of the size of x the job reads and writes.
  JobBase(const Problem& p, std::int64_t inputs, std::int64_t outputs)
      : p_(p),
        partition_(p),
        item_channels_(partition_.item_channels()),
        coefficients_(p, items(), item_channels_, partition_.columns()),
        stream_(outputs && p.out != p.x && exceeds_cache(p, inputs + outputs, 3) && writes_full_cache_lines(p)),
        prefetch_(exceeds_cache(p, inputs + outputs, 1)) {}

  std::int64_t items() const { return p_.slices() * partition_.items_per_slice(); }
  std::int64_t items_per_slice() const { return partition_.items_per_slice(); }
  std::int64_t slice(std::int64_t item) const { return item / partition_.items_per_slice(); }
  std::int64_t channel(std::int64_t item) const { return item % partition_.items_per_slice() * item_channels_; }
  std::int64_t channels(std::int64_t item) const { return std::min(item_channels_, p_.c - channel(item)); }
  ChannelRange all_channels(std::int64_t item) const { return {0, channels(item)}; }
  std::int64_t chunks(std::int64_t item) const { return partition_.chunks(slice(item)); }
  std::int64_t max_chunks() const { return partition_.max_chunks(); }
  std::int64_t size() const { return p_.n * p_.c * p_.s; }

  // The coefficients that follow from given moments.
  void set_affine(const ThreadPool& pool) {
    for_each_range(pool, items() * item_channels_ < kMinParallelSums, [&](std::int64_t item, ChannelRange range) {
      coefficients_.set_affine(item, slice(item), channel(item), range);
    });
  }

  // Calls f(item, range) for all channels of all items.
  template <class F> void for_each_range(const ThreadPool& pool, bool serial, const F& f) const {
    const std::int64_t ranges = item_channels_ ? (item_channels_ + kFinalizeChannels - 1) / kFinalizeChannels : 0;
    parallel(pool, items() * ranges, serial, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t task = begin; task < end; ++task) {
        const std::int64_t item = task / ranges, first = task % ranges * kFinalizeChannels;
        const std::int64_t remaining = channels(item) - first;
        if (remaining > 0) f(item, ChannelRange{first, std::min(remaining, kFinalizeChannels)});
      }
    });
  }

 protected:
  // Whether contiguous maps are read in the channels-last form. Loops in float64 are not, whose coefficients have a
  // value a channel.
  bool has_columns() const { return partition_.columns() > 1; }
  bool in_columns(std::int64_t item) const { return has_columns() && !coefficients_.needs_float64(item); }

  // A chunk for the pass that sums. `fused`: the write pass of the same item is next.
  Chunk chunk_to_reduce(std::int64_t item, std::int64_t index, bool fused, bool columns) const {
    Chunk chunk = partition_.chunk(slice(item), index, channel(item), columns);
    chunk.prefetch = prefetch_;
    if (!fused || !prefetch_ || stream_ || p_.channels_last || columns) chunk.out = chunk.grad_residual = nullptr;
    return chunk;
  }
  // A chunk for the pass that writes. `fused`: the item's first pass was just here, and the next item follows.
  Chunk chunk_to_write(std::int64_t item, std::int64_t index, bool fused, bool columns) const {
    Chunk chunk = partition_.chunk(slice(item), index, channel(item), columns);
    chunk.stream = stream_;
    chunk.prefetch = prefetch_;
    if (p_.channels_last || columns) return chunk;
    if (fused) {
      chunk.next_row = -chunk.next_row;
      // Prefetch the next item while this one is written. Otherwise memory is idle in this pass and the bound in the
      // other.
      chunk.l2_distance = item_channels_ * p_.s;
    } else if (chunk.rows > 1) {
      chunk.next_row = chunk.row_stride;
      chunk.l2_distance = 4 * chunk.row_stride;
    } else {
      chunk.next_row = chunk.channels * chunk.length;
      chunk.l2_distance = kL2PrefetchBytes / static_cast<std::int64_t>(size_of(p_.dtype));
    }
    return chunk;
  }
  // Calls f(block, first channel) for blocks of a contiguous chunk's channels: as many as a loop that sums can have.
  // Their coefficients are in float64 wherever there is more than one block.
  template <class F> void for_each_block(const Chunk& chunk, const F& f) const {
    for (std::int64_t first = 0; first < std::max<std::int64_t>(chunk.channels, 1); first += kMaxItemChannels) {
      Chunk block = chunk;
      block.channels = std::min<std::int64_t>(chunk.channels - first, kMaxItemChannels);
      const std::int64_t bytes = first * chunk.channel_stride * static_cast<std::int64_t>(size_of(p_.dtype));
      const auto advance = [bytes](auto*& base) {
        if (base)
          base = static_cast<std::remove_reference_t<decltype(base)>>(
              const_cast<char*>(static_cast<const char*>(static_cast<const void*>(base))) + bytes);
      };
      advance(block.x);
      advance(block.grad);
      advance(block.residual);
      advance(block.out);
      advance(block.grad_residual);
      if (first) block.coefs = static_cast<const double*>(chunk.coefs) + first;
      f(block, first);
    }
  }
  // Where the item's values stand in a (slices, c) array.
  double* item_row(double* rows, std::int64_t item) const { return rows + slice(item) * p_.c + channel(item); }

  // Whether the tensors exceed so many quarters of the last-level cache.
  // Three, because other processes share the cache: the outputs are written with stream stores, which read no cache
  // line before they write it; a later reader would not find the outputs in cache anyway. Outputs that overwrite x are
  // never streamed: their lines are in cache already, and to evict them first costs more than it saves. One: the loops
  // prefetch.
  static bool exceeds_cache(const Problem& p, std::int64_t tensors, std::int64_t quarters);
  // Whether most stores fill a cache line.
  static bool writes_full_cache_lines(const Problem& p);

  const Problem& p_;
  Partition partition_;
  std::int64_t item_channels_;
  Coefficients coefficients_;
  bool stream_, prefetch_;
};

}  // namespace bn
