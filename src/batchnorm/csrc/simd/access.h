// How one step of a loop accesses memory: a full vector, a partial vector at the end of a row, or for bfloat16 two
// vectors at once. An access type has
//   vectors          the number of vectors
//   for_each(f)      calls f with an access to each of them; `index` is its number
//   coef_access()    the access to a vector of coefficients that belongs to one of them
#pragma once

#include "memory.h"

namespace bn {
namespace BN_ISA {

struct FullVector {
  static constexpr int vectors = 1, index = 0;
  BN_INLINE FullVector coef_access() const { return *this; }
  template <class F> BN_INLINE void for_each(const F& f) const { f(*this); }
  template <class T, class A> BN_INLINE V<A> load(const T* p) const { return Memory<T, A>::load(p); }
  template <class T, class A> BN_INLINE void store(T* p, const V<A>* v, bool stream) const {
    if (stream) store_stream<T, A>(p, v[0]);
    else Memory<T, A>::store(p, v[0]);
  }
  // v in the lanes that belong to the row, `other` in the lanes after its end.
  template <class A> BN_INLINE V<A> select(V<A> v, V<A>) const { return v; }
  int count(int all) const { return all; }
};

struct PartialVector {
  static constexpr int vectors = 1, index = 0;
  int n;
  BN_INLINE PartialVector coef_access() const { return *this; }
  template <class F> BN_INLINE void for_each(const F& f) const { f(*this); }
  template <class T, class A> BN_INLINE V<A> load(const T* p) const { return load_partial<T, A>(p, n); }
  template <class T, class A> BN_INLINE void store(T* p, const V<A>* v, bool) const { store_partial<T, A>(p, v[0], n); }
  template <class A> BN_INLINE V<A> select(V<A> v, V<A> other) const { return first_lanes<A>(n) ? v : other; }
  int count(int) const { return n; }
};

// A 32-bit word in memory holds two bfloat16 values, an even one (lower 16 bits) and an odd one. A vector of words
// gives a vector of the even values by a shift and a vector of the odd ones by a mask. The functions with an n access
// only the first n values.
BN_INLINE const float* as_words(const bf16* p) { return reinterpret_cast<const float*>(p); }
BN_INLINE float* as_words(bf16* p) { return reinterpret_cast<float*>(p); }
template <int odd> BN_INLINE VF even_or_odd(VF words) {
  return bit_cast<VF>(odd ? bit_cast<VU>(words) & 0xffff0000u : bit_cast<VU>(words) << 16);
}
BN_INLINE VF to_words(const VF* even_odd) {
  return bit_cast<VF>(round_bf16(even_odd[0]) >> 16 | (round_bf16(even_odd[1]) & 0xffff0000u));
}
BN_INLINE VF load_words(const bf16* p, int n) {
#if BN_VECTOR_BYTES == 64
  return bit_cast<VF>(_mm512_maskz_loadu_epi16((__mmask32{1} << n) - 1u, p));
#else
  VF words = {};
  std::memcpy(&words, p, static_cast<std::size_t>(n) * sizeof *p);
  return words;
#endif
}
BN_INLINE void store_words(bf16* p, VF words, int n) {
#if BN_VECTOR_BYTES == 64
  _mm512_mask_storeu_epi16(p, (__mmask32{1} << n) - 1u, bit_cast<__m512i>(words));
#else
  std::memcpy(p, &words, static_cast<std::size_t>(n) * sizeof *p);
#endif
}

// bfloat16: twice as many values as a vector has lanes, as a vector of the even and a vector of the odd ones. Neighbors
// in memory that stay neighbors in a register would need shuffles. Besides, one step then is a full cache line.
template <int odd> struct EvenOrOdd {
  static constexpr int index = odd;
  template <class T, class A> BN_INLINE V<A> load(const T* p) const {
    return even_or_odd<odd>(load_unaligned(as_words(p)));
  }
  template <class A> BN_INLINE V<A> select(V<A> v, V<A>) const { return v; }
};
struct EvenAndOdd {
  static constexpr int vectors = 2;
  BN_INLINE FullVector coef_access() const { return {}; }
  template <class F> BN_INLINE void for_each(const F& f) const {
    f(EvenOrOdd<0>{});
    f(EvenOrOdd<1>{});
  }
  template <class T, class A> BN_INLINE void store(T* p, const VF* v, bool stream) const {
    const VF words = to_words(v);
    if (stream) store_stream<float, float>(as_words(p), words);
    else store_unaligned(as_words(p), words);
  }
};

// The first n values of an EvenAndOdd.
template <int odd> struct PartialEvenOrOdd {
  static constexpr int index = odd;
  int n;
  template <class T, class A> BN_INLINE V<A> load(const T* p) const { return even_or_odd<odd>(load_words(p, n)); }
  template <class A> BN_INLINE V<A> select(V<A> v, V<A> other) const {
    return first_lanes<A>((n + 1 - odd) / 2) ? v : other;
  }
};
struct PartialEvenAndOdd {
  static constexpr int vectors = 2;
  int n;
  template <class F> BN_INLINE void for_each(const F& f) const {
    f(PartialEvenOrOdd<0>{n});
    f(PartialEvenOrOdd<1>{n});
  }
  template <class T, class A> BN_INLINE void store(T* p, const VF* v, bool) const { store_words(p, to_words(v), n); }
};

// The access for most of a row, and the access for the tail of a contiguous row.
template <class T, class A>
using MainAccess = std::conditional_t<std::is_same_v<T, bf16> && std::is_same_v<A, float>, EvenAndOdd, FullVector>;
template <class Access>
using TailAccess = std::conditional_t<std::is_same_v<Access, EvenAndOdd>, PartialEvenAndOdd, PartialVector>;

// Reorders each group of 2 * `vector` columns: first the even ones, then the odd ones. The coefficients and the sums of
// columns that are accessed as EvenAndOdd have this order. `inverse` restores the order of the channels. The columns
// after the last full group are accessed in the order of the channels.
template <int vector, class T> void reorder_even_odd(T* values, std::int64_t n, bool inverse) {
  for (; n >= 2 * vector; n -= 2 * vector, values += 2 * vector) {
    T reordered[2 * vector];
    for (int i = 0; i < vector; ++i) {
      reordered[inverse ? 2 * i : i] = values[inverse ? i : 2 * i];
      reordered[inverse ? 2 * i + 1 : vector + i] = values[inverse ? vector + i : 2 * i + 1];
    }
    std::memcpy(values, reordered, sizeof reordered);
  }
}

template <class A, class Access> BN_INLINE M<A> load_valid_mask(const std::uint8_t* mask, Access access) {
  return valid_lanes(mask, access.count(lanes<A>()), A{});
}

}  // namespace BN_ISA
}  // namespace bn
