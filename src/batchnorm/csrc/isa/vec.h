// Vectors of BN_VECTOR_BYTES: types, loads, stores, conversions. Included by one translation unit per instruction set,
// inside its own namespace, after every standard header, so that no inline function compiled for AVX-512 can be the
// copy that the linker keeps for everyone.
#pragma once

namespace bn {
namespace BN_ISA {

#define BN_INLINE inline __attribute__((always_inline))
#define BN_ALWAYS __attribute__((always_inline))  // behind a lambda's parameters

constexpr int kBytes = BN_VECTOR_BYTES;
typedef float VF __attribute__((vector_size(kBytes)));
typedef double VD __attribute__((vector_size(kBytes)));
typedef std::int32_t VI __attribute__((vector_size(kBytes)));
typedef std::uint32_t VU __attribute__((vector_size(kBytes)));
typedef std::int64_t VL __attribute__((vector_size(kBytes)));
typedef std::uint16_t HalfU16 __attribute__((vector_size(kBytes / 2)));

struct bf16 { std::uint16_t bits; };
struct f16 { std::uint16_t bits; };

template <class A> struct Simd;
template <> struct Simd<float> {
  typedef VF V;
  typedef VI M;
  typedef std::int32_t Lane;
};
template <> struct Simd<double> {
  typedef VD V;
  typedef VL M;
  typedef std::int64_t Lane;
};
template <class A> using V = typename Simd<A>::V;
template <class A> using M = typename Simd<A>::M;
template <class A> constexpr int lanes() { return kBytes / static_cast<int>(sizeof(A)); }

// f(0), f(1), ... written out: an array of vectors indexed by constants stays in registers, by a loop's variable it does not.
template <class F, int... I> BN_INLINE void each(const F& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int n, class F> BN_INLINE void unrolled(const F& f) { each(f, std::make_integer_sequence<int, n>{}); }

template <class To, class From> BN_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class A> BN_INLINE V<A> spread(A a) { return a - V<A>{}; }  // a - 0 keeps the sign of a zero

template <class A> BN_INLINE M<A> first_lanes(int n) {
  M<A> index = {};
  for (int i = 0; i < lanes<A>(); ++i) index[i] = i;
  return index < static_cast<typename Simd<A>::Lane>(n);
}

// --- float16, bfloat16 ------------------------------------------------------------------------------------------
inline float f16_value(std::uint16_t h) {
  const std::uint32_t sign = (h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // as if the exponent's bias were float32's, then scaled by 2^112: exact, subnormals included
  return bits<float>(sign | bits<std::uint32_t>(bits<float>(magnitude << 13) * 0x1p112f));
}

inline std::uint16_t f16_bits(float value) {
  const std::uint32_t u = bits<std::uint32_t>(value), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {  // subnormal: let the addition of 0.5 round it
    const float shifted = bits<float>(magnitude) + 0.5f;
    return static_cast<std::uint16_t>(sign | (bits<std::uint32_t>(shifted) - 0x3f000000u));
  }
  const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u;
  return static_cast<std::uint16_t>(sign | rounded >> 13);
}

// bfloat16 is the upper half of a float32, rounded to nearest even. Compilers convert in halves, which costs four
// instructions for one. A NaN stays one without a look at it: only a payload of ones in the lower half could carry into
// the sign, and none comes from bfloat16 data and arithmetic on them (Coefficients::encode keeps it out of γ and β).
// The rounded value in the upper half of each word, what is left over in the lower.
BN_INLINE VU rounded_bf16(VF v) {
  const VU u = bits<VU>(v);
#if BN_VECTOR_BYTES == 64
  // the last bit kept and 0x7fff as the halves of a word, and their sum: one operation less
  const __m512i halves = _mm512_ternarylogic_epi32(bits<__m512i>(u), _mm512_set1_epi32(0x10000), _mm512_set1_epi32(0x7fff), 0xea);
  return u + bits<VU>(_mm512_madd_epi16(halves, _mm512_set1_epi16(1)));
#else
  return u + 0x7fffu + ((u >> 16) & 1u);
#endif
}
#if BN_VECTOR_BYTES == 64
BN_INLINE VF widen(HalfU16 h, bf16) {
  return bits<VF>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits<__m256i>(h)), 16));
}
BN_INLINE HalfU16 narrow(VF v, bf16) {
  return bits<HalfU16>(_mm512_cvtepi32_epi16(_mm512_srli_epi32(bits<__m512i>(rounded_bf16(v)), 16)));
}
#elif BN_VECTOR_BYTES == 32
BN_INLINE VF widen(HalfU16 h, bf16) {
  return bits<VF>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits<__m128i>(h)), 16));
}
BN_INLINE HalfU16 narrow(VF v, bf16) {
  const __m256i word = bits<__m256i>(rounded_bf16(v) >> 16);
  return bits<HalfU16>(_mm_packus_epi32(_mm256_castsi256_si128(word), _mm256_extracti128_si256(word, 1)));
}
#else
BN_INLINE VF widen(HalfU16 h, bf16) { return bits<VF>(__builtin_convertvector(h, VU) << 16); }
BN_INLINE HalfU16 narrow(VF v, bf16) { return __builtin_convertvector(rounded_bf16(v) >> 16, HalfU16); }
#endif

