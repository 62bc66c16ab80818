// Vector functions that need intrinsics, and float64 accumulators of float32 vectors.
#pragma once

#include "memory.h"

namespace bn {
namespace BN_ISA {

// max(0, z), and NaN where z is NaN, as the processors define it.
#if BN_VECTOR_BYTES == 64
BN_INLINE VF max_with_zero(VF z) { return bit_cast<VF>(_mm512_max_ps(_mm512_setzero_ps(), bit_cast<__m512>(z))); }
#elif BN_VECTOR_BYTES == 32
BN_INLINE VF max_with_zero(VF z) { return bit_cast<VF>(_mm256_max_ps(_mm256_setzero_ps(), bit_cast<__m256>(z))); }
#elif defined(__x86_64__)
BN_INLINE VF max_with_zero(VF z) { return bit_cast<VF>(_mm_max_ps(_mm_setzero_ps(), bit_cast<__m128>(z))); }
#else
BN_INLINE VF max_with_zero(VF z) { return z < 0 ? VF{} : z; }
#endif
BN_INLINE VD max_with_zero(VD z) { return z < 0 ? VD{} : z; }

#if BN_VECTOR_BYTES == 64
BN_INLINE VD square_root(VD v) { return bit_cast<VD>(_mm512_sqrt_pd(bit_cast<__m512d>(v))); }
#elif BN_VECTOR_BYTES == 32
BN_INLINE VD square_root(VD v) { return bit_cast<VD>(_mm256_sqrt_pd(bit_cast<__m256d>(v))); }
#else
BN_INLINE VD square_root(VD v) { return VD{std::sqrt(v[0]), std::sqrt(v[1])}; }
#endif

#if BN_VECTOR_BYTES == 64
BN_INLINE VD low_doubles(VF v) { return bit_cast<VD>(_mm512_cvtps_pd(_mm512_castps512_ps256(bit_cast<__m512>(v)))); }
BN_INLINE VD high_doubles(VF v) {
  return bit_cast<VD>(_mm512_cvtps_pd(_mm512_extractf32x8_ps(bit_cast<__m512>(v), 1)));
}
#elif BN_VECTOR_BYTES == 32
BN_INLINE VD low_doubles(VF v) { return bit_cast<VD>(_mm256_cvtps_pd(_mm256_castps256_ps128(bit_cast<__m256>(v)))); }
BN_INLINE VD high_doubles(VF v) { return bit_cast<VD>(_mm256_cvtps_pd(_mm256_extractf128_ps(bit_cast<__m256>(v), 1))); }
#else
BN_INLINE VD low_doubles(VF v) { return VD{v[0], v[1]}; }
BN_INLINE VD high_doubles(VF v) { return VD{v[2], v[3]}; }
#endif

// As many lanes as VD.
typedef float NarrowVF __attribute__((vector_size(kVectorBytes / 2)));
typedef std::uint32_t NarrowVU __attribute__((vector_size(kVectorBytes / 2)));
#if BN_VECTOR_BYTES == 64
BN_INLINE NarrowVF to_float32(VD v) { return bit_cast<NarrowVF>(_mm512_cvtpd_ps(bit_cast<__m512d>(v))); }
BN_INLINE VD to_float64(NarrowVF v) { return bit_cast<VD>(_mm512_cvtps_pd(bit_cast<__m256>(v))); }
#elif BN_VECTOR_BYTES == 32
BN_INLINE NarrowVF to_float32(VD v) { return bit_cast<NarrowVF>(_mm256_cvtpd_ps(bit_cast<__m256d>(v))); }
BN_INLINE VD to_float64(NarrowVF v) { return bit_cast<VD>(_mm256_cvtps_pd(bit_cast<__m128>(v))); }
#else
BN_INLINE NarrowVF to_float32(VD v) { return NarrowVF{static_cast<float>(v[0]), static_cast<float>(v[1])}; }
BN_INLINE VD to_float64(NarrowVF v) { return VD{v[0], v[1]}; }
#endif

// The values of a V<A> as float64: two vectors for float, one for double. In the second case b is zero and costs
// nothing.
struct Doubles {
  VD a, b;
};
BN_INLINE Doubles doubles(VF v) { return {low_doubles(v), high_doubles(v)}; }
BN_INLINE Doubles doubles(VD v) { return {v, VD{}}; }
// As many values as a V<A> has, from memory. bfloat16 values come in another order: those at even places are in a,
// those at odd places in b. Each is widened from a vector of 32-bit words, which saves the shuffles.
template <class A, class T> BN_INLINE Doubles load_as_doubles(const T* p) { return doubles(Memory<T, A>::load(p)); }
template <> BN_INLINE Doubles load_as_doubles<float, bf16>(const bf16* p) {
  NarrowVU words;
  std::memcpy(&words, p, sizeof words);
  return {to_float64(bit_cast<NarrowVF>(words << 16)), to_float64(bit_cast<NarrowVF>(words & 0xffff0000u))};
}
template <class A> BN_INLINE Doubles load_doubles(const double* p) {
  return {load_unaligned(p), sizeof(A) == 4 ? load_unaligned(p + lanes<double>()) : VD{}};
}
template <class A> BN_INLINE void store_doubles(double* p, Doubles d) {
  store_unaligned(p, d.a);
  if (sizeof(A) == 4) store_unaligned(p + lanes<double>(), d.b);
}
BN_INLINE void add(Doubles& sum, Doubles v) {
  sum.a += v.a;
  sum.b += v.b;
}
BN_INLINE void add_product(Doubles& sum, Doubles u, Doubles v) {
  sum.a += u.a * v.a;
  sum.b += u.b * v.b;
}
BN_INLINE double sum_lanes(Doubles d) {  // pairwise; the order depends on the length of a vector alone
  VD v = d.a + d.b;
  double each[lanes<double>()];
  store_unaligned(each, v);
  for (int n = lanes<double>() / 2; n; n /= 2)
    for (int i = 0; i < n; ++i) each[i] += each[i + n];
  return each[0];
}

}  // namespace BN_ISA
}  // namespace bn
