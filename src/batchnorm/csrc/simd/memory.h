// Access to memory: loads and stores with conversion, partial vectors, stream stores, prefetches and masks.
#pragma once

#include "vectors.h"

namespace bn {
namespace BN_ISA {

template <class A> BN_INLINE V<A> load_unaligned(const A* p) {
  V<A> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class A> BN_INLINE void store_unaligned(A* p, V<A> v) { std::memcpy(p, &v, sizeof v); }

template <class T> BN_INLINE VF load_widened(const T* p) {
  VU16 h = {};
  std::memcpy(&h, p, sizeof h);
  return widen(h, T{});
}

template <class T, class A> struct Memory;  // T is the type in memory, A the type in registers

template <class A> struct Memory<A, A> {
  static BN_INLINE V<A> load(const A* p) { return load_unaligned(p); }
  static BN_INLINE void store(A* p, V<A> v) { store_unaligned(p, v); }
};
template <> struct Memory<bf16, float> {
  static BN_INLINE VF load(const bf16* p) { return load_widened(p); }
  static BN_INLINE void store(bf16* p, VF v) {
    const VU16 h = narrow(v, bf16{});
    std::memcpy(p, &h, sizeof h);
  }
};
template <> struct Memory<f16, float> {
  static BN_INLINE VF load(const f16* p) { return load_widened(p); }
  static BN_INLINE void store(f16* p, VF v) {
    const VU16 h = narrow(v, f16{});
    std::memcpy(p, &h, sizeof h);
  }
};

BN_INLINE double to_double(double x) { return x; }
BN_INLINE double to_double(float x) { return x; }
BN_INLINE double to_double(bf16 x) { return bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16); }
BN_INLINE double to_double(f16 x) { return f16_value(x.bits); }
BN_INLINE void from_double(double& to, double v) { to = v; }
BN_INLINE void from_double(float& to, double v) { to = static_cast<float>(v); }
// float64 to float32, rounded to odd: an inexact result gets 1 as its last bit. A second rounding to 16 bits is then
// correct, because the last bit tells it that the first rounding was not exact.
BN_INLINE float round_to_odd(double v) {
  const float f = static_cast<float>(v);
  if (static_cast<double>(f) == v || f != f) return f;
  std::uint32_t u = bit_cast<std::uint32_t>(f);
  const bool rounded_up = (static_cast<double>(f) > v) == (v > 0);
  if (rounded_up) --u;
  return bit_cast<float>(u | 1u);
}
BN_INLINE void from_double(bf16& to, double v) {
  const std::uint32_t u = bit_cast<std::uint32_t>(round_to_odd(v));
  to.bits = static_cast<std::uint16_t>(v != v ? 0x7fc0u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
BN_INLINE void from_double(f16& to, double v) { to.bits = f16_bits(round_to_odd(v)); }

template <class T> struct Memory<T, double> {  // for the float64 loops, which are rare: no vector conversions
  static BN_INLINE VD load(const T* p) {
    VD v = {};
    for (int i = 0; i < lanes<double>(); ++i) v[i] = to_double(p[i]);
    return v;
  }
  static BN_INLINE void store(T* p, VD v) {
    for (int i = 0; i < lanes<double>(); ++i) from_double(p[i], v[i]);
  }
};
template <> struct Memory<double, double> {
  static BN_INLINE VD load(const double* p) { return load_unaligned(p); }
  static BN_INLINE void store(double* p, VD v) { store_unaligned(p, v); }
};

// Only the first n lanes. A load sets the others to zero, and a store does not write them.
template <class T, class A> BN_INLINE V<A> load_partial(const T* p, int n) {
#if BN_VECTOR_BYTES == 64
  const std::uint32_t keep = (1u << n) - 1u;
  if (std::is_same<T, float>::value && std::is_same<A, float>::value)
    return bit_cast<V<A>>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(keep), p));
  if (sizeof(T) == 2 && std::is_same<A, float>::value) {
    const __m256i h = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(keep), p);
    T buffer[lanes<float>()];
    std::memcpy(buffer, &h, sizeof h < sizeof buffer ? sizeof h : sizeof buffer);
    return Memory<T, A>::load(buffer);
  }
#endif
  T buffer[lanes<A>()];
  std::memset(buffer, 0, sizeof buffer);
  std::memcpy(buffer, p, static_cast<std::size_t>(n) * sizeof(T));
  return Memory<T, A>::load(buffer);
}

template <class T, class A> BN_INLINE void store_partial(T* p, V<A> v, int n) {
#if BN_VECTOR_BYTES == 64
  if (std::is_same<T, float>::value && std::is_same<A, float>::value) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), bit_cast<__m512>(v));
    return;
  }