#if BN_VECTOR_BYTES == 64
BN_INLINE VF widen(HalfU16 h, f16) { return bits<VF>(_mm512_cvtph_ps(bits<__m256i>(h))); }
BN_INLINE HalfU16 narrow(VF v, f16) {
  return bits<HalfU16>(_mm512_cvtps_ph(bits<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
}
#elif BN_VECTOR_BYTES == 32
BN_INLINE VF widen(HalfU16 h, f16) { return bits<VF>(_mm256_cvtph_ps(bits<__m128i>(h))); }
BN_INLINE HalfU16 narrow(VF v, f16) {
  return bits<HalfU16>(_mm256_cvtps_ph(bits<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
}
#else
BN_INLINE VF widen(HalfU16 h, f16) {
  VF v = {};
  for (int i = 0; i < lanes<float>(); ++i) v[i] = f16_value(h[i]);
  return v;
}
BN_INLINE HalfU16 narrow(VF v, f16) {
  HalfU16 h = {};
  for (int i = 0; i < lanes<float>(); ++i) h[i] = f16_bits(v[i]);
  return h;
}
#endif

// --- loads and stores -------------------------------------------------------------------------------------------
template <class A> BN_INLINE V<A> convert(const A* p) {
  V<A> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class A> BN_INLINE void convert(A* p, V<A> v) { std::memcpy(p, &v, sizeof v); }

template <class T> BN_INLINE VF widened(const T* p) {
  HalfU16 h = {};
  std::memcpy(&h, p, sizeof h);
  return widen(h, T{});
}

template <class T, class A> struct Memory;  // T in memory, A in registers

template <class A> struct Memory<A, A> {
  static BN_INLINE V<A> load(const A* p) { return convert(p); }
  static BN_INLINE void store(A* p, V<A> v) { convert(p, v); }
};
template <> struct Memory<bf16, float> {
  static BN_INLINE VF load(const bf16* p) { return widened(p); }
  static BN_INLINE void store(bf16* p, VF v) { const HalfU16 h = narrow(v, bf16{}); std::memcpy(p, &h, sizeof h); }
};
template <> struct Memory<f16, float> {
  static BN_INLINE VF load(const f16* p) { return widened(p); }
  static BN_INLINE void store(f16* p, VF v) { const HalfU16 h = narrow(v, f16{}); std::memcpy(p, &h, sizeof h); }
};

BN_INLINE double scalar(double x) { return x; }
BN_INLINE double scalar(float x) { return x; }
BN_INLINE double scalar(bf16 x) { return bits<float>(static_cast<std::uint32_t>(x.bits) << 16); }
BN_INLINE double scalar(f16 x) { return f16_value(x.bits); }
BN_INLINE void assign(double& to, double v) { to = v; }
BN_INLINE void assign(float& to, double v) { to = static_cast<float>(v); }
// Through float32 the value would be rounded twice; a sticky last bit makes the second rounding see the first's rest.
BN_INLINE float odd_float(double v) {
  const float f = static_cast<float>(v);
  if (static_cast<double>(f) == v || f != f) return f;
  std::uint32_t u = bits<std::uint32_t>(f);
  const bool away = (static_cast<double>(f) > v) == (v > 0);
  if (away) --u;
  return bits<float>(u | 1u);
}
BN_INLINE void assign(bf16& to, double v) {
  const std::uint32_t u = bits<std::uint32_t>(odd_float(v));
  to.bits = static_cast<std::uint16_t>(v != v ? 0x7fc0u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
BN_INLINE void assign(f16& to, double v) { to.bits = f16_bits(odd_float(v)); }

template <class T> struct Memory<T, double> {  // the rare wide loops: scalar conversions are good enough
  static BN_INLINE VD load(const T* p) {
    VD v = {};
    for (int i = 0; i < lanes<double>(); ++i) v[i] = scalar(p[i]);
    return v;
  }
  static BN_INLINE void store(T* p, VD v) {
    for (int i = 0; i < lanes<double>(); ++i) assign(p[i], v[i]);
  }
};
template <> struct Memory<double, double> {
  static BN_INLINE VD load(const double* p) { return convert(p); }
  static BN_INLINE void store(double* p, VD v) { convert(p, v); }
};

// The first n lanes only; the others read as zero and are not written.
template <class T, class A> BN_INLINE V<A> load_part(const T* p, int n) {
#if BN_VECTOR_BYTES == 64
  const std::uint32_t keep = (1u << n) - 1u;
  if (std::is_same<T, float>::value && std::is_same<A, float>::value)
    return bits<V<A>>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(keep), p));
  if (sizeof(T) == 2 && std::is_same<A, float>::value) {
    const __m256i h = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(keep), p);
    T whole[lanes<float>()];
    std::memcpy(whole, &h, sizeof h < sizeof whole ? sizeof h : sizeof whole);
    return Memory<T, A>::load(whole);
  }
#endif
  T whole[lanes<A>()];
  std::memset(whole, 0, sizeof whole);
  std::memcpy(whole, p, static_cast<std::size_t>(n) * sizeof(T));
  return Memory<T, A>::load(whole);
}

template <class T, class A> BN_INLINE void store_part(T* p, V<A> v, int n) {
#if BN_VECTOR_BYTES == 64
  if (std::is_same<T, float>::value && std::is_same<A, float>::value) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), bits<__m512>(v));
    return;
  }
#endif
  T whole[lanes<A>()];
  Memory<T, A>::store(whole, v);
  std::memcpy(p, whole, static_cast<std::size_t>(n) * sizeof(T));
}

// Writes around the caches (no read for ownership) where the processor can; p is aligned to the bytes written.
template <class T, class A> BN_INLINE void store_stream(T* p, V<A> v) {
#if defined(__x86_64__)
  constexpr int bytes = lanes<A>() * static_cast<int>(sizeof(T));
  alignas(64) T whole[lanes<A>()];
  Memory<T, A>::store(whole, v);
  const char* from = reinterpret_cast<const char*>(whole);
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

// Keeps a load whole and where it stands: a load that the compiler turns into a masked one waits for its mask, that is
// for another load, and a stream from memory then runs at half its speed or less.
template <class X> BN_INLINE void loaded(X& x) {
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

// Reads ahead of a stream. The address may lie beyond the tensor: a prefetch faults never.
template <class T> BN_INLINE const void* beyond(const T* p, std::int64_t values) {
  return reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(p) + static_cast<std::uintptr_t>(values) * sizeof(T));
}
template <class T> BN_INLINE void ahead(const T* p, std::int64_t values) { __builtin_prefetch(beyond(p, values)); }
// The same for what will be written, whose line is fetched all the same.
template <class T> BN_INLINE void ahead_to_write(T* p, std::int64_t values) {
  __builtin_prefetch(beyond(static_cast<const T*>(p), values), 1);
}
// The same into the second-level cache, for what the next pass will read.
template <class T> BN_INLINE void far_ahead(const T* p, std::int64_t values) { __builtin_prefetch(beyond(p, values), 0, 2); }

// A byte a value as a mask over lanes; of a part, the lanes beyond it are off.
#if BN_VECTOR_BYTES == 64
BN_INLINE VI mask_lanes(const std::uint8_t* p, int n, float) {
  const __m128i b = _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << n) - 1u), p);
  return bits<VI>(_mm512_movm_epi32(_mm_test_epi8_mask(b, b)));
}
#elif BN_VECTOR_BYTES == 32
BN_INLINE VI mask_lanes(const std::uint8_t* p, int n, float) {
  std::uint64_t b = 0;
  if (n == 8) std::memcpy(&b, p, 8);
  else std::memcpy(&b, p, static_cast<std::size_t>(n));
  return bits<VI>(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(static_cast<long long>(b)))) != 0;
}
#else
BN_INLINE VI mask_lanes(const std::uint8_t* p, int n, float) {
  VI m = {};
  for (int i = 0; i < lanes<float>(); ++i) m[i] = i < n && p[i] ? -1 : 0;
  return m;
}
#endif
BN_INLINE VL mask_lanes(const std::uint8_t* p, int n, double) {
  VL m = {};
  for (int i = 0; i < lanes<double>(); ++i) m[i] = i < n && p[i] ? -1 : 0;
  return m;
}

