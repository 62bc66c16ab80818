#include "partition.h"

#include <cstring>
#include <numeric>

namespace bn {
namespace {

// Contiguous: values of a channel in one chunk. The error of the variance grows with this number (docs/kernels.md), the
// cost of merging falls.
constexpr std::int64_t kChunkValues = 8192;
// Contiguous: bytes of one sample in an item, where one channel has fewer. A backward with a residual uses five
// tensors, which would evict each other from the caches, so its items are smaller. No sum depends on these numbers.
constexpr std::int64_t kItemBytes = 4096, kItemBytesFiveTensors = 3072;
// Contiguous maps of so many values or fewer are read in the channels-last form, where the samples of a slice suffice
// to share what is done once a column.
constexpr std::int64_t kMaxColumns = 49, kColumnsPerSample = 16;
// Bytes of one sample in an item of that form: an eighth of the sample, for as many threads, within these limits.
constexpr std::int64_t kMinColumnBytes = 512, kMaxColumnBytes = 4096, kItemsInColumns = 8;
// Channels last: so many rows or fewer would be one chunk, and are cut by channels instead: the threads share those.
constexpr std::int64_t kFewRows = 256;
// Channels last: values of all channels in one chunk; the limits of the rows that follow from it; and the fewest rows
// that a chunk may have after rounding the number of chunks.
constexpr std::int64_t kChunkValuesChannelsLast = 262144, kMinRows = 128, kMaxRows = 4096, kMinRoundedRows = 96;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// A valid_mask has a byte a position, and float64 loops have coefficients a channel: both are read row by row.
bool has_columns(const Problem& p, std::int64_t samples) {
  if (p.channels_last || p.dtype == Dtype::f64 || p.valid_mask || p.s < 2) return false;
  return p.s <= std::min(kMaxColumns, kColumnsPerSample * samples);
}

// Channels of an item whose rows are columns of `columns` a channel, such that a row ends with a full cache line.
std::int64_t channels_in_columns(const Problem& p, std::int64_t columns) {
  const std::int64_t channel_bytes = columns * static_cast<std::int64_t>(size_of(p.dtype)),
                     sample_bytes = p.c * channel_bytes;
  const std::int64_t bytes = std::clamp(sample_bytes / kItemsInColumns, kMinColumnBytes, kMaxColumnBytes);
  const std::int64_t aligned = 64 / std::gcd(channel_bytes, std::int64_t{64});  // channels that fill cache lines
  return std::min(p.c, ceil_div(ceil_div(bytes, channel_bytes), aligned) * aligned);
}

// Channels last: rows of a chunk. All chunks get the same number of rows, because the threads share them: of seven
// chunks one of two threads would take four, and the last chunk could be nearly empty. The number of chunks is rounded
// to a multiple of 16 or 8 where the chunks stay long enough.
std::int64_t rows_per_chunk(std::int64_t rows, std::int64_t channels) {
  const std::int64_t limit =
      std::clamp(kChunkValuesChannelsLast / std::max<std::int64_t>(channels, 1), kMinRows, kMaxRows);
  const std::int64_t chunks = std::max<std::int64_t>(ceil_div(rows, limit), 1);
  for (std::int64_t multiple = 16; multiple > 1; multiple /= 2) {
    const std::int64_t rounded = ceil_div(rows, ceil_div(chunks, multiple) * multiple);
    if (rounded >= (multiple > 8 ? 2 * kMinRoundedRows : kMinRoundedRows)) return rounded;
  }
  return std::max<std::int64_t>(ceil_div(rows, chunks), 1);
}

}  // namespace

Partition::Partition(const Problem& p)
    : p_(p), samples_per_slice_(p.slice_size ? p.slice_size : std::max<std::int64_t>(p.n, 1)), slices_(p.slices()) {
  item_channels_ = p.c;
  if (has_columns(p, samples_per_slice_)) {
    columns_ = p.s;
    item_channels_ = channels_in_columns(p, p.s);
  } else if (p.channels_last && samples_per_slice_ * p.s <= kFewRows) {
    item_channels_ = channels_in_columns(p, 1);
  } else if (!p.channels_last) {
    const std::int64_t channel_bytes = std::max<std::int64_t>(p.s * static_cast<std::int64_t>(size_of(p.dtype)), 1);
    const std::int64_t item_bytes = p.grad && p.residual ? kItemBytesFiveTensors : kItemBytes;
    item_channels_ = std::min(p.c, std::clamp<std::int64_t>(item_bytes / channel_bytes, 1, kMaxItemChannels));
  }
  if (p.channels_last) {
    rows_per_chunk_ = rows_per_chunk(samples_per_slice_ * p.s, item_channels_);
  } else if (p.s > kChunkValues) {
    chunks_per_sample_ = ceil_div(p.s, kChunkValues);
    chunk_length_ = ceil_div(ceil_div(p.s, chunks_per_sample_), 64) * 64;  // full cache lines
    chunks_per_sample_ = ceil_div(p.s, chunk_length_);
  } else {
    chunk_length_ = p.s;
    samples_per_chunk_ = p.s ? kChunkValues / p.s : 1;
  }
  if (p.valid_mask) count_mask();
}

std::int64_t Partition::samples(std::int64_t slice) const {
  return std::min(samples_per_slice_, p_.n - slice * samples_per_slice_);
}

std::int64_t Partition::chunks(std::int64_t slice) const {
  const std::int64_t n = samples(slice);
  if (p_.channels_last) return ceil_div(n * p_.s, rows_per_chunk_);
  return p_.s ? ceil_div(n, samples_per_chunk_) * chunks_per_sample_ : 0;
}

Chunk Partition::chunk(std::int64_t slice, std::int64_t index, std::int64_t channel, bool columns) const {
  Chunk chunk;
  std::int64_t x, mask;
  if (p_.channels_last) {
    const std::int64_t row = index * rows_per_chunk_;
    chunk.rows = std::min(rows_per_chunk_, samples(slice) * p_.s - row);
    chunk.length = std::min(item_channels_, p_.c - channel);
    chunk.row_stride = p_.c;
    chunk.mask_stride = 1;
    mask = slice * samples_per_slice_ * p_.s + row;
    x = mask * p_.c + channel;
  } else {
    const std::int64_t sample = index / chunks_per_sample_ * samples_per_chunk_;
    const std::int64_t begin = index % chunks_per_sample_ * chunk_length_;
    chunk.rows = std::min(samples_per_chunk_, samples(slice) - sample);
    chunk.length = std::min(chunk_length_, p_.s - begin);
    chunk.channels = std::min(item_channels_, p_.c - channel);
    chunk.channel_stride = p_.s;
    chunk.row_stride = p_.c * p_.s;
    chunk.next_row = chunks_per_sample_ > 1 ? chunk_length_ : chunk.row_stride;
    chunk.mask_stride = p_.s;
    const std::int64_t n = slice * samples_per_slice_ + sample;
    x = (n * p_.c + channel) * p_.s + begin;
    mask = n * p_.s + begin;
    if (columns && columns_ > 1) {
      chunk.length *= chunk.channels;
      chunk.channels = 1;
    }
  }
  const std::int64_t bytes = x * static_cast<std::int64_t>(size_of(p_.dtype));
  const auto offset = [bytes](const void* base) {
    return base ? static_cast<const void*>(static_cast<const char*>(base) + bytes) : nullptr;
  };
  chunk.x = offset(p_.x);
  chunk.grad = offset(p_.grad);
  chunk.residual = offset(p_.residual);
  chunk.out = const_cast<void*>(offset(p_.out));
  chunk.grad_residual = const_cast<void*>(offset(p_.grad_residual));
  chunk.valid_mask = p_.valid_mask ? p_.valid_mask + mask : nullptr;
  chunk.activation = p_.activation;
  chunk.negative_slope = p_.negative_slope;
  if (p_.in_place) chunk.undo_slope = p_.activation == Activation::leaky_relu ? 1 / p_.negative_slope : 1;
  return chunk;
}

void Partition::count_mask() {
  counts_.assign(static_cast<std::size_t>(slices_ * max_chunks()), 0.0);
  first_valid_.assign(counts_.size(), 0);
  for (std::int64_t slice = 0; slice < slices_; ++slice)
    for (std::int64_t index = 0; index < chunks(slice); ++index) {
      const Chunk c = chunk(slice, index, 0, false);
      const std::int64_t rows = p_.channels_last ? 1 : c.rows, length = p_.channels_last ? c.rows : c.length;
      std::int64_t count = 0, first = -1;
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::uint8_t* mask = c.valid_mask + r * c.mask_stride;
        for (std::int64_t i = 0; i < length; ++i) count += mask[i] != 0;
        const void* found = first < 0 && length ? std::memchr(mask, 1, static_cast<std::size_t>(length)) : nullptr;
        if (!found) continue;
        const std::int64_t i = static_cast<const std::uint8_t*>(found) - mask;
        first = p_.channels_last ? i * c.row_stride : r * c.row_stride + i;
      }
      counts_[static_cast<std::size_t>(slice * max_chunks() + index)] = static_cast<double>(count);
      first_valid_[static_cast<std::size_t>(slice * max_chunks() + index)] = std::max<std::int64_t>(first, 0);
    }
}

double Partition::count(std::int64_t slice, std::int64_t index) const {
  if (p_.valid_mask) return counts_[static_cast<std::size_t>(slice * max_chunks() + index)];
  const Chunk c = chunk(slice, index, 0, false);
  return static_cast<double>(p_.channels_last ? c.rows : c.rows * c.length);
}

std::int64_t Partition::first_valid(std::int64_t slice, std::int64_t index) const {
  return p_.valid_mask ? first_valid_[static_cast<std::size_t>(slice * max_chunks() + index)] : 0;
}

double Partition::slice_count(std::int64_t slice) const {
  double total = 0;
  for (std::int64_t index = 0; index < chunks(slice); ++index) total += count(slice, index);
  return total;
}

}  // namespace bn
