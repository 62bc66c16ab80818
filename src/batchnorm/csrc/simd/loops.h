// The loops over one chunk, for both layouts. The order of the additions depends on the shape of the chunk alone and
// never on an address, so results repeat bit for bit.
#pragma once

#include "reductions.h"
#include "vector_step.h"

namespace bn {
namespace BN_ISA {

template <class T, class A, Variant variant> struct Loops {
  using Step = VectorStep<T, A, variant>;
  // A contiguous valid_mask has a byte a value in the order of memory, so its values are not separated into even and
  // odd.
  using RowAccess = std::conditional_t<variant == generic_masked, FullVector, MainAccess<T, A>>;

  template <class Access> static BN_INLINE M<A> valid_contiguous(const Chunk& chunk, std::int64_t i, Access access) {
    if constexpr (variant == generic_masked) return load_valid_mask<A>(chunk.valid_mask + i, access);
    return M<A>{};
  }
  static BN_INLINE M<A> valid_channels_last(const Chunk& chunk, std::int64_t r) {
    return variant == generic_masked && chunk.valid_mask[r] ? ~M<A>{} : M<A>{};
  }

  // Each loop copies its chunk: no store can change the copy, so the compiler can keep its fields in registers.

  static void apply_contiguous(const Chunk& original) {
    const Chunk chunk = original;
    const Prefetch row_prefetch = prefetch_row<T>(chunk);
    for_each_row(chunk, [&](std::int64_t start, std::int64_t mask, std::int64_t k) BN_ALWAYS {
      const auto coefs = load_coefs_contiguous<A>(chunk, k);
      const auto step = [&](std::int64_t i, std::int64_t, std::int64_t distance, auto access) BN_ALWAYS {
        if (chunk.prefetch) {
          Step::prefetch_read(chunk, i, distance, false);
          if (!chunk.stream) Step::prefetch_write(chunk, i, distance, false);
          if (chunk.l2_distance) Step::template prefetch_later<true>(chunk, i, false);
        }
        Step::apply(chunk, coefs, i, access);
      };
      for_each_vector<T, A, RowAccess>(chunk, start, mask, prefetch_channels<T>(chunk, k, row_prefetch), step);
    });
  }
  static void apply_channels_last(const Chunk& original) {
    Chunk chunk = original;
    chunk.l2_distance = l2_distance_channels_last<T>(chunk);
    const std::int64_t distance = l1_distance_channels_last<T>(chunk);
    const auto step = [&](std::int64_t i, std::int64_t, const auto& coefs, auto access) BN_ALWAYS {
      if (chunk.prefetch) {
        if (chunk.stream) Step::prefetch_read(chunk, i, distance, false);
        else Step::prefetch_write(chunk, i, distance, false);
        Step::template prefetch_later<false>(chunk, i, false);
      }
      Step::apply(chunk, coefs, i, access);
    };
    for_each_step_channels_last<T, A>(chunk, step);
  }
  static void backward_elemt_contiguous(const Chunk& original) {
    const Chunk chunk = original;
    const Prefetch row_prefetch = prefetch_row<T>(chunk);
    for_each_row(chunk, [&](std::int64_t start, std::int64_t mask, std::int64_t k) BN_ALWAYS {
      const auto coefs = load_coefs_contiguous<A>(chunk, k);
      const auto step = [&](std::int64_t i, std::int64_t m, std::int64_t distance, auto access) BN_ALWAYS {
        if (chunk.prefetch) {
          Step::prefetch_read(chunk, i, distance, true);
          if (!chunk.stream) Step::prefetch_write(chunk, i, distance, true);
          if (chunk.l2_distance) Step::template prefetch_later<true>(chunk, i, true);
        }
        Step::elemt(chunk, coefs, valid_contiguous(chunk, m, access), i, access);
      };
      for_each_vector<T, A, RowAccess>(chunk, start, mask, prefetch_channels<T>(chunk, k, row_prefetch), step);
    });
  }
  static void backward_elemt_channels_last(const Chunk& original) {
    Chunk chunk = original;
    chunk.l2_distance = l2_distance_channels_last<T>(chunk);
    const std::int64_t distance = l1_distance_channels_last<T>(chunk);
    const auto step = [&](std::int64_t i, std::int64_t r, const auto& coefs, auto access) BN_ALWAYS {
      if (chunk.prefetch) {
        if (chunk.stream) Step::prefetch_read(chunk, i, distance, true);
        else Step::prefetch_write(chunk, i, distance, true);
        Step::template prefetch_later<false>(chunk, i, true);
      }
      Step::elemt(chunk, coefs, valid_channels_last(chunk, r), i, access);
    };
    for_each_step_channels_last<T, A>(chunk, step);
  }

  static bool backward_reduce_contiguous(const Chunk& original, double* sum_dz, double* sum_dz_x) {
    const Chunk chunk = original;
    const Prefetch prefetch = prefetch_row<T>(chunk);
    const auto row = [&](std::int64_t start, std::int64_t mask, std::int64_t k, BlockSums<A, 2>& block) BN_ALWAYS {
      const auto coefs = load_coefs_contiguous<A>(chunk, k);
      const auto step = [&](std::int64_t i, std::int64_t distance, V<A>(*sums)[2], auto access) BN_ALWAYS {
        if (chunk.prefetch) {
          Step::prefetch_read(chunk, start + i, distance, true);
          Step::prefetch_outputs(chunk, start + i);
        }
        Step::reduce(chunk, coefs, valid_contiguous(chunk, mask + i, access), start + i, access, sums);
      };
      reduce_row<A, RowAccess>(chunk.length, prefetch, block, step);
    };
    return reduce_rows<A, 2>(chunk, row, [&](std::int64_t k, const Doubles* totals) BN_ALWAYS {
      sum_dz[k] = sum_lanes(totals[0]);
      sum_dz_x[k] = sum_lanes(totals[1]);
    });
  }

  static bool backward_reduce_channels_last(const Chunk& original, double* sum_dz, double* sum_dz_x) {
    const Chunk chunk = original;
    constexpr int w = lanes<A>();
    M<A> underflow = {};
    const auto tile = [&](std::int64_t column, std::int64_t r0, std::int64_t r1, auto accesses, auto access,
                          std::int64_t prefetch) BN_ALWAYS {
      constexpr int per_access = decltype(access)::vectors, vectors = accesses * per_access;
      CoefsChannelsLast<A, per_access> coefs[accesses];
      V<A> sums[vectors][2] = {};
      unroll<accesses>([&](auto k) BN_ALWAYS {
        coefs[k] = load_coefs_channels_last<A>(chunk, column + k * per_access * w, access);
      });
      for (std::int64_t r = r0; r < r1; ++r, prefetch += vectors * w) {
        if (chunk.prefetch) Step::template prefetch_tile<vectors>(chunk, prefetch);
        unroll<accesses>([&](auto k) BN_ALWAYS {
          Step::reduce(chunk, coefs[k], valid_channels_last(chunk, r),
                       r * chunk.row_stride + column + k * per_access * w, access, sums + k * per_access);
        });
      }
      unroll<vectors>([&](auto k) BN_ALWAYS {
        underflow |= may_have_underflowed(sums[k][0]) | may_have_underflowed(sums[k][1]);
        accumulate<A>(sum_dz + column + k * w, doubles(sums[k][0]), access.coef_access());
        accumulate<A>(sum_dz_x + column + k * w, doubles(sums[k][1]), access.coef_access());
      });
    };
    for_each_tile<T, A, MainAccess<T, A>>(chunk, tile);
    if constexpr (MainAccess<T, A>::vectors > 1) {
      reorder_even_odd<w>(sum_dz, chunk.length, true);
      reorder_even_odd<w>(sum_dz_x, chunk.length, true);
    }
    return !any_lane<A>(underflow);
  }
};

}  // namespace BN_ISA
}  // namespace bn
