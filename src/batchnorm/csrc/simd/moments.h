// The sums of the moments, and the conversions of arrays to and from float64.
#pragma once

#include "reductions.h"

namespace bn {
namespace BN_ISA {

template <class T> void to_float64_all(const void* x, std::int64_t n, std::int64_t stride, double* out) {
  const T* values = static_cast<const T*>(x);
  if (stride == 1)
    for (std::int64_t i = 0; i < n; ++i) out[i] = to_double(values[i]);
  else
    for (std::int64_t i = 0; i < n; ++i) out[i] = to_double(values[i * stride]);
}

template <class T> void from_float64_all(const double* x, std::int64_t n, void* out) {
  for (std::int64_t i = 0; i < n; ++i) from_double(static_cast<T*>(out)[i], x[i]);
}

template <class T, class A> struct Moments {
  // x - shift is computed in float64. For float32 values of similar size the difference and its square are exact there.
  // 16-bit data need no shift: their squares have 22 bits or less, so the sums of a chunk are exact (docs/kernels.md).
  static constexpr bool shifts = sizeof(T) > 2;
  struct Sums {
    Doubles sum = {}, square = {};
    BN_INLINE void add_vector(Doubles x, Doubles shift) {
      const Doubles d = shifts ? Doubles{x.a - shift.a, x.b - shift.b} : x;
      add(sum, d);
      add_product(square, d, d);
    }
  };

  static BN_INLINE Doubles load(const T* x, FullVector) { return load_as_doubles<A>(x); }
  static BN_INLINE Doubles load(const T* x, PartialVector access) { return doubles(access.template load<T, A>(x)); }

  // Adds one contiguous row to sums[0] and sums[1]. There are two sets of sums to hide the latency of an addition. A
  // lane that does not count (padding, or after the end of the row) is set to the shift, so it adds nothing. The shift
  // is exact in A: it is a value of the data, or a float64 mean of float64 data.
  template <bool masked>
  static BN_INLINE void add_row(const Chunk& chunk, std::int64_t start, std::int64_t mask, const Prefetch& prefetch,
                                double shift, Sums* sums) {
    constexpr int w = lanes<A>();
    const Doubles shifts_float64 = {broadcast(shift), sizeof(A) == 4 ? broadcast(shift) : VD{}};  // double has no b
    const V<A> neutral = broadcast(static_cast<A>(shift));
    const T* x = static_cast<const T*>(chunk.x) + start;
    const auto read = [&](std::int64_t i, std::int64_t distance, auto access) BN_ALWAYS {
      prefetch_l1(x + i, distance);
      if (chunk.out) prefetch_l2(static_cast<const T*>(chunk.out) + start, i);
      if constexpr (masked || std::is_same_v<decltype(access), PartialVector>) {
        V<A> v = access.template load<T, A>(x + i);
        if constexpr (shifts) v = access.template select<A>(v, neutral);
        if constexpr (masked) v = load_valid_mask<A>(chunk.valid_mask + mask + i, access) ? v : neutral;
        return doubles(v);
      } else {
        return load_as_doubles<A>(x + i);
      }
    };
    Sums first = sums[0], second = sums[1];
    std::int64_t i = 0, stop = prefetch.switch_at, distance = prefetch.distance;
    for (int section = 0; section < 2; ++section, stop = chunk.length, distance = prefetch.tail_distance)
      for (; i + 2 * w <= stop; i += 2 * w) {
        first.add_vector(read(i, distance, FullVector{}), shifts_float64);
        second.add_vector(read(i + w, distance, FullVector{}), shifts_float64);
      }
    if (i + w <= chunk.length) {
      first.add_vector(read(i, distance, FullVector{}), shifts_float64);
      i += w;
    }
    if (i < chunk.length)
      second.add_vector(read(i, distance, PartialVector{static_cast<int>(chunk.length - i)}), shifts_float64);
    sums[0] = first;
    sums[1] = second;
  }

  static void contiguous(const Chunk& original, const double* shift, double* sum, double* square) {
    const Chunk chunk = original;
    const Prefetch prefetch = prefetch_row<T>(chunk);
    Sums sums[kMaxItemChannels][2];
    for_each_row_group(chunk, [&](std::int64_t r, std::int64_t end, std::int64_t k) BN_ALWAYS {
      Sums group[2] = {sums[k][0], sums[k][1]};
      for (; r < end; ++r) {
        const std::int64_t start = r * chunk.row_stride + k * chunk.channel_stride, mask = r * chunk.mask_stride;
        const double row_shift = shifts ? shift[k] : 0;
        if (chunk.valid_mask) add_row<true>(chunk, start, mask, prefetch, row_shift, group);
        else add_row<false>(chunk, start, mask, prefetch, row_shift, group);
      }
      sums[k][0] = group[0];
      sums[k][1] = group[1];
    });
    for (std::int64_t k = 0; k < chunk.channels; ++k) {
      add(sums[k][0].sum, sums[k][1].sum);
      add(sums[k][0].square, sums[k][1].square);
      sum[k] = sum_lanes(sums[k][0].sum);
      square[k] = sum_lanes(sums[k][0].square);
    }
  }

  static void channels_last(const Chunk& original, const double* shift, double* sum, double* square) {
    const Chunk chunk = original;
    constexpr int w = lanes<A>();
    for_each_tile<T, A, FullVector>(chunk, [&](std::int64_t c, std::int64_t r0, std::int64_t r1, auto vectors,
                                               auto access, std::int64_t prefetch) BN_ALWAYS {
      Doubles column_shifts[vectors];
      Sums sums[vectors];
      unroll<vectors>([&](auto k) BN_ALWAYS {
        column_shifts[k] = shifts ? load_doubles<A>(shift + c + k * w, access) : Doubles{};
      });
      const T* x = static_cast<const T*>(chunk.x);
      for (std::int64_t r = r0; r < r1; ++r, prefetch += vectors * w) {
        if (chunk.prefetch) prefetch_tile_row<T, A, vectors>(x, prefetch);
        if (chunk.valid_mask && !chunk.valid_mask[r]) continue;
        unroll<vectors>([&](auto k) BN_ALWAYS {
          sums[k].add_vector(load(x + r * chunk.row_stride + c + k * w, access), column_shifts[k]);
        });
      }
      // the sums of the tile first: one sum over all rows of a long column would cost float64 data a digit
      unroll<vectors>([&](auto k) BN_ALWAYS {
        accumulate<A>(sum + c + k * w, sums[k].sum, access);
        accumulate<A>(square + c + k * w, sums[k].square, access);
      });
    });
    if constexpr (std::is_same_v<T, bf16> && std::is_same_v<A, float>) {  // the order of load_as_doubles
      reorder_even_odd<w / 2>(sum, chunk.length, true);
      reorder_even_odd<w / 2>(square, chunk.length, true);
    }
  }
};

}  // namespace BN_ISA
}  // namespace bn