// max(0, z) as the processors have it: z where it is NaN.
#if BN_VECTOR_BYTES == 64
BN_INLINE VF rectified(VF z) { return bits<VF>(_mm512_max_ps(_mm512_setzero_ps(), bits<__m512>(z))); }
#elif BN_VECTOR_BYTES == 32
BN_INLINE VF rectified(VF z) { return bits<VF>(_mm256_max_ps(_mm256_setzero_ps(), bits<__m256>(z))); }
#elif defined(__x86_64__)
BN_INLINE VF rectified(VF z) { return bits<VF>(_mm_max_ps(_mm_setzero_ps(), bits<__m128>(z))); }
#else
BN_INLINE VF rectified(VF z) { return z < 0 ? VF{} : z; }
#endif
BN_INLINE VD rectified(VD z) { return z < 0 ? VD{} : z; }

#if BN_VECTOR_BYTES == 64
BN_INLINE VD square_root(VD v) { return bits<VD>(_mm512_sqrt_pd(bits<__m512d>(v))); }
#elif BN_VECTOR_BYTES == 32
BN_INLINE VD square_root(VD v) { return bits<VD>(_mm256_sqrt_pd(bits<__m256d>(v))); }
#else
BN_INLINE VD square_root(VD v) { return VD{std::sqrt(v[0]), std::sqrt(v[1])}; }
#endif

