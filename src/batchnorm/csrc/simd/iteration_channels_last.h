// Iteration over the rows and columns of a channels-last chunk. A row is a pixel, a column a channel. The coefficients
// come from the first-level cache.
#pragma once

#include "access.h"

namespace bn {
namespace BN_ISA {

// --- tiles, for sums ---
// A tile is kTileRows rows of a few adjacent columns: the sums of its columns stay in registers.

// Additions to one lane in sequence, before the sum goes to float64 (docs/kernels.md).
constexpr int kSequentialAdditions = 16;
constexpr std::int64_t kTileRows = kSequentialAdditions;
// Vectors of columns in a tile.
constexpr int kTileVectors = kVectorBytes == 64 ? 4 : 2;

// The prefetch distance of a tile, in the order of memory: two rows of tiles. It goes into the second-level cache,
// because wide tiles would evict each other from the first-level cache.
template <class T> BN_INLINE std::int64_t tile_prefetch_distance(const Chunk& chunk) {
  constexpr std::int64_t minimum = 4096 / static_cast<std::int64_t>(sizeof(T));
  const std::int64_t tiles = 2 * kTileRows * chunk.row_stride;
  return tiles > minimum ? tiles : minimum;
}

// Calls tile(column, first row, end row, accesses, access, prefetch index) for all tiles. `accesses` is the number of
// accesses in a row of the tile, as a constant. `prefetch index` is the index of the value where the prefetch begins.
template <class T, class A, class Access, class F> BN_INLINE void for_each_tile(const Chunk& chunk, const F& tile) {
  constexpr int w = lanes<A>(), vectors = Access::vectors;
  const std::int64_t distance = tile_prefetch_distance<T>(chunk);
  for (std::int64_t r = 0; r < chunk.rows; r += kTileRows) {
    const std::int64_t end = r + kTileRows < chunk.rows ? r + kTileRows : chunk.rows, rows = end - r;
    std::int64_t c = 0;
    const auto prefetch = [&]() BN_ALWAYS { return r * chunk.row_stride + distance + c * rows; };
    for (; c + kTileVectors * w <= chunk.length; c += kTileVectors * w)
      tile(c, r, end, std::integral_constant<int, kTileVectors / vectors>{}, Access{}, prefetch());
    constexpr std::integral_constant<int, 1> one{};
    if constexpr (kTileVectors > vectors)
      for (; c + vectors * w <= chunk.length; c += vectors * w) tile(c, r, end, one, Access{}, prefetch());
    if constexpr (vectors > 1)
      for (; c + w <= chunk.length; c += w) tile(c, r, end, one, FullVector{}, prefetch());
    if (c < chunk.length) tile(c, r, end, one, PartialVector{static_cast<int>(chunk.length - c)}, prefetch());
  }
}

// Prefetches the cache lines of one row of a tile of `vectors` vectors.
template <class T, class A, int vectors> BN_INLINE void prefetch_tile_row(const T* p, std::int64_t index) {
  constexpr std::int64_t cache_line = 64 / static_cast<std::int64_t>(sizeof(T)), values = vectors * lanes<A>();
  for (std::int64_t i = 0; i < values; i += cache_line) prefetch_l2(p, index + i);
}

// --- rows, for loops that write ---

// Rows that share the coefficients of a column. Per value there are more coefficients to read than data.
constexpr int kSharedRows = 4;

// Several long rows at a time, each with its own prefetch, would fill the first-level cache.
template <class T> BN_INLINE bool has_long_rows(const Chunk& chunk) {
  return chunk.row_stride * static_cast<std::int64_t>(sizeof(T)) >= 2048;
}
// Whether rows are processed one by one. Stream stores need the order of memory. Long rows need the first-level cache
// for themselves; this pays if the coefficients, which every row then reads, fit into it and are not wider than the
// data.
template <class T, class A> BN_INLINE bool row_by_row(const Chunk& chunk) {
  constexpr std::int64_t coefs = kCoefs * sizeof(A), cache = 24 * 1024;
  return chunk.stream || (sizeof(T) == sizeof(A) && has_long_rows<T>(chunk) && chunk.length * coefs <= cache);
}

// The prefetch distance into the first-level cache.
template <class T> BN_INLINE std::int64_t l1_distance_channels_last(const Chunk& chunk) {
  constexpr std::int64_t distance = kL1PrefetchBytes / static_cast<std::int64_t>(sizeof(T));
  if (chunk.stream) return distance;
  const std::int64_t rows = kSharedRows * chunk.row_stride;
  return has_long_rows<T>(chunk) ? distance / 4 : rows > distance ? rows : distance;
}

// The prefetch distance into the second-level cache: beyond the rows that share coefficients and beyond the distance
// above. The second-level cache is fast enough for values that are read, unless the outputs are streamed. The cache
// line of a value that is written must be in the first-level cache.
template <class T> BN_INLINE std::int64_t l2_distance_channels_last(const Chunk& chunk) {
  constexpr std::int64_t distance = kL2PrefetchBytes / static_cast<std::int64_t>(sizeof(T));
  const std::int64_t minimum = kSharedRows * chunk.row_stride + l1_distance_channels_last<T>(chunk);
  return minimum > distance ? minimum : distance;
}

// Calls column(c, access) for all columns of a row.
template <class T, class A, class F> BN_INLINE void for_each_column(std::int64_t length, const F& column) {
  constexpr int w = lanes<A>(), vectors = MainAccess<T, A>::vectors;
  std::int64_t c = 0;
  for (; c + vectors * w <= length; c += vectors * w) column(c, MainAccess<T, A>{});
  if constexpr (vectors > 1)
    for (; c + w <= length; c += w) column(c, FullVector{});
  if (c < length) column(c, PartialVector{static_cast<int>(length - c)});
}

}  // namespace BN_ISA
}  // namespace bn
