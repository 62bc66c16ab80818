// The loops: lines (one channel, coefficients in registers) and grids (a column a channel, coefficients in L1).
// Order of additions depends on the slab's shape alone, never on an address: results repeat bit for bit.
#pragma once

namespace bn {
namespace BN_ISA {

// Values of the head of a run that come before the first aligned vector; 0 where no aligned store is asked for.
template <class T, class A> BN_INLINE std::int64_t unaligned_head(const Slab& s, std::int64_t i) {
  constexpr std::uintptr_t bytes = lanes<A>() * sizeof(T);
  const T* first = static_cast<const T*>(s.out ? s.out : s.grad_residual) + i;
  const std::uintptr_t over = reinterpret_cast<std::uintptr_t>(first) % bytes;
  const std::int64_t head = over ? static_cast<std::int64_t>((bytes - over) / sizeof(T)) : 0;
  return head < s.length ? head : s.length;
}

// Calls step(i, mask index, lanes) over one run that starts at `start`.
template <class T, class A, class F>
BN_INLINE void over_run(const Slab& s, std::int64_t start, std::int64_t mask, const F& step) {
  constexpr int w = lanes<A>();
  std::int64_t i = s.stream ? unaligned_head<T, A>(s, start) : 0;
  if (i) step(start, mask, Part{static_cast<int>(i)});
  for (; i + w <= s.length; i += w) step(start + i, mask + i, Whole{});
  if (i < s.length) step(start + i, mask + i, Part{static_cast<int>(s.length - i)});
}

// Calls run(start, mask index, channel) for each run of a slab of lines, in the order of memory.
template <class F> BN_INLINE void over_runs(const Slab& s, const F& run) {
  for (std::int64_t r = 0; r < s.runs; ++r)
    for (std::int64_t k = 0; k < s.channels; ++k) run(r * s.stride + k * s.channel_stride, r * s.mask_stride, k);
}

// Calls step(i, column, row, lanes) over a grid, in the order of memory.
template <class A, class F> BN_INLINE void over_grid(const Slab& s, const F& step) {
  constexpr int w = lanes<A>();
  for (std::int64_t r = 0; r < s.runs; ++r) {
    const std::int64_t start = r * s.stride;
    std::int64_t c = 0;
    for (; c + w <= s.length; c += w) step(start + c, c, r, Whole{});
    if (c < s.length) step(start + c, c, r, Part{static_cast<int>(s.length - c)});
  }
}

// How far ahead to read: along a long run, else at the same place of the next sample, `stride` away.
constexpr std::int64_t kAheadBytes = 2048;
template <class T> BN_INLINE std::int64_t ahead_line(const Slab& s) {
  constexpr std::int64_t far = kAheadBytes / static_cast<std::int64_t>(sizeof(T));
  return s.length * s.channels >= 2 * far ? far : s.stride;
}

// Rows of a grid that fit in L1 together: sums stay in registers down a column, memory is still read nearly in order.
template <class T> BN_INLINE std::int64_t tile_rows(const Slab& s) {
  const std::int64_t rows = 16384 / (s.length * static_cast<std::int64_t>(sizeof(T)));
  return rows < 4 ? 4 : rows > 128 ? 128 : rows;
}

template <class T> void widen_all(const void* x, std::int64_t n, double* out) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = scalar(static_cast<const T*>(x)[i]);
}

template <class T> void narrow_all(const double* x, std::int64_t n, void* out) {
  for (std::int64_t i = 0; i < n; ++i) assign(static_cast<T*>(out)[i], x[i]);
}

template <class T, class A> struct Moments {
  // x - shift is taken in float64, where it and its square are exact for float32 values of like size.
  static BN_INLINE void step(V<A> x, Doubles shift, Doubles& sum, Doubles& square) {
    const Doubles wide = doubles(x), d = {wide.a - shift.a, wide.b - shift.b};
    add(sum, d);
    add_product(square, d, d);
  }

  struct Sums {
    Doubles sum = {}, square = {}, sum2 = {}, square2 = {};  // two sets: the additions' latency is the bound
  };

  // The shift is a value of the data (or a float64 mean of float64 data), so A holds it exactly: a lane that is left
  // out reads as the shift and adds nothing.
  template <bool masked>
  static BN_INLINE void run(const Slab& s, std::int64_t start, std::int64_t mask, std::int64_t far, double shift, Sums& to) {
    constexpr int w = lanes<A>();
    const Doubles k = {spread(shift), sizeof(A) == 4 ? spread(shift) : VD{}};  // b stands idle for double
    const V<A> neutral = spread(static_cast<A>(shift));
    const T* x = static_cast<const T*>(s.x);
    const auto load = [&](std::int64_t i, auto mem) {
      ahead(x + start + i, far);
      V<A> v = mem.template load<T, A>(x + start + i);
      v = mem.template keep<A>(v, neutral);
      if (masked) v = mask_line<A>(s.mask + mask + i, mem) ? v : neutral;
      return v;
    };
    std::int64_t i = 0;
    for (; i + 2 * w <= s.length; i += 2 * w) {
      step(load(i, Whole{}), k, to.sum, to.square);
      step(load(i + w, Whole{}), k, to.sum2, to.square2);
    }
    for (; i + w <= s.length; i += w) step(load(i, Whole{}), k, to.sum, to.square);
    if (i < s.length) step(load(i, Part{static_cast<int>(s.length - i)}), k, to.sum2, to.square2);
  }

  static void line(const Slab& slab, const double* shift, double* sum, double* square) {
    const Slab s = slab;
    const std::int64_t far = ahead_line<T>(s);
    Sums sums[kMostChannels];
    over_runs(s, [&](std::int64_t start, std::int64_t mask, std::int64_t k) {
      Sums mine = sums[k];  // in registers over the run
      if (s.mask) run<true>(s, start, mask, far, shift[k], mine);
      else run<false>(s, start, mask, far, shift[k], mine);
      sums[k] = mine;
    });
    for (std::int64_t k = 0; k < s.channels; ++k) {
      add(sums[k].sum, sums[k].sum2);
      add(sums[k].square, sums[k].square2);
      sum[k] += total(sums[k].sum);
      square[k] += total(sums[k].square);
    }
  }

  template <class Lanes>
  static BN_INLINE void column(const Slab& s, std::int64_t c, std::int64_t r0, std::int64_t r1, const double* shift,
                               double* sum, double* square, Lanes mem) {
    const std::int64_t next_tile = (r1 - r0) * s.stride;
    const T* x = static_cast<const T*>(s.x) + c;
    const Doubles k = load_doubles<A>(shift);
    Doubles a = {}, b = {};
    for (std::int64_t r = r0; r < r1; ++r)
      if (!s.mask || s.mask[r]) {
        ahead(x + r * s.stride, next_tile);
        step(mem.template load<T, A>(x + r * s.stride), k, a, b);
      }
    // a tile's sums first: a long column added one by one would cost float64 data a digit
    Doubles all_a = load_doubles<A>(sum), all_b = load_doubles<A>(square);
    add(all_a, a);
    add(all_b, b);
    store_doubles<A>(sum, all_a);
    store_doubles<A>(square, all_b);
  }

  static void grid(const Slab& slab, const double* shift, double* sum, double* square) {
    const Slab s = slab;
    constexpr int w = lanes<A>();
    const std::int64_t rows = tile_rows<T>(s), whole = s.length / w * w, rest = s.length - whole;
    double ends[3][w] = {};  // the last few columns, in a full vector's room
    for (std::int64_t i = 0; i < rest; ++i)
      ends[0][i] = shift[whole + i], ends[1][i] = sum[whole + i], ends[2][i] = square[whole + i];
    for (std::int64_t r = 0; r < s.runs; r += rows) {
      const std::int64_t end = r + rows < s.runs ? r + rows : s.runs;
      for (std::int64_t c = 0; c < whole; c += w) column(s, c, r, end, shift + c, sum + c, square + c, Whole{});
      if (rest) column(s, whole, r, end, ends[0], ends[1], ends[2], Part{static_cast<int>(rest)});
    }
    for (std::int64_t i = 0; i < rest; ++i) sum[whole + i] = ends[1][i], square[whole + i] = ends[2][i];
  }
};

template <class T, class A, Variant kind> struct Loops {
  using Do = Step<T, A, kind>;

  template <class Lanes> static BN_INLINE M<A> real_line(const Slab& s, std::int64_t m, Lanes mem) {
    return kind == any_masked ? mask_line<A>(s.mask + m, mem) : M<A>{};
  }
  static BN_INLINE M<A> real_grid(const Slab& s, std::int64_t r) {
    return kind == any_masked && s.mask[r] ? ~M<A>{} : M<A>{};
  }

  static void apply_line(const Slab& slab) {
    const Slab s = slab;  // a copy: its fields can stay in registers across the stores
    const std::int64_t far = ahead_line<T>(s);
    over_runs(s, [&](std::int64_t start, std::int64_t mask, std::int64_t k) {
      const Coefs<A> c = coefs_line<A>(s, k);
      over_run<T, A>(s, start, mask, [&](std::int64_t i, std::int64_t, auto mem) {
        Do::prefetch(s, i, far, false);
        Do::apply(s, c, i, mem);
      });
    });
  }
  static void apply_grid(const Slab& slab) {
    const Slab s = slab;
    over_grid<A>(s, [&](std::int64_t i, std::int64_t c, std::int64_t, auto mem) {
      Do::prefetch(s, i, kAheadBytes / static_cast<std::int64_t>(sizeof(T)), false);
      Do::apply(s, coefs_grid<A>(s, c, mem), i, mem);
    });
  }
  static void elemt_line(const Slab& slab) {
    const Slab s = slab;
    const std::int64_t far = ahead_line<T>(s);
    over_runs(s, [&](std::int64_t start, std::int64_t mask, std::int64_t k) {
      const Coefs<A> c = coefs_line<A>(s, k);
      over_run<T, A>(s, start, mask, [&](std::int64_t i, std::int64_t m, auto mem) {
        Do::prefetch(s, i, far, true);
        Do::elemt(s, c, real_line(s, m, mem), i, mem);
      });
    });
  }
  static void elemt_grid(const Slab& slab) {
    const Slab s = slab;
    over_grid<A>(s, [&](std::int64_t i, std::int64_t c, std::int64_t r, auto mem) {
      Do::prefetch(s, i, kAheadBytes / static_cast<std::int64_t>(sizeof(T)), true);
      Do::elemt(s, coefs_grid<A>(s, c, mem), real_grid(s, r), i, mem);
    });
  }
  static void reduce_line(const Slab& slab, double* sum, double* sum_x) {
    Slab s = slab;
    s.stream = false;  // it writes nothing: no run has to begin at an aligned place
    const std::int64_t far = ahead_line<T>(s);
    Doubles sums[kMostChannels][2] = {};
    over_runs(s, [&](std::int64_t start, std::int64_t mask, std::int64_t k) {
      const Coefs<A> c = coefs_line<A>(s, k);
      Doubles dz = sums[k][0], dz_x = sums[k][1];
      over_run<T, A>(s, start, mask, [&](std::int64_t i, std::int64_t m, auto mem) {
        Do::prefetch(s, i, far, true);
        Do::reduce(s, c, real_line(s, m, mem), i, mem, dz, dz_x);
      });
      sums[k][0] = dz;
      sums[k][1] = dz_x;
    });
    for (std::int64_t k = 0; k < s.channels; ++k) {
      sum[k] += total(sums[k][0]);
      sum_x[k] += total(sums[k][1]);
    }
  }

  template <class Lanes>
  static BN_INLINE void reduce_column(const Slab& s, std::int64_t column, std::int64_t r0, std::int64_t r1, double* sum,
                                      double* sum_x, Lanes mem) {
    const Coefs<A> c = coefs_grid<A>(s, column, mem);
    Doubles dz = {}, dz_x = {};
    const std::int64_t next_tile = (r1 - r0) * s.stride;
    for (std::int64_t r = r0; r < r1; ++r) {
      Do::prefetch(s, r * s.stride + column, next_tile, true);
      Do::reduce(s, c, real_grid(s, r), r * s.stride + column, mem, dz, dz_x);
    }
    double values[2][lanes<A>()];
    store_doubles<A>(values[0], dz);
    store_doubles<A>(values[1], dz_x);
    for (int i = 0; i < mem.count_of(lanes<A>()); ++i) sum[i] += values[0][i], sum_x[i] += values[1][i];
  }
  static void reduce_grid(const Slab& slab, double* sum, double* sum_x) {
    const Slab s = slab;
    constexpr int w = lanes<A>();
    const std::int64_t rows = tile_rows<T>(s);
    for (std::int64_t r = 0; r < s.runs; r += rows) {
      const std::int64_t end = r + rows < s.runs ? r + rows : s.runs;
      std::int64_t c = 0;
      for (; c + w <= s.length; c += w) reduce_column(s, c, r, end, sum + c, sum_x + c, Whole{});
      if (c < s.length) reduce_column(s, c, r, end, sum + c, sum_x + c, Part{static_cast<int>(s.length - c)});
    }
  }
};

}  // namespace BN_ISA
}  // namespace bn
