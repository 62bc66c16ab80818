#include "partition.h"

#include <cstring>

namespace bn {
namespace {

// Values of a channel in one chunk. The variance's error grows with it (docs/kernels.md), the merging's cost falls.
constexpr std::int64_t kChunk = 8192;
// Contiguous: bytes of a sample's channels in one item, where a channel alone has fewer; of a backward with a residual,
// whose five tensors would drive each other out of the caches, fewer. No sum depends on it.
constexpr std::int64_t kStretch = 4096, kStretchOfFive = 3072;
// Channels last: values of all channels in one chunk, the rows that this may come to, and the fewest to even out at.
constexpr std::int64_t kGridChunk = 262144, kLeastRows = 128, kMostRows = 4096, kEvenRows = 96;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Rows of a chunk, channels last: all chunks alike, and by sixteens or eights where they do not become too short. Seven
// would give two threads four and three, and the last of them may be next to nothing.
std::int64_t even_rows(std::int64_t rows, std::int64_t channels) {
  const std::int64_t most = std::clamp(kGridChunk / std::max<std::int64_t>(channels, 1), kLeastRows, kMostRows);
  const std::int64_t chunks = std::max<std::int64_t>(ceil_div(rows, most), 1);
  for (std::int64_t together = 16; together > 1; together /= 2) {
    const std::int64_t even = ceil_div(rows, ceil_div(chunks, together) * together);
    if (even >= (together > 8 ? 2 * kEvenRows : kEvenRows)) return even;
  }
  return std::max<std::int64_t>(ceil_div(rows, chunks), 1);
}

}  // namespace

Partition::Partition(const Problem& p)
    : p_(p), per_slice_(p.slice_size ? p.slice_size : std::max<std::int64_t>(p.n, 1)), slices_(p.rows()) {
  width_ = p.c;
  if (!p.channels_last) {
    const std::int64_t bytes = std::max<std::int64_t>(p.s * static_cast<std::int64_t>(size_of(p.dtype)), 1);
    const std::int64_t stretch = p.grad && p.residual ? kStretchOfFive : kStretch;
    width_ = std::min(p.c, std::clamp<std::int64_t>(stretch / bytes, 1, kMostChannels));
  }
  if (p.channels_last) {
    chunk_rows_ = even_rows(per_slice_ * p.s, p.c);
  } else if (p.s > kChunk) {
    pieces_ = ceil_div(p.s, kChunk);
    length_ = ceil_div(ceil_div(p.s, pieces_), 64) * 64;  // whole cache lines
    pieces_ = ceil_div(p.s, length_);
  } else {
    length_ = p.s;
    group_ = p.s ? kChunk / p.s : 1;
  }
  if (p.mask) count_mask();
}

std::int64_t Partition::samples(std::int64_t slice) const {
  return std::min(per_slice_, p_.n - slice * per_slice_);
}

std::int64_t Partition::chunks(std::int64_t slice) const {
  const std::int64_t n = samples(slice);
  if (p_.channels_last) return ceil_div(n * p_.s, chunk_rows_);
  return p_.s ? ceil_div(n, group_) * pieces_ : 0;
}

Slab Partition::slab(std::int64_t slice, std::int64_t chunk, std::int64_t channel) const {
  Slab s;
  std::int64_t x, mask;
  if (p_.channels_last) {
    const std::int64_t row = chunk * chunk_rows_;
    s.runs = std::min(chunk_rows_, samples(slice) * p_.s - row);
    s.length = s.stride = p_.c;
    s.mask_stride = 1;
    mask = slice * per_slice_ * p_.s + row;
    x = mask * p_.c;
  } else {
    const std::int64_t sample = chunk / pieces_ * group_, at = chunk % pieces_ * length_;
    s.runs = std::min(group_, samples(slice) - sample);
    s.length = std::min(length_, p_.s - at);
    s.channels = std::min(width_, p_.c - channel);
    s.channel_stride = p_.s;
    s.stride = p_.c * p_.s;
    s.turn = pieces_ > 1 ? length_ : s.stride;
    s.mask_stride = p_.s;
    const std::int64_t n = slice * per_slice_ + sample;
    x = (n * p_.c + channel) * p_.s + at;
    mask = n * p_.s + at;
  }
  const std::int64_t bytes = x * static_cast<std::int64_t>(size_of(p_.dtype));
  const auto shifted = [bytes](const void* base) {
    return base ? static_cast<const void*>(static_cast<const char*>(base) + bytes) : nullptr;
  };
  s.x = shifted(p_.x);
  s.grad = shifted(p_.grad);
  s.residual = shifted(p_.residual);
  s.out = const_cast<void*>(shifted(p_.out));
  s.grad_residual = const_cast<void*>(shifted(p_.grad_residual));
  s.mask = p_.mask ? p_.mask + mask : nullptr;
  s.act = p_.act;
  s.negative_slope = p_.negative_slope;
  if (p_.in_place) s.restore = p_.act == Act::leaky_relu ? 1 / p_.negative_slope : 1;
  return s;
}

void Partition::count_mask() {
  counts_.assign(static_cast<std::size_t>(slices_ * most_chunks()), 0.0);
  firsts_.assign(counts_.size(), 0);
  for (std::int64_t slice = 0; slice < slices_; ++slice)
    for (std::int64_t chunk = 0; chunk < chunks(slice); ++chunk) {
      const Slab s = slab(slice, chunk, 0);
      const std::int64_t runs = p_.channels_last ? 1 : s.runs, length = p_.channels_last ? s.runs : s.length;
      std::int64_t count = 0, first = -1;
      for (std::int64_t r = 0; r < runs; ++r) {
        const std::uint8_t* mask = s.mask + r * s.mask_stride;
        for (std::int64_t i = 0; i < length; ++i) count += mask[i] != 0;
        const void* one = first < 0 && length ? std::memchr(mask, 1, static_cast<std::size_t>(length)) : nullptr;
        if (!one) continue;
        const std::int64_t i = static_cast<const std::uint8_t*>(one) - mask;
        first = p_.channels_last ? i * s.stride : r * s.stride + i;
      }
      counts_[static_cast<std::size_t>(slice * most_chunks() + chunk)] = static_cast<double>(count);
      firsts_[static_cast<std::size_t>(slice * most_chunks() + chunk)] = std::max<std::int64_t>(first, 0);
    }
}

double Partition::count(std::int64_t slice, std::int64_t chunk) const {
  if (p_.mask) return counts_[static_cast<std::size_t>(slice * most_chunks() + chunk)];
  const Slab s = slab(slice, chunk, 0);
  return static_cast<double>(p_.channels_last ? s.runs : s.runs * s.length);
}

std::int64_t Partition::first(std::int64_t slice, std::int64_t chunk) const {
  return p_.mask ? firsts_[static_cast<std::size_t>(slice * most_chunks() + chunk)] : 0;
}

double Partition::slice_count(std::int64_t slice) const {
  double total = 0;
  for (std::int64_t chunk = 0; chunk < chunks(slice); ++chunk) total += count(slice, chunk);
  return total;
}

}  // namespace bn
