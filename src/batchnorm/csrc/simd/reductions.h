// The sums of gradients: short blocks in float32 with a few accumulators, which are then added in float64. Float64 for
// every value would need four conversions a vector (docs/kernels.md).
#pragma once

#include "float64.h"
#include "iteration_channels_last.h"
#include "iteration_contiguous.h"

namespace bn {
namespace BN_ISA {

// As many as the registers hold, to hide the latency of an addition.
constexpr int kAccumulators = kVectorBytes == 64 ? 4 : 2;
constexpr int kBlockVectors = kSequentialAdditions * kAccumulators;

// Whether a block's sum is not zero, but so small that products in it may have been subnormal.
BN_INLINE VI may_have_underflowed(VF sum) {
  const VU magnitude = bit_cast<VU>(sum) & 0x7fffffffu;
  return bit_cast<VI>(magnitude - 1u < 0x08800000u - 1u);  // 2^-110
}
BN_INLINE VL may_have_underflowed(VD) { return VL{}; }

template <class A> bool any_lane(M<A> mask) {
  bool found = false;
  for (int i = 0; i < lanes<A>(); ++i) found |= mask[i] != 0;
  return found;
}

template <class A, int sums> struct BlockSums {
  V<A> accumulators[kAccumulators][sums] = {};
  Doubles total[sums] = {};
  M<A> underflow = {};
  int vectors = 0;

  BN_INLINE void flush() {
    unroll<sums>([&](auto j) BN_ALWAYS {
      V<A> sum = accumulators[0][j] + accumulators[1][j];
      if (kAccumulators == 4) sum += accumulators[2 % kAccumulators][j] + accumulators[3 % kAccumulators][j];
      underflow |= may_have_underflowed(sum);
      add(total[j], doubles(sum));
      unroll<kAccumulators>([&](auto k) BN_ALWAYS { accumulators[k][j] = V<A>{}; });
    });
    vectors = 0;
  }
  BN_INLINE void count(int more) {
    vectors += more;
    if (vectors >= kBlockVectors) flush();
  }
};

// Calls step(i, prefetch distance, accumulators, access) for all values of a contiguous row. The accumulators take
// turns.
template <class A, class Access, class B, class F>
BN_INLINE void reduce_row(std::int64_t length, const Prefetch& prefetch, B& block, const F& step) {
  constexpr int w = lanes<A>(), vectors = Access::vectors;
  std::int64_t i = 0;
  for (; i + kAccumulators * w <= length; i += kAccumulators * w) {
    const std::int64_t distance = i < prefetch.switch_at ? prefetch.distance : prefetch.tail_distance;
    unroll<kAccumulators / vectors>(
        [&](auto k) BN_ALWAYS { step(i + k * vectors * w, distance, block.accumulators + k * vectors, Access{}); });
    block.count(kAccumulators);
  }
  unroll<kAccumulators / vectors - 1>([&](auto k) BN_ALWAYS {
    if (i + vectors * w <= length) {
      step(i, prefetch.tail_distance, block.accumulators + k * vectors, Access{});
      i += vectors * w;
    }
  });
  if (i < length)
    step(i, prefetch.tail_distance, block.accumulators + (kAccumulators - vectors),
         TailAccess<Access>{static_cast<int>(length - i)});
  block.count(kAccumulators);
}

// Calls row(start, mask index, channel, block) for each row of a contiguous chunk, and finish(channel, totals) at the
// end. False where a block's sum may have underflowed.
template <class A, int sums, class F, class G>
BN_INLINE bool reduce_rows(const Chunk& chunk, const F& row, const G& finish) {
  Doubles totals[kMaxItemChannels][sums];
  for (std::int64_t k = 0; k < chunk.channels; ++k)
    for (int j = 0; j < sums; ++j) totals[k][j] = Doubles{};
  M<A> underflow = {};
  for_each_row_group(chunk, [&](std::int64_t r, std::int64_t end, std::int64_t k) BN_ALWAYS {
    BlockSums<A, sums> block;
    for (; r < end; ++r) row(r * chunk.row_stride + k * chunk.channel_stride, r * chunk.mask_stride, k, block);
    block.flush();
    unroll<sums>([&](auto j) BN_ALWAYS { add(totals[k][j], block.total[j]); });
    underflow |= block.underflow;
  });
  for (std::int64_t k = 0; k < chunk.channels; ++k) finish(k, totals[k]);
  return !any_lane<A>(underflow);
}

// The float64 values that belong to an access, and zeros in the lanes after its end.
template <class A, class Access> BN_INLINE Doubles load_doubles(const double* p, Access access) {
  constexpr int w = lanes<A>();
  if (access.count(w) == w) return load_doubles<A>(p);
  double each[w] = {};
  for (int i = 0; i < access.count(w); ++i) each[i] = p[i];
  return load_doubles<A>(each);
}

// Adds the lanes of an access to to[0], to[1], ...
template <class A, class Access> BN_INLINE void accumulate(double* to, Doubles values, Access access) {
  constexpr int w = lanes<A>();
  add(values, load_doubles<A>(to, access));
  if (access.count(w) == w) return store_doubles<A>(to, values);
  double each[w];
  store_doubles<A>(each, values);
  for (int i = 0; i < access.count(w); ++i) to[i] = each[i];
}

}  // namespace BN_ISA
}  // namespace bn
