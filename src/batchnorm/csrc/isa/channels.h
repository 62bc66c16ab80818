// What is done once a channel and not once a value, in float64: vectors of adjacent channels, then the few that are left.
// With many channels and few values in each it would otherwise take as long as the sums themselves.
#pragma once

namespace bn {
namespace BN_ISA {

// Calls f(first channel, VD or double) for each vector of channels and for each that is left.
template <class F> BN_INLINE void over_channels(std::int64_t n, const F& f) {
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

// One rounding, on every instruction set.
BN_INLINE double fused(double a, double b, double c) { return std::fma(a, b, c); }
#if BN_VECTOR_BYTES == 64
BN_INLINE VD fused(VD a, VD b, VD c) { return bits<VD>(_mm512_fmadd_pd(bits<__m512d>(a), bits<__m512d>(b), bits<__m512d>(c))); }
#elif BN_VECTOR_BYTES == 32
BN_INLINE VD fused(VD a, VD b, VD c) { return bits<VD>(_mm256_fmadd_pd(bits<__m256d>(a), bits<__m256d>(b), bits<__m256d>(c))); }
#else
BN_INLINE VD fused(VD a, VD b, VD c) { return VD{std::fma(a[0], b[0], c[0]), std::fma(a[1], b[1], c[1])}; }
#endif

inline void invstd_all(const double* var, double eps, std::int64_t n, double* out) {
  over_channels(n, [&](std::int64_t k, auto x) BN_ALWAYS {
    store_as(out + k, 1 / square_root(load_as<decltype(x)>(var + k) + eps));
  });
}

inline void finite_or_zero(double* values, std::int64_t n) {
  over_channels(n, [&](std::int64_t k, auto x) BN_ALWAYS {
    x = load_as<decltype(x)>(values + k);
    store_as(values + k, x - x == 0 ? x : decltype(x){});
  });
}

inline bool all_finite(const double* values, std::int64_t n) {
  VD rest = {};
  double last = 0;
  std::int64_t i = 0;
  for (; i + lanes<double>() <= n; i += lanes<double>()) rest += load_as<VD>(values + i) - load_as<VD>(values + i);
  for (; i < n; ++i) last += values[i] - values[i];
  for (int k = 0; k < lanes<double>(); ++k) last += rest[k];
  return last == 0;
}

// What cancels in Σd² - (Σd)²/n is exact, so long as the quotient's rounding is taken in.
inline void settle_all(const double* shift, bool shifted, double count, std::int64_t n, double* sum, double* square) {
  over_channels(n, [&](std::int64_t k, auto x) BN_ALWAYS {
    using X = decltype(x);
    const X s = load_as<X>(sum + k), number = X{} + count, mean = s / number;
    const X rounding = fused(-mean, number, s) / number;
    const X rest = fused(-s, mean, load_as<X>(square + k)) - s * rounding;
    store_as(sum + k, shifted ? mean : fused(-number, load_as<X>(shift + k), s) / number);
    store_as(square + k, rest < 0 ? X{} : rest);  // NaN stays
  });
}

inline void join_all(double n_a, double n_b, std::int64_t n, std::int64_t width, double* a, const double* b) {
  const double share = n_b / (n_a + n_b), weight = n_a * share;
  over_channels(n, [&](std::int64_t k, auto x) BN_ALWAYS {
    using X = decltype(x);
    const X mean = load_as<X>(a + k), apart = load_as<X>(b + 2 * width + k) - load_as<X>(a + 2 * width + k);
    const X delta = apart + (load_as<X>(b + k) - mean);
    store_as(a + k, delta - delta == 0 ? mean + delta * share : mean + (load_as<X>(b + k) + apart));  // infinities
    store_as(a + width + k, load_as<X>(a + width + k) + load_as<X>(b + width + k) + delta * delta * weight);
  });
}

inline void add_all(const double* more, std::int64_t n, double* sums) {
  over_channels(n, [&](std::int64_t k, auto x) BN_ALWAYS {
    using X = decltype(x);
    store_as(sums + k, load_as<X>(sums + k) + load_as<X>(more + k));
  });
}

template <class X> BN_INLINE X magnitude_of(X x) { return x < 0 ? -x : x; }

// To float32 and back: what the loops will make of it.
BN_INLINE double as_float(double v) { return static_cast<double>(static_cast<float>(v)); }
BN_INLINE VD as_float(VD v) { return wide(rounded(v)); }

// Outside these float32 coefficients, or the differences they multiply, may overflow or lose their digits.
constexpr double kLargest = 1e25, kLargestCenter = 1e30, kLeastSlope = 1e-36;

// Whether a lane of any of the vectors, or the last channels, is set.
struct AnyLane {
  VL lanes = {};
  bool last = false;
  BN_INLINE void note(VL found) { lanes |= found; }
  BN_INLINE void note(bool found) { last |= found; }
  bool any() const { return last || some<double>(lanes); }
};

inline bool affine_all(const double* mean, const double* weight, const double* bias, bool narrow, std::int64_t n, const ChannelCoefs& c) {
  AnyLane beyond;
  over_channels(n, [&](std::int64_t k, auto x) BN_ALWAYS {
    using X = decltype(x);
    const X whole = load_as<X>(mean + k), center = narrow ? as_float(whole) : whole, rest = whole - center;
    const X residue = center - center == 0 ? rest : X{};
    const X invstd = load_as<X>(c.invstd + k), scale = weight ? load_as<X>(weight + k) * invstd : invstd;
    const X shift = fused(-residue, scale, bias ? load_as<X>(bias + k) : X{});
    store_as(c.center + k, center);
    store_as(c.residue + k, residue);
    store_as(c.scale + k, scale);
    store_as(c.shift + k, shift);
    beyond.note((invstd > kLargest) | (invstd < 1 / kLargest) | (magnitude_of(scale) > kLargest) |
                (magnitude_of(center) > kLargestCenter) | (magnitude_of(shift) > kLargestCenter));
  });
  return beyond.any();
}

inline bool through_all(const double* sum_dy, const double* sum_dy_xmu, double share, bool scaled, std::int64_t n, const ChannelCoefs& c) {
  AnyLane beyond;
  over_channels(n, [&](std::int64_t k, auto x) BN_ALWAYS {
    using X = decltype(x);
    const X invstd = load_as<X>(c.invstd + k), scale = load_as<X>(c.scale + k);
    const X squared = -load_as<X>(sum_dy_xmu + k) * share * invstd * invstd, slope = scaled ? squared * scale : squared;
    const X offset = fused(-load_as<X>(c.residue + k), slope, -load_as<X>(sum_dy + k) * share * scale);
    store_as(c.slope + k, slope);
    store_as(c.offset + k, offset);
    const X size = magnitude_of(slope);
    beyond.note((size > kLargest) | (magnitude_of(offset) > kLargestCenter) | ((slope != 0) & (size < kLeastSlope) & (invstd < 1)));
  });
  return beyond.any();
}

inline void round_all(const double* values, std::int64_t n, float* out) {
  constexpr int w = lanes<double>();
  constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  std::int64_t i = 0;
  for (; i + w <= n; i += w) {
    const VD v = load_as<VD>(values + i);
    const HalfF f = rounded(v == v ? v : VD{} + nan);
    std::memcpy(out + i, &f, sizeof f);
  }
  for (; i < n; ++i) out[i] = static_cast<float>(values[i] == values[i] ? values[i] : nan);
}

inline ChannelKernels channel_kernels() {
  return {&invstd_all, &finite_or_zero, &all_finite, &settle_all, &join_all, &add_all, &affine_all, &through_all, &round_all};
}

}  // namespace BN_ISA
}  // namespace bn
