// Iteration over the rows and vectors of a contiguous chunk. A loop has one channel at a time, with its coefficients in
// registers.
#pragma once

#include "access.h"

namespace bn {
namespace BN_ISA {

// Rows of one channel before those of the next channel, where a loop that sums has several channels.
constexpr std::int64_t kRowGroup = 8;

// The prefetch distance into the first-level cache: `distance` before the value `switch_at` of a row, `tail_distance`
// from there on, which leads into the row that is processed next. Short rows use the same position of the next row.
struct Prefetch {
  std::int64_t distance, switch_at, tail_distance;
};
template <class T> BN_INLINE Prefetch prefetch_row(const Chunk& chunk) {
  constexpr std::int64_t distance = kL1PrefetchBytes / static_cast<std::int64_t>(sizeof(T));
  if (chunk.length * chunk.channels < 2 * distance) return {chunk.next_row, chunk.length, chunk.next_row};
  if (chunk.channels > 1) return {distance, chunk.length, distance};
  return {distance, chunk.length - distance, chunk.next_row - chunk.length + distance};
}

// The same for one of several channels that are processed in the order of memory. The distance leads through all
// channels. It is shorter, because five tensors with a long distance would fill the first-level cache. For very short
// rows this computation costs more than it saves, so they use `row`, the result of prefetch_row.
template <class T> BN_INLINE Prefetch prefetch_channels(const Chunk& chunk, std::int64_t channel, const Prefetch& row) {
  constexpr std::int64_t size = sizeof(T), distance = kL1PrefetchBytes / 4 / size;
  if (chunk.channels == 1 || chunk.length * size < 384) return row;
  const std::int64_t all = chunk.length * chunk.channels, switch_at = all - distance - channel * chunk.length;
  return {distance,
          switch_at < 0              ? 0
          : switch_at < chunk.length ? switch_at
                                     : chunk.length,
          chunk.next_row - all + distance};
}

// The values of a row's prologue: those before the first aligned step, from the value `i` on.
template <class T, class A, class Access> BN_INLINE std::int64_t prologue_length(const Chunk& chunk, std::int64_t i) {
  constexpr std::uintptr_t bytes = Access::vectors * lanes<A>() * sizeof(T);
  const T* first = static_cast<const T*>(chunk.out ? chunk.out : chunk.grad_residual) + i;
  const std::uintptr_t misalignment = reinterpret_cast<std::uintptr_t>(first) % bytes;
  const std::int64_t prologue = misalignment ? static_cast<std::int64_t>((bytes - misalignment) / sizeof(T)) : 0;
  return prologue < chunk.length ? prologue : chunk.length;
}

// Calls step(i, mask index, prefetch distance, access) for all values of the row that begins at `start`. Stream stores
// must be aligned, so there the row begins with a prologue.
template <class T, class A, class Access, class F>
BN_INLINE void for_each_vector(const Chunk& chunk, std::int64_t start, std::int64_t mask, const Prefetch& prefetch,
                               const F& step) {
  constexpr int w = lanes<A>();
  std::int64_t i = chunk.stream ? prologue_length<T, A, Access>(chunk, start) : 0;
  if (i) step(start, mask, prefetch.distance, TailAccess<Access>{static_cast<int>(i)});
  std::int64_t stop = prefetch.switch_at, distance = prefetch.distance;
  for (int section = 0; section < 2; ++section, stop = chunk.length, distance = prefetch.tail_distance)
    for (; i + Access::vectors * w <= stop; i += Access::vectors * w) step(start + i, mask + i, distance, Access{});
  if (i < chunk.length) step(start + i, mask + i, distance, TailAccess<Access>{static_cast<int>(chunk.length - i)});
}

// Calls row(start, mask index, channel) for all rows of a chunk: in the order of memory, or the samples from the last
// one to the first one.
template <class F> BN_INLINE void for_each_row(const Chunk& chunk, const F& row) {
  for (std::int64_t i = 0; i < chunk.rows; ++i) {
    const std::int64_t r = chunk.next_row < 0 ? chunk.rows - 1 - i : i;
    for (std::int64_t k = 0; k < chunk.channels; ++k)
      row(r * chunk.row_stride + k * chunk.channel_stride, r * chunk.mask_stride, k);
  }
}

// Calls group(first row, end, channel) for groups of rows of one channel. Several channels have small groups, so that
// memory is still read in long pieces.
template <class F> BN_INLINE void for_each_row_group(const Chunk& chunk, const F& group) {
  const std::int64_t size = chunk.channels > 1 ? kRowGroup : chunk.rows;
  for (std::int64_t r = 0; r < chunk.rows; r += size)
    for (std::int64_t k = 0; k < chunk.channels; ++k) group(r, r + size < chunk.rows ? r + size : chunk.rows, k);
}

}  // namespace BN_ISA
}  // namespace bn
