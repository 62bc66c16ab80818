// The per-channel coefficients of the loops. They are computed in float64 and converted to the type in which the loops
// compute.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "problem.h"

namespace bn {

// `count` channels of an item, from `first` on.
struct ChannelRange {
  std::int64_t first, count;
};

class Coefficients {
 public:
  // For `items` items of up to `item_channels` channels, each of which has `columns` columns.
  Coefficients(const Problem& p, std::int64_t items, std::int64_t item_channels, std::int64_t columns);

  // center, scale and shift of a range of an item's channels, from mean and variance. `channel` is the item's first
  // channel. Several threads may set different ranges of one item at a time. For bfloat16 a range must begin at a full
  // group of the loops' order (LoopTable::reorder_coefs).
  void set_affine(std::int64_t item, std::int64_t slice, std::int64_t channel, ChannelRange range);
  // slope and offset, from the sums. They stay 0 for fixed statistics, where this is not called.
  void set_backward(std::int64_t item, std::int64_t slice, std::int64_t channel, ChannelRange range, double count);

  double residue(std::int64_t item, std::int64_t k) const;  // mean - center
  // The loops sum dz·(x - center). In place they see z - bias = (x - mean)·scale instead of x - mean, so the sum must
  // be divided by this factor: scale in place, else 1.
  double sum_scale(std::int64_t item, std::int64_t k) const {
    return p_.in_place ? float64_coefs(item)[Coef::scale * item_channels_ + k] : 1;
  }
  // Whether float32 coefficients are too narrow for the item.
  bool needs_float64(std::int64_t item) const {
    return p_.dtype == Dtype::f64 || out_of_range_[static_cast<std::size_t>(item)].load(std::memory_order_relaxed);
  }
  // Sets the chunk's coefficients to those of the item. Returns the loops for them: float32 where the coefficients fit.
  // These have a value a column, those in float64 a value a channel.
  const LoopTable& select(std::int64_t item, Chunk& chunk) const;
  // The same, always in float64.
  const LoopTable& select_float64(std::int64_t item, Chunk& chunk) const;

 private:
  // Converts the coefficients [begin, end) to the type of the loops.
  void convert(std::int64_t item, int begin, int end, ChannelRange range);
  ChannelCoefs channel_coefs(std::int64_t item, std::int64_t first);
  void set_out_of_range(std::int64_t item) {
    out_of_range_[static_cast<std::size_t>(item)].store(true, std::memory_order_relaxed);
  }
  double* float64_coefs(std::int64_t item) { return float64_.data() + item * kCoefs * item_channels_; }
  const double* float64_coefs(std::int64_t item) const { return float64_.data() + item * kCoefs * item_channels_; }

  const Problem& p_;
  std::int64_t item_channels_, columns_;
  std::vector<double> float64_;       // [item][coefficient][channel]
  std::unique_ptr<float[]> float32_;  // [item][coefficient][column]; null for float64 data
  std::vector<double> residue_, invstd_;
  std::unique_ptr<std::atomic<bool>[]> out_of_range_;
};

}  // namespace bn
