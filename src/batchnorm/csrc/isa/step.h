// One step's worth of each operation: load, compute, store or add up. The loops around them are in loops.h.
#pragma once

namespace bn {
namespace BN_ISA {

template <class A> struct Coefs {
  V<A> center, scale, shift, slope, offset;
};
// A line's: the same for each vector of a step.
template <class A> struct LineCoefs {
  Coefs<A> all;
  BN_INLINE const Coefs<A>& of(int) const { return all; }
};
template <class A> BN_INLINE LineCoefs<A> coefs_line(const Slab& s, std::int64_t channel) {
  const A* c = static_cast<const A*>(s.coef) + channel;
  return {{spread(c[Coef::center * s.coef_width]), spread(c[Coef::scale * s.coef_width]),
           spread(c[Coef::shift * s.coef_width]), spread(c[Coef::slope * s.coef_width]),
           spread(c[Coef::offset * s.coef_width])}};
}
// A grid's: a step's columns from `at` on.
template <class A, int units> struct GridCoefs {
  Coefs<A> each[units];
  BN_INLINE const Coefs<A>& of(int index) const { return each[index]; }
};
template <class A, class Lanes> BN_INLINE GridCoefs<A, Lanes::units> coefs_grid(const Slab& s, std::int64_t at, Lanes mem) {
  const auto way = mem.one();  // a Pair's stand as two whole vectors: in_pairs
  const std::int64_t width = s.coef_width;
  GridCoefs<A, Lanes::units> found;
  unrolled<Lanes::units>([&](auto k) BN_ALWAYS {
    const A* c = static_cast<const A*>(s.coef) + at + k * lanes<A>();
    found.each[k] = {way.template load<A, A>(c), way.template load<A, A>(c + width), way.template load<A, A>(c + 2 * width),
                     way.template load<A, A>(c + 3 * width), way.template load<A, A>(c + 4 * width)};
  });
  return found;
}

template <class T, class A, Variant kind> struct Step {
  using X = V<A>;

  static BN_INLINE const T* at(const void* base, std::int64_t i) { return static_cast<const T*>(base) + i; }
  static BN_INLINE T* at(void* base, std::int64_t i) { return static_cast<T*>(base) + i; }

  static constexpr bool general = kind == any || kind == any_masked;
  static BN_INLINE bool reads_residual(const Slab& s) {
    return kind == relu_residual || (general && s.residual);
  }
  static BN_INLINE bool writes_out(const Slab& s) { return !general || s.out; }  // of the two one may be missing
  static BN_INLINE bool writes_grad_residual(const Slab& s) { return kind == relu_residual || (general && s.grad_residual); }

  // `far` values from here stands what this loop will want soon, to read or to write.
  static BN_INLINE void prefetch_read(const Slab& s, std::int64_t i, std::int64_t far, bool backward) {
    ahead(at(s.x, i), far);
    if (backward) ahead(at(s.grad, i), far);
    if (reads_residual(s)) ahead(at(s.residual, i), far);
  }
  static BN_INLINE void prefetch_write(const Slab& s, std::int64_t i, std::int64_t far, bool backward) {
    if (writes_out(s)) ahead_to_write(at(s.out, i), far);
    if (backward && writes_grad_residual(s)) ahead_to_write(at(s.grad_residual, i), far);
  }
  // `s.next` values from here stands what this loop or the next item's passes will want later. Lines to be written are
  // fetched like the others: memory takes longer to bring them than one cache has requests to wait with.
  template <bool line> static BN_INLINE void prefetch_next(const Slab& s, std::int64_t i, bool backward) {
    far_ahead(at(s.x, i), s.next);
    if (backward) far_ahead(at(s.grad, i), s.next);
    if (reads_residual(s)) far_ahead(at(s.residual, i), s.next);
    const bool fetched = line && s.turn < 0;  // a fused kernel's first pass did it, when memory had less to do
    if (s.stream || fetched) return;
    if (writes_out(s)) far_ahead(at(s.out, i), s.next);
    if (backward && writes_grad_residual(s)) far_ahead(at(s.grad_residual, i), s.next);
  }
  // What the pass after this one writes.
  static BN_INLINE void prefetch_out(const Slab& s, std::int64_t i) {
    if (s.out) far_ahead(at(s.out, i), 0);
    if (s.grad_residual) far_ahead(at(s.grad_residual, i), 0);
  }
  template <int columns> static BN_INLINE void prefetch_row(const Slab& s, std::int64_t i) {
    ahead_row<T, A, columns>(at(s.x, 0), i);
    ahead_row<T, A, columns>(at(s.grad, 0), i);
    if (reads_residual(s)) ahead_row<T, A, columns>(at(s.residual, 0), i);
  }

  // z, by the same expression forward and backward: the activation's derivative sees the z that the output saw.
  template <class Lanes>
  static BN_INLINE X affine(const Slab& s, const Coefs<A>& c, X centered, std::int64_t i, Lanes mem) {
    X z = centered * c.scale + c.shift;
    if (reads_residual(s)) z += mem.template load<T, A>(at(s.residual, i));
    return z;
  }

  template <class C, class Lanes> static BN_INLINE void apply(const Slab& s, const C& coefs, std::int64_t i, Lanes mem) {
    X out[Lanes::units];
    mem.each([&](auto way) BN_ALWAYS {
      const Coefs<A>& c = coefs.of(way.index);
      X z = affine(s, c, way.template load<T, A>(at(s.x, i)) - c.center, i, way);
      if (kind == relu || kind == relu_residual) z = rectified(z);
      if (kind == any || kind == any_masked) z = activate<A>(s.act, z, static_cast<A>(s.negative_slope));
      out[way.index] = z;
    });
    mem.template store<T, A>(at(s.out, i), out, s.stream);
  }

  static BN_INLINE bool in_place(const Slab& s) { return kind == any && s.restore != 0; }
  // x, or z again where its activation stands in its place.
  template <class Lanes> static BN_INLINE X value(const Slab& s, std::int64_t i, Lanes mem) {
    const X x = mem.template load<T, A>(at(s.x, i));
    if (!in_place(s)) return x;
    return x < 0 ? x * static_cast<A>(s.restore) : x;
  }

  template <class Lanes>
  static BN_INLINE X grad_affine(const Slab& s, const Coefs<A>& c, X value, X centered, std::int64_t i, Lanes mem) {
    X grad = mem.template load<T, A>(at(s.grad, i));
    if (kind == plain) return grad;
    loaded(grad);
    const X z = in_place(s) ? value : affine(s, c, centered, i, mem);
    const Act act = kind == relu || kind == relu_residual ? Act::relu : s.act;
    return activate_backward<A>(act, z, grad, static_cast<A>(s.negative_slope));
  }

  // Padding that holds NaN or Inf gives nothing and receives nothing: chosen, never multiplied.
  static BN_INLINE M<A> sound(M<A> real, X centered) { return real | (centered - centered == 0); }

  // part[vector of the step] holds the two sums
  template <class C, class Lanes>
  static BN_INLINE void reduce(const Slab& s, const C& coefs, M<A> real, std::int64_t i, Lanes mem, X (*part)[2]) {
    mem.each([&](auto way) BN_ALWAYS {
      const Coefs<A>& c = coefs.of(way.index);
      const X x = value(s, i, way);
      X centered = x - c.center;
      X dz = way.template keep<A>(grad_affine(s, c, x, centered, i, way), X{});
      centered = way.template keep<A>(centered, X{});
      if (kind == any_masked) {
        const M<A> use = sound(real, centered);
        dz = use ? dz : X{};
        centered = use ? centered : X{};
      }
      part[way.index][0] += dz;
      part[way.index][1] += dz * centered;
    });
  }

  template <class C, class Lanes>
  static BN_INLINE void elemt(const Slab& s, const C& coefs, M<A> real, std::int64_t i, Lanes mem) {
    X dx[Lanes::units], dr[Lanes::units];
    mem.each([&](auto way) BN_ALWAYS {
      const Coefs<A>& c = coefs.of(way.index);
      const X x = value(s, i, way), centered = x - c.center;
      X dz = grad_affine(s, c, x, centered, i, way);
      X through = centered * c.slope + c.offset;  // what reaches x through mean and var
      if (kind == any_masked) {
        dz = sound(real, centered) ? dz : X{};
        through = real ? through : X{};
      }
      dx[way.index] = dz * c.scale + through;
      dr[way.index] = dz;
    });
    if (writes_out(s)) mem.template store<T, A>(at(s.out, i), dx, s.stream);
    if (writes_grad_residual(s)) mem.template store<T, A>(at(s.grad_residual, i), dr, s.stream);
  }
};

}  // namespace BN_ISA
}  // namespace bn