// --- float64 accumulators ---------------------------------------------------------------------------------------
#if BN_VECTOR_BYTES == 64
BN_INLINE VD low_doubles(VF v) { return bits<VD>(_mm512_cvtps_pd(_mm512_castps512_ps256(bits<__m512>(v)))); }
BN_INLINE VD high_doubles(VF v) { return bits<VD>(_mm512_cvtps_pd(_mm512_extractf32x8_ps(bits<__m512>(v), 1))); }
#elif BN_VECTOR_BYTES == 32
BN_INLINE VD low_doubles(VF v) { return bits<VD>(_mm256_cvtps_pd(_mm256_castps256_ps128(bits<__m256>(v)))); }
BN_INLINE VD high_doubles(VF v) { return bits<VD>(_mm256_cvtps_pd(_mm256_extractf128_ps(bits<__m256>(v), 1))); }
#else
BN_INLINE VD low_doubles(VF v) { return VD{v[0], v[1]}; }
BN_INLINE VD high_doubles(VF v) { return VD{v[2], v[3]}; }
#endif

typedef float HalfF __attribute__((vector_size(kBytes / 2)));
typedef std::uint32_t HalfU32 __attribute__((vector_size(kBytes / 2)));
#if BN_VECTOR_BYTES == 64
BN_INLINE HalfF rounded(VD v) { return bits<HalfF>(_mm512_cvtpd_ps(bits<__m512d>(v))); }
BN_INLINE VD wide(HalfF v) { return bits<VD>(_mm512_cvtps_pd(bits<__m256>(v))); }
#elif BN_VECTOR_BYTES == 32
BN_INLINE HalfF rounded(VD v) { return bits<HalfF>(_mm256_cvtpd_ps(bits<__m256d>(v))); }
BN_INLINE VD wide(HalfF v) { return bits<VD>(_mm256_cvtps_pd(bits<__m128>(v))); }
#else
BN_INLINE HalfF rounded(VD v) { return HalfF{static_cast<float>(v[0]), static_cast<float>(v[1])}; }
BN_INLINE VD wide(HalfF v) { return VD{v[0], v[1]}; }
#endif

// A vector of A as float64: two vectors for float, one for double (b then stays zero and costs nothing).
struct Doubles {
  VD a, b;
};
BN_INLINE Doubles doubles(VF v) { return {low_doubles(v), high_doubles(v)}; }
BN_INLINE Doubles doubles(VD v) { return {v, VD{}}; }
// A vector's worth of values as they lie in memory. bfloat16 as those at even places and those at odd ones, of half as
// long a vector of words, which widens without being taken apart first.
template <class A, class T> BN_INLINE Doubles doubles_at(const T* p) { return doubles(Memory<T, A>::load(p)); }
template <> BN_INLINE Doubles doubles_at<float, bf16>(const bf16* p) {
  HalfU32 words;
  std::memcpy(&words, p, sizeof words);
  return {wide(bits<HalfF>(words << 16)), wide(bits<HalfF>(words & 0xffff0000u))};
}
template <class A> BN_INLINE Doubles load_doubles(const double* p) {
  return {convert(p), sizeof(A) == 4 ? convert(p + lanes<double>()) : VD{}};
}
template <class A> BN_INLINE void store_doubles(double* p, Doubles d) {
  convert(p, d.a);
  if (sizeof(A) == 4) convert(p + lanes<double>(), d.b);
}
BN_INLINE void add(Doubles& sum, Doubles v) {
  sum.a += v.a;
  sum.b += v.b;
}
BN_INLINE void add_product(Doubles& sum, Doubles u, Doubles v) {
  sum.a += u.a * v.a;
  sum.b += u.b * v.b;
}
BN_INLINE double total(Doubles d) {  // in pairs: the same for a given vector length
  VD v = d.a + d.b;
  double each[lanes<double>()];
  convert(each, v);
  for (int n = lanes<double>() / 2; n; n /= 2)
    for (int i = 0; i < n; ++i) each[i] += each[i + n];
  return each[0];
}

}  // namespace BN_ISA
}  // namespace bn