#endif
  T buffer[lanes<A>()];
  Memory<T, A>::store(buffer, v);
  std::memcpy(p, buffer, static_cast<std::size_t>(n) * sizeof(T));
}

// A stream (non-temporal) store where the processor has one: it bypasses the caches and reads no cache line first. p
// must be aligned to the number of bytes that are written.
template <class T, class A> BN_INLINE void store_stream(T* p, V<A> v) {
#if defined(__x86_64__)
  constexpr int bytes = lanes<A>() * static_cast<int>(sizeof(T));
  alignas(64) T buffer[lanes<A>()];
  Memory<T, A>::store(buffer, v);
  const char* from = reinterpret_cast<const char*>(buffer);
  char* to = reinterpret_cast<char*>(p);
#if BN_VECTOR_BYTES == 64
  if (bytes == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
#endif
#if BN_VECTOR_BYTES >= 32
  if (bytes == 32)
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(to),
                               _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#endif
  if (bytes == 16)
    return _mm_stream_si128(reinterpret_cast<__m128i*>(to), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#endif
  Memory<T, A>::store(p, v);
}

// Forces the compiler to load x here and as a full vector. It might otherwise make this a masked load. A masked load
// waits for its mask, which comes from another load, and reading from memory then is at most half as fast.
template <class X> BN_INLINE void pin_load(X& x) {
#if defined(__x86_64__)
#if BN_VECTOR_BYTES == 64
  asm("" : "+v"(x));
#else
  asm("" : "+x"(x));
#endif
#else
  (void)x;
#endif
}

// Prefetches. The address may be outside of the tensor, because a prefetch never faults.
template <class T> BN_INLINE const void* prefetch_address(const T* p, std::int64_t distance) {
  return reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(p) +
                                       static_cast<std::uintptr_t>(distance) * sizeof(T));
}
template <class T> BN_INLINE void prefetch_l1(const T* p, std::int64_t distance) {
  __builtin_prefetch(prefetch_address(p, distance));
}
// The same for values that will be written: a store needs its cache line too.
template <class T> BN_INLINE void prefetch_l1_write(T* p, std::int64_t distance) {
  __builtin_prefetch(prefetch_address(static_cast<const T*>(p), distance), 1);
}
// The same into the second-level cache.
template <class T> BN_INLINE void prefetch_l2(const T* p, std::int64_t distance) {
  __builtin_prefetch(prefetch_address(p, distance), 0, 2);
}

// The mask of n values, a byte each, as lanes. The lanes after the first n are off.
#if BN_VECTOR_BYTES == 64
BN_INLINE VI valid_lanes(const std::uint8_t* p, int n, float) {
  const __m128i b = _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << n) - 1u), p);
  return bit_cast<VI>(_mm512_movm_epi32(_mm_test_epi8_mask(b, b)));
}
#elif BN_VECTOR_BYTES == 32
BN_INLINE VI valid_lanes(const std::uint8_t* p, int n, float) {
  std::uint64_t b = 0;
  if (n == 8) std::memcpy(&b, p, 8);
  else std::memcpy(&b, p, static_cast<std::size_t>(n));
  return bit_cast<VI>(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(static_cast<long long>(b)))) != 0;
}
#else
BN_INLINE VI valid_lanes(const std::uint8_t* p, int n, float) {
  VI m = {};
  for (int i = 0; i < lanes<float>(); ++i) m[i] = i < n && p[i] ? -1 : 0;
  return m;
}
#endif
BN_INLINE VL valid_lanes(const std::uint8_t* p, int n, double) {
  VL m = {};
  for (int i = 0; i < lanes<double>(); ++i) m[i] = i < n && p[i] ? -1 : 0;
  return m;
}

}  // namespace BN_ISA
}  // namespace bn
