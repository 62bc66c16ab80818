// Work that is done once a channel, not once a value, in float64: on vectors of adjacent channels, then on the
// remaining channels. With many channels and few values in each, scalar code would take as long as the sums themselves.
#pragma once

#include "activation.h"
#include "reductions.h"

namespace bn {
namespace BN_ISA {

// Calls f(first channel, VD) for each full vector of channels and f(channel, double) for each remaining channel.
template <class F> BN_INLINE void for_each_channel(std::int64_t n, const F& f) {
  constexpr int w = lanes<double>();
  std::int64_t i = 0;
  for (; i + w <= n; i += w) f(i, VD{});
  for (; i < n; ++i) f(i, double{});
}

template <class X> BN_INLINE X load_as(const double* p) {
  X x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
template <class X> BN_INLINE void store_as(double* p, X x) { std::memcpy(p, &x, sizeof x); }

BN_INLINE double square_root(double v) { return std::sqrt(v); }

// a * b + c with one rounding, on every instruction set.
BN_INLINE double fused(double a, double b, double c) { return std::fma(a, b, c); }
#if BN_VECTOR_BYTES == 64
BN_INLINE VD fused(VD a, VD b, VD c) {
  return bit_cast<VD>(_mm512_fmadd_pd(bit_cast<__m512d>(a), bit_cast<__m512d>(b), bit_cast<__m512d>(c)));
}
#elif BN_VECTOR_BYTES == 32
BN_INLINE VD fused(VD a, VD b, VD c) {
  return bit_cast<VD>(_mm256_fmadd_pd(bit_cast<__m256d>(a), bit_cast<__m256d>(b), bit_cast<__m256d>(c)));
}
#else
BN_INLINE VD fused(VD a, VD b, VD c) { return VD{std::fma(a[0], b[0], c[0]), std::fma(a[1], b[1], c[1])}; }
#endif

inline void invstd(const double* var, double eps, std::int64_t n, double* out) {
  for_each_channel(n, [&](std::int64_t k, auto x)
                          BN_ALWAYS { store_as(out + k, 1 / square_root(load_as<decltype(x)>(var + k) + eps)); });
}

inline void finite_or_zero(double* values, std::int64_t n) {
  for_each_channel(n, [&](std::int64_t k, auto x) BN_ALWAYS {
    x = load_as<decltype(x)>(values + k);
    store_as(values + k, x - x == 0 ? x : decltype(x){});
  });
}

inline bool all_finite(const double* values, std::int64_t n) {
  VD differences = {};  // x - x: 0, or NaN where x is not finite
  double sum = 0;
  std::int64_t i = 0;
  for (; i + lanes<double>() <= n; i += lanes<double>())
    differences += load_as<VD>(values + i) - load_as<VD>(values + i);
  for (; i < n; ++i) sum += values[i] - values[i];
  for (int k = 0; k < lanes<double>(); ++k) sum += differences[k];
  return sum == 0;
}

// Σd² - (Σd)²/count: what cancels there is exact, if the rounding of the quotient is taken into account.
inline void sums_to_moments(const double* shift, bool shifted, double count, std::int64_t n, double* sum,
                            double* square) {
  for_each_channel(n, [&](std::int64_t k, auto x) BN_ALWAYS {
    using X = decltype(x);
    const X s = load_as<X>(sum + k), number = X{} + count, mean = s / number;
    const X rounding = fused(-mean, number, s) / number;
    const X squares = fused(-s, mean, load_as<X>(square + k)) - s * rounding;
    store_as(sum + k, shifted ? mean : fused(-number, load_as<X>(shift + k), s) / number);
    store_as(square + k, squares < 0 ? X{} : squares);  // a NaN remains
  });
}

inline void chan_merge(double n_a, double n_b, std::int64_t n, std::int64_t width, double* a, const double* b) {
  const double share = n_b / (n_a + n_b), weight = n_a * share;
  for_each_channel(n, [&](std::int64_t k, auto x) BN_ALWAYS {
    using X = decltype(x);
    const X mean = load_as<X>(a + k), shifts = load_as<X>(b + 2 * width + k) - load_as<X>(a + 2 * width + k);
    const X delta = shifts + (load_as<X>(b + k) - mean);
    // an infinite mean of b replaces the mean: the product could be NaN
    store_as(a + k, delta - delta == 0 ? mean + delta * share : mean + (load_as<X>(b + k) + shifts));
    store_as(a + width + k, load_as<X>(a + width + k) + load_as<X>(b + width + k) + delta * delta * weight);
  });
}

inline void add_sums(const double* more, std::int64_t n, double* sums) {
  for_each_channel(n, [&](std::int64_t k, auto x) BN_ALWAYS {
    using X = decltype(x);
    store_as(sums + k, load_as<X>(sums + k) + load_as<X>(more + k));
  });
}

// To float32 and back to float64.
BN_INLINE double as_float32(double v) { return static_cast<double>(static_cast<float>(v)); }
BN_INLINE VD as_float32(VD v) { return to_float64(to_float32(v)); }

// Beyond these limits float32 coefficients, or the differences that they multiply, may overflow or lose their digits.
constexpr double kMaxScale = 1e25, kMaxCenter = 1e30, kMinSlope = 1e-36;

// Whether a comparison was true for any channel.
struct AnyChannel {
  VL vectors = {};
  bool remaining = false;
  BN_INLINE void note(VL found) { vectors |= found; }
  BN_INLINE void note(bool found) { remaining |= found; }
  bool any() const { return remaining || any_lane<double>(vectors); }
};

inline bool affine_coefs(const double* mean, const double* weight, const double* bias, bool float32_center,
                         std::int64_t n, const ChannelCoefs& c) {
  AnyChannel out_of_range;
  for_each_channel(n, [&](std::int64_t k, auto x) BN_ALWAYS {
    using X = decltype(x);
    const X exact = load_as<X>(mean + k), center = float32_center ? as_float32(exact) : exact;
    const X difference = exact - center, residue = center - center == 0 ? difference : X{};
    const X invstd = load_as<X>(c.invstd + k), scale = weight ? load_as<X>(weight + k) * invstd : invstd;
    const X shift = fused(-residue, scale, bias ? load_as<X>(bias + k) : X{});
    store_as(c.center + k, center);
    store_as(c.residue + k, residue);
    store_as(c.scale + k, scale);
    store_as(c.shift + k, shift);
    out_of_range.note((invstd > kMaxScale) | (invstd < 1 / kMaxScale) | (absolute(scale) > kMaxScale) |
                      (absolute(center) > kMaxCenter) | (absolute(shift) > kMaxCenter));
  });
  return out_of_range.any();
}

inline bool backward_coefs(const double* sum_dy, const double* sum_dy_xmu, double inverse_count, bool scaled,
                           std::int64_t n, const ChannelCoefs& c) {
  AnyChannel out_of_range;
  for_each_channel(n, [&](std::int64_t k, auto x) BN_ALWAYS {
    using X = decltype(x);
    const X invstd = load_as<X>(c.invstd + k), scale = load_as<X>(c.scale + k);
    const X unscaled = -load_as<X>(sum_dy_xmu + k) * inverse_count * invstd * invstd;
    const X slope = scaled ? unscaled * scale : unscaled;
    const X offset = fused(-load_as<X>(c.residue + k), slope, -load_as<X>(sum_dy + k) * inverse_count * scale);
    store_as(c.slope + k, slope);
    store_as(c.offset + k, offset);
    const X size = absolute(slope);
    out_of_range.note((size > kMaxScale) | (absolute(offset) > kMaxCenter) |
                      ((slope != 0) & (size < kMinSlope) & (invstd < 1)));
  });
  return out_of_range.any();
}

inline void to_float32_all(const double* values, std::int64_t n, float* out) {
  constexpr int w = lanes<double>();
  constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  std::int64_t i = 0;
  for (; i + w <= n; i += w) {
    const VD v = load_as<VD>(values + i);
    const NarrowVF f = to_float32(v == v ? v : VD{} + nan);
    std::memcpy(out + i, &f, sizeof f);
  }
  for (; i < n; ++i) out[i] = static_cast<float>(values[i] == values[i] ? values[i] : nan);
}

template <class A> void spread_all(const A* of_channels, std::int64_t n, std::int64_t columns, A* out) {
  constexpr int w = lanes<A>();
  // A vector may be longer than what is left of a channel: the next channel overwrites what it wrote too much. Only the
  // last channels, behind which another thread may write, are written value by value.
  const std::int64_t vectors = (columns + w - 1) / w, last = n - (vectors * w + columns - 1) / columns;
  std::int64_t k = 0;
  for (; k < last; ++k, out += columns) {
    const V<A> value = broadcast(of_channels[k]);
    for (std::int64_t j = 0; j < vectors; ++j) store_unaligned(out + j * w, value);
  }
  for (; k < n; ++k)
    for (std::int64_t j = 0; j < columns; ++j) *out++ = of_channels[k];
}

// The sum of eight values, which lie in as many vectors as they need: halves first, on every instruction set alike.
BN_INLINE double sum_of_eight(const VD* parts) {
#if BN_VECTOR_BYTES == 64
  typedef long long Places __attribute__((vector_size(64)));
  const VD halves = parts[0] + __builtin_shuffle(parts[0], Places{4, 5, 6, 7, 0, 1, 2, 3});
  const VD quarters = halves + __builtin_shuffle(halves, Places{2, 3, 0, 1, 6, 7, 4, 5});
  return quarters[0] + quarters[1];
#elif BN_VECTOR_BYTES == 32
  const VD halves = parts[0] + parts[1];
  return (halves[0] + halves[2]) + (halves[1] + halves[3]);
#else
  const VD quarters = (parts[0] + parts[2]) + (parts[1] + parts[3]);
  return quarters[0] + quarters[1];
#endif
}

// The columns j, j + 8, ... are added first, then these eight sums.
inline void gather_all(const double* of_columns, std::int64_t n, std::int64_t columns, double* out) {
  constexpr int w = lanes<double>(), sums = 8;
  for (std::int64_t k = 0; k < n; ++k, of_columns += columns) {
    if (columns < sums) {
      double sum = of_columns[0];
      for (std::int64_t j = 1; j < columns; ++j) sum += of_columns[j];
      out[k] = sum;
      continue;
    }
    VD parts[sums / w] = {};
    std::int64_t j = 0;
    for (; j + sums <= columns; j += sums)
      unroll<sums / w>([&](auto v) BN_ALWAYS { parts[v] += load_as<VD>(of_columns + j + v * w); });
    double sum = sum_of_eight(parts);
    for (; j < columns; ++j) sum += of_columns[j];
    out[k] = sum;
  }
}

inline ChannelKernels channel_kernels() {
  return {&invstd,       &finite_or_zero, &all_finite,     &sums_to_moments,   &chan_merge,         &add_sums,
          &affine_coefs, &backward_coefs, &to_float32_all, &spread_all<float>, &spread_all<double>, &gather_all};
}

}  // namespace BN_ISA
}  // namespace bn
