// How a tensor is cut. An item is what is finished at once: some channels of a slice of a contiguous tensor (one, or as
// many short ones as make a stretch of memory worth reading), a whole slice of a channels-last one. A chunk is a piece of an item. Both follow from the shape alone, so every sum is taken in the
// same order whatever the number of threads.
#pragma once

#include <algorithm>
#include <vector>

#include "problem.h"

namespace bn {

class Partition {
 public:
  explicit Partition(const Problem& p);

  std::int64_t slices() const { return slices_; }
  std::int64_t chunks(std::int64_t slice) const;
  std::int64_t most_chunks() const { return chunks(0); }
  // Channels of an item, and items of a slice.
  std::int64_t width() const { return width_; }
  std::int64_t items_a_slice() const { return width_ ? (p_.c + width_ - 1) / width_ : 0; }
  // Real values a channel in this chunk, and where the first of them stands (in x, relative to the slab's start).
  double count(std::int64_t slice, std::int64_t chunk) const;
  std::int64_t first(std::int64_t slice, std::int64_t chunk) const;
  double slice_count(std::int64_t slice) const;

  // The chunk's slab, from this channel on.
  Slab slab(std::int64_t slice, std::int64_t chunk, std::int64_t channel) const;

 private:
  std::int64_t samples(std::int64_t slice) const;
  void count_mask();

  const Problem& p_;
  std::int64_t per_slice_, slices_, width_;
  std::int64_t pieces_ = 1, length_ = 0, group_ = 1;  // contiguous: pieces a run, or runs a chunk
  std::int64_t chunk_rows_ = 1;                       // channels last
  std::vector<double> counts_;                        // masked: [slice][chunk]
  std::vector<std::int64_t> firsts_;
};

inline std::size_t size_of(Dtype t) { return t == Dtype::f64 ? 8 : t == Dtype::f32 ? 4 : 2; }

}  // namespace bn
