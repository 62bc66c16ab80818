// How a tensor is divided into items and chunks.
// Item: what one thread can finish alone. Contiguous: a few adjacent channels of a slice (one, or as many short ones as
// are worth one read of memory). Channels last: a whole slice.
// Chunk: a part of an item, with all of the item's channels.
// Contiguous maps that are shorter than a few vectors are read in the channels-last form: the values of an item's
// channels in one sample are the columns of a row, and a channel has s of them. A loop over single maps would do its
// work for a row, and its partial vectors, for a few values.
// Both depend on the shape alone. So every sum is taken in the same order, whatever the number of threads.
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
  std::int64_t max_chunks() const { return chunks(0); }
  std::int64_t item_channels() const { return item_channels_; }
  std::int64_t items_per_slice() const { return item_channels_ ? (p_.c + item_channels_ - 1) / item_channels_ : 0; }

  // Columns of a channel in the channels-last form: s where contiguous maps are read so, else 1.
  std::int64_t columns() const { return columns_; }

  // The chunk with this index, from `channel` on; `columns`: in the channels-last form, where there is one.
  Chunk chunk(std::int64_t slice, std::int64_t index, std::int64_t channel, bool columns) const;
  // The valid values of one channel in this chunk, and the offset of the first of them from the chunk's x.
  double count(std::int64_t slice, std::int64_t index) const;
  std::int64_t first_valid(std::int64_t slice, std::int64_t index) const;
  double slice_count(std::int64_t slice) const;

 private:
  std::int64_t samples(std::int64_t slice) const;
  void count_mask();

  const Problem& p_;
  std::int64_t samples_per_slice_, slices_, item_channels_, columns_ = 1;
  // Contiguous: a chunk is either a part of one sample's channel or the whole channel of several samples.
  std::int64_t chunks_per_sample_ = 1, chunk_length_ = 0, samples_per_chunk_ = 1;
  std::int64_t rows_per_chunk_ = 1;  // channels last
  std::vector<double> counts_;       // with a valid_mask: [slice][chunk]
  std::vector<std::int64_t> first_valid_;
};

}  // namespace bn
