// Vectors of BN_VECTOR_BYTES bytes: their types, and the conversions of float16 and bfloat16.
// One translation unit for each instruction set includes the headers of this folder, after all standard headers and in
// a namespace of its own. The linker keeps one copy of an inline function; this way no copy that was compiled for
// AVX-512 can replace the one for other processors.
#pragma once

namespace bn {
namespace BN_ISA {

#define BN_INLINE inline __attribute__((always_inline))
#define BN_ALWAYS __attribute__((always_inline))  // for a lambda, after its parameters

constexpr int kVectorBytes = BN_VECTOR_BYTES;
typedef float VF __attribute__((vector_size(kVectorBytes)));
typedef double VD __attribute__((vector_size(kVectorBytes)));
typedef std::int32_t VI __attribute__((vector_size(kVectorBytes)));
typedef std::uint32_t VU __attribute__((vector_size(kVectorBytes)));
typedef std::int64_t VL __attribute__((vector_size(kVectorBytes)));
typedef std::uint16_t VU16 __attribute__((vector_size(kVectorBytes / 2)));  // as many lanes as VF

struct bf16 {
  std::uint16_t bits;
};
struct f16 {
  std::uint16_t bits;
};

template <class A> struct VectorTypes;
template <> struct VectorTypes<float> {
  typedef VF V;
  typedef VI M;
  typedef std::int32_t Lane;
};
template <> struct VectorTypes<double> {
  typedef VD V;
  typedef VL M;
  typedef std::int64_t Lane;
};
// A is the type in which a loop computes. V<A> is a vector of it, M<A> the result of a comparison.
template <class A> using V = typename VectorTypes<A>::V;
template <class A> using M = typename VectorTypes<A>::M;
template <class A> constexpr int lanes() { return kVectorBytes / static_cast<int>(sizeof(A)); }

// Calls f(0), f(1), ..., f(n - 1) with constants. An array of vectors stays in registers if all its indices are
// constants, but not if the index is the variable of a loop.
template <class F, int... I> BN_INLINE void unroll(const F& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int n, class F> BN_INLINE void unroll(const F& f) { unroll(f, std::make_integer_sequence<int, n>{}); }

template <class To, class From> BN_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// a - 0 keeps the sign of a zero; a + 0 would not.
template <class A> BN_INLINE V<A> broadcast(A a) { return a - V<A>{}; }

template <class A> BN_INLINE M<A> first_lanes(int n) {
  M<A> index = {};
  for (int i = 0; i < lanes<A>(); ++i) index[i] = i;
  return index < static_cast<typename VectorTypes<A>::Lane>(n);
}

inline float f16_value(std::uint16_t h) {
  const std::uint32_t sign = (h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // The exponent is read with the bias of float32. The factor 2^112 corrects it. This is exact, also for subnormals.
  return bit_cast<float>(sign | bit_cast<std::uint32_t>(bit_cast<float>(magnitude << 13) * 0x1p112f));
}

inline std::uint16_t f16_bits(float value) {
  const std::uint32_t u = bit_cast<std::uint32_t>(value), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {  // subnormal: the addition of 0.5 rounds it
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    return static_cast<std::uint16_t>(sign | (bit_cast<std::uint32_t>(shifted) - 0x3f000000u));
  }
  const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u;
  return static_cast<std::uint16_t>(sign | rounded >> 13);
}

// bfloat16 is the upper 16 bits of a float32, rounded to nearest even. These conversions use intrinsics because
// compilers need four instructions for each of them. A NaN needs no special case: the rounding could carry into the
// sign only if all lower bits of the payload were 1. Arithmetic on bfloat16 data gives no such payload, and
// Coefficients::convert removes it from weight and bias.

// In each word the upper 16 bits are the rounded value. The lower 16 bits have no meaning.
BN_INLINE VU round_bf16(VF v) {
  const VU u = bit_cast<VU>(v);
#if BN_VECTOR_BYTES == 64
  // One 16-bit part of each word becomes the last bit of the result, the other 0x7fff. One instruction adds both parts.
  const __m512i addends =
      _mm512_ternarylogic_epi32(bit_cast<__m512i>(u), _mm512_set1_epi32(0x10000), _mm512_set1_epi32(0x7fff), 0xea);
  return u + bit_cast<VU>(_mm512_madd_epi16(addends, _mm512_set1_epi16(1)));
#else
  return u + 0x7fffu + ((u >> 16) & 1u);
#endif
}
#if BN_VECTOR_BYTES == 64
BN_INLINE VF widen(VU16 h, bf16) {
  return bit_cast<VF>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bit_cast<__m256i>(h)), 16));
}
BN_INLINE VU16 narrow(VF v, bf16) {
  return bit_cast<VU16>(_mm512_cvtepi32_epi16(_mm512_srli_epi32(bit_cast<__m512i>(round_bf16(v)), 16)));
}
#elif BN_VECTOR_BYTES == 32
BN_INLINE VF widen(VU16 h, bf16) {
  return bit_cast<VF>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bit_cast<__m128i>(h)), 16));
}
BN_INLINE VU16 narrow(VF v, bf16) {
  const __m256i word = bit_cast<__m256i>(round_bf16(v) >> 16);
  return bit_cast<VU16>(_mm_packus_epi32(_mm256_castsi256_si128(word), _mm256_extracti128_si256(word, 1)));
}
#else
BN_INLINE VF widen(VU16 h, bf16) { return bit_cast<VF>(__builtin_convertvector(h, VU) << 16); }
BN_INLINE VU16 narrow(VF v, bf16) { return __builtin_convertvector(round_bf16(v) >> 16, VU16); }
#endif

#if BN_VECTOR_BYTES == 64
BN_INLINE VF widen(VU16 h, f16) { return bit_cast<VF>(_mm512_cvtph_ps(bit_cast<__m256i>(h))); }
BN_INLINE VU16 narrow(VF v, f16) {
  return bit_cast<VU16>(_mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
}
#elif BN_VECTOR_BYTES == 32
BN_INLINE VF widen(VU16 h, f16) { return bit_cast<VF>(_mm256_cvtph_ps(bit_cast<__m128i>(h))); }
BN_INLINE VU16 narrow(VF v, f16) {
  return bit_cast<VU16>(_mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
}
#else
BN_INLINE VF widen(VU16 h, f16) {
  VF v = {};
  for (int i = 0; i < lanes<float>(); ++i) v[i] = f16_value(h[i]);
  return v;
}
BN_INLINE VU16 narrow(VF v, f16) {
  VU16 h = {};
  for (int i = 0; i < lanes<float>(); ++i) h[i] = f16_bits(v[i]);
  return h;
}
#endif

}  // namespace BN_ISA
}  // namespace bn
