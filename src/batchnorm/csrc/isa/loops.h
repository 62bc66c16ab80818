// The loops: lines (one channel, coefficients in registers) and grids (a column a channel, coefficients in L1).
// Order of additions depends on the slab's shape alone, never on an address: results repeat bit for bit.
#pragma once

namespace bn {
namespace BN_ISA {

// Values of the head of a run that come before the first aligned step; 0 where no aligned store is asked for.
template <class T, class A, class Way> BN_INLINE std::int64_t unaligned_head(const Slab& s, std::int64_t i) {
  constexpr std::uintptr_t bytes = Way::units * lanes<A>() * sizeof(T);
  const T* first = static_cast<const T*>(s.out ? s.out : s.grad_residual) + i;
  const std::uintptr_t over = reinterpret_cast<std::uintptr_t>(first) % bytes;
  const std::int64_t head = over ? static_cast<std::int64_t>((bytes - over) / sizeof(T)) : 0;
  return head < s.length ? head : s.length;
}

// Calls step(i, mask index, how far ahead, lanes) over one run that starts at `start`.
template <class T, class A, class Way, class F>
BN_INLINE void over_run(const Slab& s, std::int64_t start, std::int64_t mask, const Ahead& ahead, const F& step) {
  constexpr int w = lanes<A>();
  std::int64_t i = s.stream ? unaligned_head<T, A, Way>(s, start) : 0;
  if (i) step(start, mask, ahead.far, Rest<Way>{static_cast<int>(i)});
  std::int64_t stop = ahead.change, far = ahead.far;
  for (int part = 0; part < 2; ++part, stop = s.length, far = ahead.behind)
    for (; i + Way::units * w <= stop; i += Way::units * w) step(start + i, mask + i, far, Way{});
  if (i < s.length) step(start + i, mask + i, far, Rest<Way>{static_cast<int>(s.length - i)});
}

// Calls run(start, mask index, channel) for each run of a slab of lines, in the order of memory or from the last back.
template <class F> BN_INLINE void over_runs(const Slab& s, const F& run) {
  for (std::int64_t i = 0; i < s.runs; ++i) {
    const std::int64_t r = s.turn < 0 ? s.runs - 1 - i : i;
    for (std::int64_t k = 0; k < s.channels; ++k) run(r * s.stride + k * s.channel_stride, r * s.mask_stride, k);
  }
}

// Rows of which several at a time, each read ahead by as many, would fill the first cache.
template <class T> BN_INLINE bool long_rows(const Slab& s) {
  return s.stride * static_cast<std::int64_t>(sizeof(T)) >= 2048;
}
// Whether a grid is taken row by row: streaming stores want the order of memory itself, and long rows the first cache to
// themselves, if the coefficients, read for every row then, fit into it and are no wider than the data.
template <class T, class A> BN_INLINE bool by_row(const Slab& s) {
  constexpr std::int64_t coefs = kCoefs * sizeof(A), first_cache = 24 * 1024;
  return s.stream || (sizeof(T) == sizeof(A) && long_rows<T>(s) && s.length * coefs <= first_cache);
}

// Otherwise a few rows share a column's coefficients, of which there are more than there are values to read.
constexpr int kRows = 4;
template <class T> BN_INLINE std::int64_t ahead_rows(const Slab& s) {
  constexpr std::int64_t far = kAheadBytes / static_cast<std::int64_t>(sizeof(T));
  if (s.stream) return far;
  const std::int64_t rows = kRows * s.stride;
  return long_rows<T>(s) ? far / 4 : rows > far ? rows : far;
}

// How far ahead to fetch into the second-level cache: beyond that and the rows that are taken at a time. From there a
// grid's values come fast enough (not so where outputs are streamed); a line to be written the first cache must have.
template <class T> BN_INLINE std::int64_t deep_rows(const Slab& s) {
  constexpr std::int64_t far = kDeepBytes / static_cast<std::int64_t>(sizeof(T));
  const std::int64_t soon = kRows * s.stride + ahead_rows<T>(s);
  return soon > far ? soon : far;
}

// Calls column(c, lanes) for a row's columns.
template <class T, class A, class F> BN_INLINE void over_columns(std::int64_t length, const F& column) {
  constexpr int w = lanes<A>(), units = Unit<T, A>::units;
  std::int64_t c = 0;
  for (; c + units * w <= length; c += units * w) column(c, Unit<T, A>{});
  if constexpr (units > 1) for (; c + w <= length; c += w) column(c, Whole{});
  if (c < length) column(c, Part{static_cast<int>(length - c)});
}

// Calls step(i, row, coefficients, lanes) for so many rows at a time, from row r on; returns the first row that is left.
template <int rows, class T, class A, class F>
BN_INLINE std::int64_t over_rows(const Slab& s, std::int64_t r, const F& step) {
  for (; r + rows <= s.runs; r += rows) {
    const std::int64_t start = r * s.stride;
    over_columns<T, A>(s.length, [&](std::int64_t c, auto mem) BN_ALWAYS {
      const auto coefs = coefs_grid<A>(s, c, mem);
      unrolled<rows>([&](auto k) BN_ALWAYS { step(start + k * s.stride + c, r + k, coefs, mem); });
    });
  }
  return r;
}

// A grid nearly in the order of memory.
template <class T, class A, class F> BN_INLINE void over_grid(const Slab& s, const F& step) {
  over_rows<1, T, A>(s, by_row<T, A>(s) ? 0 : over_rows<kRows, T, A>(s, 0, step), step);
}

template <class T> void widen_all(const void* x, std::int64_t n, double* out) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = scalar(static_cast<const T*>(x)[i]);
}

template <class T> void narrow_all(const double* x, std::int64_t n, void* out) {
  for (std::int64_t i = 0; i < n; ++i) assign(static_cast<T*>(out)[i], x[i]);
}

template <class T, class A> struct Moments {
  // x - shift is taken in float64, where it and its square are exact for float32 values of like size. 16-bit data need
  // no shift (docs/kernels.md): their squares have 22 bits and less, and a chunk's sums of them are exact.
  static constexpr bool shifts = sizeof(T) > 2;
  struct Sums {
    Doubles sum = {}, square = {};
    BN_INLINE void step(Doubles x, Doubles shift) {
      const Doubles d = shifts ? Doubles{x.a - shift.a, x.b - shift.b} : x;
      add(sum, d);
      add_product(square, d, d);
    }
  };

  static BN_INLINE Doubles load(const T* x, Whole) { return doubles_at<A>(x); }
  static BN_INLINE Doubles load(const T* x, Part mem) { return doubles(mem.template load<T, A>(x)); }

  // The shift is a value of the data (or a float64 mean of float64 data), so A holds it exactly: a lane that is left
  // out reads as the shift and adds nothing.
  template <bool masked>
  static BN_INLINE void run(const Slab& s, std::int64_t start, std::int64_t mask, const Ahead& next, double shift, Sums* to) {
    constexpr int w = lanes<A>();
    const Doubles k = {spread(shift), sizeof(A) == 4 ? spread(shift) : VD{}};  // b stands idle for double
    const V<A> neutral = spread(static_cast<A>(shift));
    const T* x = static_cast<const T*>(s.x) + start;
    const auto read = [&](std::int64_t i, std::int64_t far, auto mem) BN_ALWAYS {
      ahead(x + i, far);
      if (s.out) far_ahead(static_cast<const T*>(s.out) + start, i);
      if constexpr (masked || std::is_same_v<decltype(mem), Part>) {
        V<A> v = mem.template load<T, A>(x + i);
        if constexpr (shifts) v = mem.template keep<A>(v, neutral);
        if constexpr (masked) v = mask_line<A>(s.mask + mask + i, mem) ? v : neutral;
        return doubles(v);
      } else {
        return doubles_at<A>(x + i);
      }
    };
    Sums one = to[0], two = to[1];  // two sets: the additions' latency is the bound
    std::int64_t i = 0, stop = next.change, far = next.far;
    for (int part = 0; part < 2; ++part, stop = s.length, far = next.behind)
      for (; i + 2 * w <= stop; i += 2 * w) {
        one.step(read(i, far, Whole{}), k);
        two.step(read(i + w, far, Whole{}), k);
      }
    if (i + w <= s.length) {
      one.step(read(i, far, Whole{}), k);
      i += w;
    }
    if (i < s.length) two.step(read(i, far, Part{static_cast<int>(s.length - i)}), k);
    to[0] = one;
    to[1] = two;
  }

  static void line(const Slab& slab, const double* shift, double* sum, double* square) {
    const Slab s = slab;
    const Ahead next = ahead_line<T>(s);
    Sums sums[kMostChannels][2];
    over_groups(s, [&](std::int64_t r, std::int64_t end, std::int64_t k) BN_ALWAYS {
      Sums both[2] = {sums[k][0], sums[k][1]};
      for (; r < end; ++r) {
        const std::int64_t start = r * s.stride + k * s.channel_stride, mask = r * s.mask_stride;
        const double center = shifts ? shift[k] : 0;
        if (s.mask) run<true>(s, start, mask, next, center, both);
        else run<false>(s, start, mask, next, center, both);
      }
      sums[k][0] = both[0];
      sums[k][1] = both[1];
    });
    for (std::int64_t k = 0; k < s.channels; ++k) {
      add(sums[k][0].sum, sums[k][1].sum);
      add(sums[k][0].square, sums[k][1].square);
      sum[k] = total(sums[k][0].sum);
      square[k] = total(sums[k][0].square);
    }
  }

  static void grid(const Slab& slab, const double* shift, double* sum, double* square) {
    const Slab s = slab;
    constexpr int w = lanes<A>();
    over_tiles<T, A, Whole>(s, [&](std::int64_t c, std::int64_t r0, std::int64_t r1, auto columns, auto mem, std::int64_t next) BN_ALWAYS {
      Doubles center[columns];
      Sums sums[columns];
      unrolled<columns>([&](auto k) BN_ALWAYS {
        center[k] = shifts ? load_doubles_part<A>(shift + c + k * w, mem) : Doubles{};
      });
      const T* x = static_cast<const T*>(s.x);
      for (std::int64_t r = r0; r < r1; ++r, next += columns * w) {
        ahead_row<T, A, columns>(x, next);
        if (s.mask && !s.mask[r]) continue;
        unrolled<columns>([&](auto k) BN_ALWAYS { sums[k].step(load(x + r * s.stride + c + k * w, mem), center[k]); });
      }
      // a tile's sums first: a long column added one by one would cost float64 data a digit
      unrolled<columns>([&](auto k) BN_ALWAYS {
        add_to<A>(sum + c + k * w, sums[k].sum, mem);
        add_to<A>(square + c + k * w, sums[k].square, mem);
      });
    });
    if constexpr (std::is_same_v<T, bf16> && std::is_same_v<A, float>) {
      in_pairs<w / 2>(sum, s.length, true);
      in_pairs<w / 2>(square, s.length, true);
    }
  }
};

template <class T, class A, Variant kind> struct Loops {
  using Do = Step<T, A, kind>;
  using Way = std::conditional_t<kind == any_masked, Whole, Unit<T, A>>;  // of lines, whose mask is a byte a value

  template <class Lanes> static BN_INLINE M<A> real_line(const Slab& s, std::int64_t m, Lanes mem) {
    if constexpr (kind == any_masked) return mask_line<A>(s.mask + m, mem);
    return M<A>{};
  }
  static BN_INLINE M<A> real_grid(const Slab& s, std::int64_t r) {
    return kind == any_masked && s.mask[r] ? ~M<A>{} : M<A>{};
  }

  static void apply_line(const Slab& slab) {
    const Slab s = slab;  // a copy: its fields can stay in registers across the stores
    const Ahead next = ahead_line<T>(s);
    over_runs(s, [&](std::int64_t start, std::int64_t mask, std::int64_t k) BN_ALWAYS {
      const auto c = coefs_line<A>(s, k);
      over_run<T, A, Way>(s, start, mask, ahead_stretch<T>(s, k, next), [&](std::int64_t i, std::int64_t, std::int64_t far, auto mem) BN_ALWAYS {
        Do::prefetch_read(s, i, far, false);
        if (!s.stream) Do::prefetch_write(s, i, far, false);
        if (s.next) Do::template prefetch_next<true>(s, i, false);
        Do::apply(s, c, i, mem);
      });
    });
  }
  static void apply_grid(const Slab& slab) {
    Slab s = slab;
    s.next = deep_rows<T>(s);
    const std::int64_t far = ahead_rows<T>(s);
    over_grid<T, A>(s, [&](std::int64_t i, std::int64_t, const auto& c, auto mem) BN_ALWAYS {
      if (s.stream) Do::prefetch_read(s, i, far, false);
      else Do::prefetch_write(s, i, far, false);
      Do::template prefetch_next<false>(s, i, false);
      Do::apply(s, c, i, mem);
    });
  }
  static void elemt_line(const Slab& slab) {
    const Slab s = slab;
    const Ahead next = ahead_line<T>(s);
    over_runs(s, [&](std::int64_t start, std::int64_t mask, std::int64_t k) BN_ALWAYS {
      const auto c = coefs_line<A>(s, k);
      over_run<T, A, Way>(s, start, mask, ahead_stretch<T>(s, k, next), [&](std::int64_t i, std::int64_t m, std::int64_t far, auto mem) BN_ALWAYS {
        Do::prefetch_read(s, i, far, true);
        if (!s.stream) Do::prefetch_write(s, i, far, true);
        if (s.next) Do::template prefetch_next<true>(s, i, true);
        Do::elemt(s, c, real_line(s, m, mem), i, mem);
      });
    });
  }
  static void elemt_grid(const Slab& slab) {
    Slab s = slab;
    s.next = deep_rows<T>(s);
    const std::int64_t far = ahead_rows<T>(s);
    over_grid<T, A>(s, [&](std::int64_t i, std::int64_t r, const auto& c, auto mem) BN_ALWAYS {
      if (s.stream) Do::prefetch_read(s, i, far, true);
      else Do::prefetch_write(s, i, far, true);
      Do::template prefetch_next<false>(s, i, true);
      Do::elemt(s, c, real_grid(s, r), i, mem);
    });
  }

  static bool reduce_line(const Slab& slab, double* sum, double* sum_x) {
    const Slab s = slab;
    const Ahead next = ahead_line<T>(s);
    return over_lines<A, 2>(
        s,
        [&](std::int64_t start, std::int64_t mask, std::int64_t k, Block<A, 2>& block) BN_ALWAYS {
          const auto c = coefs_line<A>(s, k);
          over_strands<A, Way>(s.length, next, block, [&](std::int64_t i, std::int64_t far, V<A>(*part)[2], auto mem) BN_ALWAYS {
            Do::prefetch_read(s, start + i, far, true);
            Do::prefetch_out(s, start + i);
            Do::reduce(s, c, real_line(s, mask + i, mem), start + i, mem, part);
          });
        },
        [&](std::int64_t k, const Doubles* totals) BN_ALWAYS {
          sum[k] = total(totals[0]);
          sum_x[k] = total(totals[1]);
        });
  }

  static bool reduce_grid(const Slab& slab, double* sum, double* sum_x) {
    const Slab s = slab;
    constexpr int w = lanes<A>();
    M<A> doubt = {};
    over_tiles<T, A, Unit<T, A>>(s, [&](std::int64_t column, std::int64_t r0, std::int64_t r1, auto steps, auto mem, std::int64_t next) BN_ALWAYS {
      constexpr int units = decltype(mem)::units, columns = steps * units;
      GridCoefs<A, units> c[steps];
      V<A> part[columns][2] = {};
      unrolled<steps>([&](auto k) BN_ALWAYS { c[k] = coefs_grid<A>(s, column + k * units * w, mem); });
      for (std::int64_t r = r0; r < r1; ++r, next += columns * w) {
        Do::template prefetch_row<columns>(s, next);
        unrolled<steps>([&](auto k) BN_ALWAYS {
          Do::reduce(s, c[k], real_grid(s, r), r * s.stride + column + k * units * w, mem, part + k * units);
        });
      }
      unrolled<columns>([&](auto k) BN_ALWAYS {
        doubt |= doubtful(part[k][0]) | doubtful(part[k][1]);
        add_to<A>(sum + column + k * w, doubles(part[k][0]), mem.one());
        add_to<A>(sum_x + column + k * w, doubles(part[k][1]), mem.one());
      });
    });
    if constexpr (Unit<T, A>::units > 1) {
      in_pairs<w>(sum, s.length, true);
      in_pairs<w>(sum_x, s.length, true);
    }
    return !some<A>(doubt);
  }
};

}  // namespace BN_ISA
}  // namespace bn
