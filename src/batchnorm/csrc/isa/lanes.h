// How a step touches memory: a whole vector, the first lanes of one at the end of a run, or two vectors at once.
// Each way has `units` vectors; `each` calls f with a way to load one of them, whose place is `index`; `one` is how a
// vector of coefficients is loaded beside them.
#pragma once

namespace bn {
namespace BN_ISA {

struct Whole {
  static constexpr int units = 1, index = 0;
  BN_INLINE Whole one() const { return *this; }
  template <class F> BN_INLINE void each(const F& f) const { f(*this); }
  template <class T, class A> BN_INLINE V<A> load(const T* p) const { return Memory<T, A>::load(p); }
  template <class T, class A> BN_INLINE void store(T* p, const V<A>* v, bool stream) const {
    if (stream) store_stream<T, A>(p, v[0]);
    else Memory<T, A>::store(p, v[0]);
  }
  template <class A> BN_INLINE V<A> keep(V<A> v, V<A>) const { return v; }
  int count_of(int all) const { return all; }
};

struct Part {
  static constexpr int units = 1, index = 0;
  int n;
  BN_INLINE Part one() const { return *this; }
  template <class F> BN_INLINE void each(const F& f) const { f(*this); }
  template <class T, class A> BN_INLINE V<A> load(const T* p) const { return load_part<T, A>(p, n); }
  template <class T, class A> BN_INLINE void store(T* p, const V<A>* v, bool) const { store_part<T, A>(p, v[0], n); }
  template <class A> BN_INLINE V<A> keep(V<A> v, V<A> other) const { return first_lanes<A>(n) ? v : other; }
  int count_of(int) const { return n; }
};

// Two neighbors of bfloat16 in a float32 word, taken apart and put together; of a vector of words all or the first n values.
BN_INLINE const float* words(const bf16* p) { return reinterpret_cast<const float*>(p); }
BN_INLINE float* words(bf16* p) { return reinterpret_cast<float*>(p); }
template <int half> BN_INLINE VF half_of(VF both) {
  return bits<VF>(half ? bits<VU>(both) & 0xffff0000u : bits<VU>(both) << 16);
}
BN_INLINE VF both_halves(const VF* v) {
  return bits<VF>(rounded_bf16(v[0]) >> 16 | (rounded_bf16(v[1]) & 0xffff0000u));
}
BN_INLINE VF load_halves(const bf16* p, int n) {
#if BN_VECTOR_BYTES == 64
  return bits<VF>(_mm512_maskz_loadu_epi16((__mmask32{1} << n) - 1u, p));
#else
  VF both = {};
  std::memcpy(&both, p, static_cast<std::size_t>(n) * sizeof *p);
  return both;
#endif
}
BN_INLINE void store_halves(bf16* p, VF both, int n) {
#if BN_VECTOR_BYTES == 64
  _mm512_mask_storeu_epi16(p, (__mmask32{1} << n) - 1u, bits<__m512i>(both));
#else
  std::memcpy(p, &both, static_cast<std::size_t>(n) * sizeof *p);
#endif
}

// bfloat16, twice as many values as a vector holds: those at even places and those at odd ones. A float32 word of two
// neighbors gives either by one operation, and takes both back by two, where neighbors in memory that are to be
// neighbors in a register go through the shuffles. One line of cache a step, besides.
template <int half> struct Half {
  static constexpr int index = half;
  template <class T, class A> BN_INLINE V<A> load(const T* p) const { return half_of<half>(convert(words(p))); }
  template <class A> BN_INLINE V<A> keep(V<A> v, V<A>) const { return v; }
};
struct Pair {
  static constexpr int units = 2;
  BN_INLINE Whole one() const { return {}; }
  template <class F> BN_INLINE void each(const F& f) const {
    f(Half<0>{});
    f(Half<1>{});
  }
  template <class T, class A> BN_INLINE void store(T* p, const VF* v, bool stream) const {
    const VF both = both_halves(v);
    if (stream) store_stream<float, float>(words(p), both);
    else convert(words(p), both);
  }
};

// The first n values of a Pair.
template <int half> struct PartHalf {
  static constexpr int index = half;
  int n;
  template <class T, class A> BN_INLINE V<A> load(const T* p) const { return half_of<half>(load_halves(p, n)); }
  template <class A> BN_INLINE V<A> keep(V<A> v, V<A> other) const { return first_lanes<A>((n + 1 - half) / 2) ? v : other; }
};
struct PartPair {
  static constexpr int units = 2;
  int n;
  template <class F> BN_INLINE void each(const F& f) const {
    f(PartHalf<0>{n});
    f(PartHalf<1>{n});
  }
  template <class T, class A> BN_INLINE void store(T* p, const VF* v, bool) const { store_halves(p, both_halves(v), n); }
};

// The way for most of a row, and those for what remains of a line.
template <class T, class A> using Unit = std::conditional_t<std::is_same_v<T, bf16> && std::is_same_v<A, float>, Pair, Whole>;
template <class Way> using Rest = std::conditional_t<std::is_same_v<Way, Pair>, PartPair, Part>;

// Columns that are taken as those at even places and those at odd ones, `half` of each: so lie their coefficients and
// their sums. Fewer columns at the end are taken as they come.
template <int half, class T> void in_pairs(T* values, std::int64_t n, bool back) {
  for (; n >= 2 * half; n -= 2 * half, values += 2 * half) {
    T moved[2 * half];
    for (int i = 0; i < half; ++i) {
      moved[back ? 2 * i : i] = values[back ? i : 2 * i];
      moved[back ? 2 * i + 1 : half + i] = values[back ? half + i : 2 * i + 1];
    }
    std::memcpy(values, moved, sizeof moved);
  }
}

template <class A, class Lanes> BN_INLINE M<A> mask_line(const std::uint8_t* mask, Lanes mem) {
  return mask_lanes(mask, mem.count_of(lanes<A>()), A{});
}

}  // namespace BN_ISA
}  // namespace bn
