// Whole vectors, and the first lanes of one at the end of a run.
#pragma once

namespace bn {
namespace BN_ISA {

// How a vector touches memory: whole, or its first n lanes.
struct Whole {
  template <class T, class A> BN_INLINE V<A> load(const T* p) const { return Memory<T, A>::load(p); }
  template <class T, class A> BN_INLINE void store(T* p, V<A> v, bool stream) const {
    if (stream) store_stream<T, A>(p, v);
    else Memory<T, A>::store(p, v);
  }
  template <class A> BN_INLINE V<A> keep(V<A> v, V<A>) const { return v; }
  int count_of(int all) const { return all; }
};
struct Part {
  int n;
  template <class T, class A> BN_INLINE V<A> load(const T* p) const { return load_part<T, A>(p, n); }
  template <class T, class A> BN_INLINE void store(T* p, V<A> v, bool) const { store_part<T, A>(p, v, n); }
  template <class A> BN_INLINE V<A> keep(V<A> v, V<A> other) const { return first_lanes<A>(n) ? v : other; }
  int count_of(int) const { return n; }
};

template <class A, class Lanes> BN_INLINE M<A> mask_line(const std::uint8_t* mask, Lanes mem) {
  return mask_lanes(mask, mem.count_of(lanes<A>()), A{});
}

}  // namespace BN_ISA
}  // namespace bn
