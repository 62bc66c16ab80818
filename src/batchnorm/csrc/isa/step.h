// One vector's worth of each operation: load, compute, store or add up. The loops around them are in loops.h.
#pragma once

namespace bn {
namespace BN_ISA {

template <class A> struct Coefs {
  V<A> center, scale, shift, slope, offset;
};
template <class A> BN_INLINE Coefs<A> coefs_line(const Slab& s, std::int64_t channel) {
  const A* c = static_cast<const A*>(s.coef) + channel;
  return {spread(c[Coef::center * s.coef_width]), spread(c[Coef::scale * s.coef_width]),
          spread(c[Coef::shift * s.coef_width]), spread(c[Coef::slope * s.coef_width]),
          spread(c[Coef::offset * s.coef_width])};
}
template <class A, class Lanes> BN_INLINE Coefs<A> coefs_grid(const Slab& s, std::int64_t at, Lanes mem) {
  const A* c = static_cast<const A*>(s.coef) + at;
  const std::int64_t width = s.coef_width;
  return {mem.template load<A, A>(c), mem.template load<A, A>(c + width), mem.template load<A, A>(c + 2 * width),
          mem.template load<A, A>(c + 3 * width), mem.template load<A, A>(c + 4 * width)};
}

template <class T, class A, Variant kind> struct Step {
  using X = V<A>;

  static BN_INLINE const T* at(const void* base, std::int64_t i) { return static_cast<const T*>(base) + i; }
  static BN_INLINE T* at(void* base, std::int64_t i) { return static_cast<T*>(base) + i; }

  static BN_INLINE bool reads_residual(const Slab& s) {
    return kind == relu_residual || ((kind == any || kind == any_masked) && s.residual);
  }
  // `far` values from here stands what this loop will want soon.
  static BN_INLINE void prefetch(const Slab& s, std::int64_t i, std::int64_t far, bool backward) {
    ahead(at(s.x, i), far);
    if (backward) ahead(at(s.grad, i), far);
    if (reads_residual(s)) ahead(at(s.residual, i), far);
  }
  // `s.next` values from here stands what the next item's first pass will want.
  static BN_INLINE void prefetch_next(const Slab& s, std::int64_t i, bool backward) {
    far_ahead(at(s.x, i), s.next);
    if (backward) far_ahead(at(s.grad, i), s.next);
    if (backward && reads_residual(s)) far_ahead(at(s.residual, i), s.next);
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

  template <class Lanes> static BN_INLINE void apply(const Slab& s, const Coefs<A>& c, std::int64_t i, Lanes mem) {
    X z = affine(s, c, mem.template load<T, A>(at(s.x, i)) - c.center, i, mem);
    if (kind == relu || kind == relu_residual) z = rectified(z);
    if (kind == any || kind == any_masked) z = activate<A>(s.act, z, static_cast<A>(s.negative_slope));
    mem.template store<T, A>(at(s.out, i), z, s.stream);
  }

  template <class Lanes>
  static BN_INLINE X grad_affine(const Slab& s, const Coefs<A>& c, X centered, std::int64_t i, Lanes mem) {
    X grad = mem.template load<T, A>(at(s.grad, i));
    if (kind == plain) return grad;
    loaded(grad);
    const X z = affine(s, c, centered, i, mem);
    const Act act = kind == relu || kind == relu_residual ? Act::relu : s.act;
    return activate_backward<A>(act, z, grad, static_cast<A>(s.negative_slope));
  }

  // Padding that holds NaN or Inf gives nothing and receives nothing: chosen, never multiplied.
  static BN_INLINE M<A> sound(M<A> real, X centered) { return real | (centered - centered == 0); }

  template <class Lanes>
  static BN_INLINE void reduce(const Slab& s, const Coefs<A>& c, M<A> real, std::int64_t i, Lanes mem, X* part) {
    X centered = mem.template load<T, A>(at(s.x, i)) - c.center;
    X dz = mem.template keep<A>(grad_affine(s, c, centered, i, mem), X{});
    centered = mem.template keep<A>(centered, X{});
    if (kind == any_masked) {
      const M<A> use = sound(real, centered);
      dz = use ? dz : X{};
      centered = use ? centered : X{};
    }
    part[0] += dz;
    part[1] += dz * centered;
  }

  template <class Lanes>
  static BN_INLINE void elemt(const Slab& s, const Coefs<A>& c, M<A> real, std::int64_t i, Lanes mem) {
    const X centered = mem.template load<T, A>(at(s.x, i)) - c.center;
    X dz = grad_affine(s, c, centered, i, mem);
    X through = centered * c.slope + c.offset;  // what reaches x through mean and var
    if (kind == any_masked) {
      dz = sound(real, centered) ? dz : X{};
      through = real ? through : X{};
    }
    if (kind != any && kind != any_masked) {
      mem.template store<T, A>(at(s.out, i), (dz - through) * c.scale, s.stream);
      if (kind == relu_residual) mem.template store<T, A>(at(s.grad_residual, i), dz, s.stream);
      return;
    }
    if (s.out) mem.template store<T, A>(at(s.out, i), (dz - through) * c.scale, s.stream);
    if (s.grad_residual) mem.template store<T, A>(at(s.grad_residual, i), dz, s.stream);
  }
};

}  // namespace BN_ISA
}  // namespace bn
