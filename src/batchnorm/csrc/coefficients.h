// Per-channel coefficients of the loops, computed in float64 and handed over in the type that the loops compute in.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "problem.h"

namespace bn {

// Some channels of an item: so many from `first` on.
struct Channels {
  std::int64_t first, count;
};

class Coefficients {
 public:
  // `items` sets of up to `width` channels.
  Coefficients(const Problem& p, std::int64_t items, std::int64_t width);

  // center, scale, shift of some of an item's channels, from mean and variance. `channel` is the item's first. Threads
  // may do different channels of one item at a time; of bfloat16 in whole vectors of pairs.
  void set_affine(std::int64_t item, std::int64_t slice, std::int64_t channel, Channels which);
  // slope and offset from the sums; count 0: frozen statistics.
  void set_through(std::int64_t item, std::int64_t slice, std::int64_t channel, Channels which, double count);

  double center_residue(std::int64_t item, std::int64_t k) const;  // mean - center
  // What the loops' x - mean is x - mean times of: 1, or in place, where they see z - bias, the scale between the two.
  double sum_scale(std::int64_t item, std::int64_t k) const { return p_.in_place ? values(item)[Coef::scale * width_ + k] : 1; }
  // Points the slab at the item's coefficients and returns the loops that fit their size.
  const Leaf& use(std::int64_t item, Slab& slab) const;
  // The same in float64, whatever their size.
  const Leaf& use_wide(std::int64_t item, Slab& slab) const;

 private:
  void encode(std::int64_t item, int begin, int end, Channels which);  // these coefficients, in the loops' type
  ChannelCoefs at(std::int64_t item, std::int64_t first);
  void set_wide(std::int64_t item) { wide_[static_cast<std::size_t>(item)].store(true, std::memory_order_relaxed); }
  bool is_wide(std::int64_t item) const { return wide_[static_cast<std::size_t>(item)].load(std::memory_order_relaxed); }
  double* values(std::int64_t item) { return values_.data() + item * kCoefs * width_; }
  const double* values(std::int64_t item) const { return values_.data() + item * kCoefs * width_; }

  const Problem& p_;
  std::int64_t width_;
  std::vector<double> values_;
  std::vector<double> residue_, invstd_;
  std::vector<float> narrow_;
  std::unique_ptr<std::atomic<bool>[]> wide_;
};

}  // namespace bn
