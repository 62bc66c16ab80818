// Sums over many values. A gradient's: short blocks in float32, a few strands side by side, the strands added in pairs,
// the blocks in float64, which for each value would cost four conversions a vector (docs/kernels.md).
#pragma once

namespace bn {
namespace BN_ISA {

constexpr int kStrands = kBytes == 64 ? 4 : 2;      // as many as the registers hold: the additions' latency is the bound
constexpr int kFollowing = 16;                      // values of a lane that are added one after the other
constexpr int kBlock = kFollowing * kStrands;       // vectors

// A block sum that is not zero but so small that products in it may have been subnormal.
BN_INLINE VI doubtful(VF sum) {
  const VU magnitude = bits<VU>(sum) & 0x7fffffffu;
  return bits<VI>(magnitude - 1u < 0x08800000u - 1u);  // 2^-110
}
BN_INLINE VL doubtful(VD) { return VL{}; }

template <class A> bool some(M<A> lanes_of) {
  bool found = false;
  for (int i = 0; i < lanes<A>(); ++i) found |= lanes_of[i] != 0;
  return found;
}

template <class A, int sums> struct Block {
  V<A> part[kStrands][sums] = {};
  Doubles total[sums] = {};
  M<A> doubt = {};
  int steps = 0;

  BN_INLINE void flush() {
    unrolled<sums>([&](auto j) BN_ALWAYS {
      V<A> sum = part[0][j] + part[1][j];
      if (kStrands == 4) sum += part[2 % kStrands][j] + part[3 % kStrands][j];
      doubt |= doubtful(sum);
      add(total[j], doubles(sum));
      unrolled<kStrands>([&](auto k) BN_ALWAYS { part[k][j] = V<A>{}; });
    });
    steps = 0;
  }
  BN_INLINE void stepped(int more) {
    steps += more;
    if (steps >= kBlock) flush();
  }
};

// Runs of one channel before the next one's, where a slab has several.
constexpr std::int64_t kGroup = 8;

// How far ahead to read: along a long run and, near its end, on into the run that comes next, `turn` away; of short
// runs at the same place of the next.
constexpr std::int64_t kAheadBytes = 4096;
struct Ahead {
  std::int64_t far, change, behind;  // behind: instead of far, from the value `change` on
};
template <class T> BN_INLINE Ahead ahead_line(const Slab& s) {
  constexpr std::int64_t far = kAheadBytes / static_cast<std::int64_t>(sizeof(T));
  if (s.length * s.channels < 2 * far) return {s.turn, s.length, s.turn};
  if (s.channels > 1) return {far, s.length, far};
  return {far, s.length - far, s.turn - s.length + far};
}

// The same for channel `channel` of several that are taken in the order of memory: along all of them, but not so far
// that five tensors would fill the first cache. Very short ones do not repay the reckoning.
template <class T> BN_INLINE Ahead ahead_stretch(const Slab& s, std::int64_t channel, const Ahead& line) {
  constexpr std::int64_t size = sizeof(T), far = kAheadBytes / 4 / size;
  if (s.channels == 1 || s.length * size < 384) return line;
  const std::int64_t all = s.length * s.channels, change = all - far - channel * s.length;
  return {far, change < 0 ? 0 : change < s.length ? change : s.length, s.turn - all + far};
}

// Calls step(i, how far ahead, strands, lanes) for one run of `length` values, each strand in its turn.
template <class A, class Way, class B, class F>
BN_INLINE void over_strands(std::int64_t length, const Ahead& ahead, B& block, const F& step) {
  constexpr int w = lanes<A>(), units = Way::units;
  std::int64_t i = 0;
  for (; i + kStrands * w <= length; i += kStrands * w) {
    const std::int64_t far = i < ahead.change ? ahead.far : ahead.behind;
    unrolled<kStrands / units>([&](auto k) BN_ALWAYS { step(i + k * units * w, far, block.part + k * units, Way{}); });
    block.stepped(kStrands);
  }
  unrolled<kStrands / units - 1>([&](auto k) BN_ALWAYS {
    if (i + units * w <= length) {
      step(i, ahead.behind, block.part + k * units, Way{});
      i += units * w;
    }
  });
  if (i < length) step(i, ahead.behind, block.part + (kStrands - units), Rest<Way>{static_cast<int>(length - i)});
  block.stepped(kStrands);
}

// Calls group(first run, end, channel): a channel's runs, a few short ones at a time before the next channel's, so that
// memory is still read in stretches.
template <class F> BN_INLINE void over_groups(const Slab& s, const F& group) {
  const std::int64_t few = s.channels > 1 ? kGroup : s.runs;
  for (std::int64_t r = 0; r < s.runs; r += few)
    for (std::int64_t k = 0; k < s.channels; ++k) group(r, r + few < s.runs ? r + few : s.runs, k);
}

// Calls run(start, mask index, channel, block) for each run of a slab of lines and at the end done(channel, totals).
// False where a block's sum was doubtful.
template <class A, int sums, class F, class G> BN_INLINE bool over_lines(const Slab& s, const F& run, const G& done) {
  Doubles totals[kMostChannels][sums];
  for (std::int64_t k = 0; k < s.channels; ++k)
    for (int j = 0; j < sums; ++j) totals[k][j] = Doubles{};
  M<A> doubt = {};
  over_groups(s, [&](std::int64_t r, std::int64_t end, std::int64_t k) BN_ALWAYS {
    Block<A, sums> block;
    for (; r < end; ++r) run(r * s.stride + k * s.channel_stride, r * s.mask_stride, k, block);
    block.flush();
    unrolled<sums>([&](auto j) BN_ALWAYS { add(totals[k][j], block.total[j]); });
    doubt |= block.doubt;
  });
  for (std::int64_t k = 0; k < s.channels; ++k) done(k, totals[k]);
  return !some<A>(doubt);
}

// A few columns of a grid side by side.
constexpr int kColumns = kBytes == 64 ? 4 : 2;

// Rows of a grid whose sums stay in registers.
constexpr std::int64_t kTileRows = kFollowing;

// What is read ahead of a tile, in the order of memory: two tiles, into the second-level cache, since wide tiles would
// drive each other out of the first.
template <class T> BN_INLINE std::int64_t ahead_tile(const Slab& s) {
  constexpr std::int64_t least = 4096 / static_cast<std::int64_t>(sizeof(T));
  const std::int64_t tiles = 2 * kTileRows * s.stride;
  return tiles > least ? tiles : least;
}

// Calls column(c, r0, r1, steps, lanes, ahead) for every few columns of every tile: `steps` of them side by side; `ahead`
// is where in the slab to read ahead from.
template <class T, class A, class Way, class F> BN_INLINE void over_tiles(const Slab& s, const F& column) {
  constexpr int w = lanes<A>(), units = Way::units;
  const std::int64_t far = ahead_tile<T>(s);
  for (std::int64_t r = 0; r < s.runs; r += kTileRows) {
    const std::int64_t end = r + kTileRows < s.runs ? r + kTileRows : s.runs, rows = end - r;
    std::int64_t c = 0;
    const auto next = [&]() BN_ALWAYS { return r * s.stride + far + c * rows; };
    for (; c + kColumns * w <= s.length; c += kColumns * w)
      column(c, r, end, std::integral_constant<int, kColumns / units>{}, Way{}, next());
    constexpr std::integral_constant<int, 1> one{};
    if constexpr (kColumns > units) for (; c + units * w <= s.length; c += units * w) column(c, r, end, one, Way{}, next());
    if constexpr (units > 1) for (; c + w <= s.length; c += w) column(c, r, end, one, Whole{}, next());
    if (c < s.length) column(c, r, end, one, Part{static_cast<int>(s.length - c)}, next());
  }
}

// Lines of the next tile, `columns` vectors' worth a row.
template <class T, class A, int columns> BN_INLINE void ahead_row(const T* p, std::int64_t at) {
  constexpr std::int64_t line = 64 / static_cast<std::int64_t>(sizeof(T)), values = columns * lanes<A>();
  for (std::int64_t i = 0; i < values; i += line) far_ahead(p, at + i);
}

// A vector's worth of float64 values, or the first of them and zeros.
template <class A, class Lanes> BN_INLINE Doubles load_doubles_part(const double* p, Lanes mem) {
  constexpr int w = lanes<A>();
  if (mem.count_of(w) == w) return load_doubles<A>(p);
  double each[w] = {};
  for (int i = 0; i < mem.count_of(w); ++i) each[i] = p[i];
  return load_doubles<A>(each);
}

// to[0..] += the first lanes; of a Pair its two vectors behind each other (in_pairs)
template <class A, class Lanes> BN_INLINE void add_to(double* to, Doubles values, Lanes mem) {
  constexpr int w = lanes<A>();
  add(values, load_doubles_part<A>(to, mem));
  if (mem.count_of(w) == w) return store_doubles<A>(to, values);
  double each[w];
  store_doubles<A>(each, values);
  for (int i = 0; i < mem.count_of(w); ++i) to[i] = each[i];
}

}  // namespace BN_ISA
}  // namespace bn
