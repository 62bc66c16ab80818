// One step of each operation: load, compute, and store or add. The loops around the steps are in loops.h.
#pragma once

#include "activation.h"
#include "iteration_channels_last.h"
#include "iteration_contiguous.h"

namespace bn {
namespace BN_ISA {

template <class A> struct Coefs {
  V<A> center, scale, shift, slope, offset;
};
// Contiguous: one channel's coefficients, the same for all vectors of a step.
template <class A> struct CoefsContiguous {
  Coefs<A> channel;
  BN_INLINE const Coefs<A>& of(int) const { return channel; }
};
template <class A> BN_INLINE CoefsContiguous<A> load_coefs_contiguous(const Chunk& chunk, std::int64_t channel) {
  const A* c = static_cast<const A*>(chunk.coefs) + channel;
  return {{broadcast(c[Coef::center * chunk.coef_stride]), broadcast(c[Coef::scale * chunk.coef_stride]),
           broadcast(c[Coef::shift * chunk.coef_stride]), broadcast(c[Coef::slope * chunk.coef_stride]),
           broadcast(c[Coef::offset * chunk.coef_stride])}};
}
// Channels last: the coefficients of a step's columns, from `column` on.
template <class A, int vectors> struct CoefsChannelsLast {
  Coefs<A> each[vectors];
  BN_INLINE const Coefs<A>& of(int index) const { return each[index]; }
};
template <class A, class Access>
BN_INLINE CoefsChannelsLast<A, Access::vectors> load_coefs_channels_last(const Chunk& chunk, std::int64_t column,
                                                                         Access access) {
  const auto coef_access = access.coef_access();  // even and odd columns: two full vectors, see reorder_even_odd
  const std::int64_t stride = chunk.coef_stride;
  CoefsChannelsLast<A, Access::vectors> coefs;
  unroll<Access::vectors>([&](auto k) BN_ALWAYS {
    const A* c = static_cast<const A*>(chunk.coefs) + column + k * lanes<A>();
    coefs.each[k] = {coef_access.template load<A, A>(c), coef_access.template load<A, A>(c + stride),
                     coef_access.template load<A, A>(c + 2 * stride), coef_access.template load<A, A>(c + 3 * stride),
                     coef_access.template load<A, A>(c + 4 * stride)};
  });
  return coefs;
}

template <class T, class A, Variant variant> struct VectorStep {
  using X = V<A>;

  static BN_INLINE const T* at(const void* base, std::int64_t i) { return static_cast<const T*>(base) + i; }
  static BN_INLINE T* at(void* base, std::int64_t i) { return static_cast<T*>(base) + i; }

  static constexpr bool is_generic = variant == generic || variant == generic_masked;
  static BN_INLINE bool reads_residual(const Chunk& chunk) {
    return variant == relu_residual || (is_generic && chunk.residual);
  }
  static BN_INLINE bool writes_out(const Chunk& chunk) { return !is_generic || chunk.out; }
  static BN_INLINE bool writes_grad_residual(const Chunk& chunk) {
    return variant == relu_residual || (is_generic && chunk.grad_residual);
  }

  // Prefetches into the first-level cache what this loop will soon read or write.
  static BN_INLINE void prefetch_read(const Chunk& chunk, std::int64_t i, std::int64_t distance, bool backward) {
    prefetch_l1(at(chunk.x, i), distance);
    if (backward) prefetch_l1(at(chunk.grad, i), distance);
    if (reads_residual(chunk)) prefetch_l1(at(chunk.residual, i), distance);
  }
  static BN_INLINE void prefetch_write(const Chunk& chunk, std::int64_t i, std::int64_t distance, bool backward) {
    if (writes_out(chunk)) prefetch_l1_write(at(chunk.out, i), distance);
    if (backward && writes_grad_residual(chunk)) prefetch_l1_write(at(chunk.grad_residual, i), distance);
  }
  // Prefetches into the second-level cache what this loop, or the passes of the next item, will need later. This
  // includes values that will be written: the first-level cache alone cannot wait for as many lines as memory needs
  // requests.
  template <bool contiguous> static BN_INLINE void prefetch_later(const Chunk& chunk, std::int64_t i, bool backward) {
    prefetch_l2(at(chunk.x, i), chunk.l2_distance);
    if (backward) prefetch_l2(at(chunk.grad, i), chunk.l2_distance);
    if (reads_residual(chunk)) prefetch_l2(at(chunk.residual, i), chunk.l2_distance);
    // the first pass of a fused kernel has already prefetched the outputs (prefetch_outputs): memory had less to do
    // then
    const bool prefetched = contiguous && chunk.next_row < 0;
    if (chunk.stream || prefetched) return;
    if (writes_out(chunk)) prefetch_l2(at(chunk.out, i), chunk.l2_distance);
    if (backward && writes_grad_residual(chunk)) prefetch_l2(at(chunk.grad_residual, i), chunk.l2_distance);
  }
  // Prefetches what the next pass will write.
  static BN_INLINE void prefetch_outputs(const Chunk& chunk, std::int64_t i) {
    if (chunk.out) prefetch_l2(at(chunk.out, i), 0);
    if (chunk.grad_residual) prefetch_l2(at(chunk.grad_residual, i), 0);
  }
  template <int vectors> static BN_INLINE void prefetch_tile(const Chunk& chunk, std::int64_t i) {
    prefetch_tile_row<T, A, vectors>(at(chunk.x, 0), i);
    prefetch_tile_row<T, A, vectors>(at(chunk.grad, 0), i);
    if (reads_residual(chunk)) prefetch_tile_row<T, A, vectors>(at(chunk.residual, 0), i);
  }

  // z. The forward and the backward use this same expression, so the activation's derivative sees the z of the output.
  template <class Access>
  static BN_INLINE X preactivation(const Chunk& chunk, const Coefs<A>& c, X centered, std::int64_t i, Access access) {
    X z = centered * c.scale + c.shift;
    if (reads_residual(chunk)) z += access.template load<T, A>(at(chunk.residual, i));
    return z;
  }

  template <class C, class Access>
  static BN_INLINE void apply(const Chunk& chunk, const C& coefs, std::int64_t i, Access access) {
    X out[Access::vectors];
    access.for_each([&](auto vector) BN_ALWAYS {
      const Coefs<A>& c = coefs.of(vector.index);
      X z = preactivation(chunk, c, vector.template load<T, A>(at(chunk.x, i)) - c.center, i, vector);
      if (variant == relu || variant == relu_residual) z = max_with_zero(z);
      if (is_generic) z = activate<A>(chunk.activation, z, static_cast<A>(chunk.negative_slope));
      out[vector.index] = z;
    });
    access.template store<T, A>(at(chunk.out, i), out, chunk.stream);
  }

  static BN_INLINE bool in_place(const Chunk& chunk) { return variant == generic && chunk.undo_slope != 0; }
  // x, or z where x contains outputs.
  template <class Access> static BN_INLINE X load_x(const Chunk& chunk, std::int64_t i, Access access) {
    const X x = access.template load<T, A>(at(chunk.x, i));
    if (!in_place(chunk)) return x;
    return x < 0 ? x * static_cast<A>(chunk.undo_slope) : x;
  }

  template <class Access>
  static BN_INLINE X load_dz(const Chunk& chunk, const Coefs<A>& c, X x, X centered, std::int64_t i, Access access) {
    X grad = access.template load<T, A>(at(chunk.grad, i));
    if (variant == plain) return grad;
    pin_load(grad);
    const X z = in_place(chunk) ? x : preactivation(chunk, c, centered, i, access);
    const Activation activation = variant == relu || variant == relu_residual ? Activation::relu : chunk.activation;
    return activate_backward<A>(activation, z, grad, static_cast<A>(chunk.negative_slope));
  }

  // Padding that holds NaN or Inf contributes nothing to the sums and gets no gradient. It is excluded by a comparison:
  // a product with zero would be NaN.
  static BN_INLINE M<A> contributes(M<A> valid, X centered) { return valid | (centered - centered == 0); }

  // Adds to sums[vector of the step], which holds the two sums.
  template <class C, class Access>
  static BN_INLINE void reduce(const Chunk& chunk, const C& coefs, M<A> valid, std::int64_t i, Access access,
                               X (*sums)[2]) {
    access.for_each([&](auto vector) BN_ALWAYS {
      const Coefs<A>& c = coefs.of(vector.index);
      const X x = load_x(chunk, i, vector);
      X centered = x - c.center;
      X dz = vector.template select<A>(load_dz(chunk, c, x, centered, i, vector), X{});
      centered = vector.template select<A>(centered, X{});
      if (variant == generic_masked) {
        const M<A> use = contributes(valid, centered);
        dz = use ? dz : X{};
        centered = use ? centered : X{};
      }
      sums[vector.index][0] += dz;
      sums[vector.index][1] += dz * centered;
    });
  }

  template <class C, class Access>
  static BN_INLINE void elemt(const Chunk& chunk, const C& coefs, M<A> valid, std::int64_t i, Access access) {
    X dx[Access::vectors], dr[Access::vectors];
    access.for_each([&](auto vector) BN_ALWAYS {
      const Coefs<A>& c = coefs.of(vector.index);
      const X x = load_x(chunk, i, vector), centered = x - c.center;
      X dz = load_dz(chunk, c, x, centered, i, vector);
      X through_moments = centered * c.slope + c.offset;
      if (variant == generic_masked) {
        dz = contributes(valid, centered) ? dz : X{};
        through_moments = valid ? through_moments : X{};
      }
      dx[vector.index] = dz * c.scale + through_moments;
      dr[vector.index] = dz;
    });
    if (writes_out(chunk)) access.template store<T, A>(at(chunk.out, i), dx, chunk.stream);
    if (writes_grad_residual(chunk)) access.template store<T, A>(at(chunk.grad_residual, i), dr, chunk.stream);
  }
};

// Calls step(i, row, coefficients, access) for `rows` rows at a time of a channels-last chunk, from row r on. Returns
// the first row that remains.
template <int rows, class T, class A, class F>
BN_INLINE std::int64_t for_each_rows(const Chunk& chunk, std::int64_t r, const F& step) {
  for (; r + rows <= chunk.rows; r += rows) {
    const std::int64_t start = r * chunk.row_stride;
    for_each_column<T, A>(chunk.length, [&](std::int64_t c, auto access) BN_ALWAYS {
      const auto coefs = load_coefs_channels_last<A>(chunk, c, access);
      unroll<rows>([&](auto k) BN_ALWAYS { step(start + k * chunk.row_stride + c, r + k, coefs, access); });
    });
  }
  return r;
}

// The same for all rows of the chunk, as far as possible in the order of memory.
template <class T, class A, class F> BN_INLINE void for_each_step_channels_last(const Chunk& chunk, const F& step) {
  const std::int64_t first = row_by_row<T, A>(chunk) ? 0 : for_each_rows<kSharedRows, T, A>(chunk, 0, step);
  for_each_rows<1, T, A>(chunk, first, step);
}

}  // namespace BN_ISA
}  // namespace bn
