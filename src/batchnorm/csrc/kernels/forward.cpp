// stats, apply, and both fused.
#include <algorithm>

#include "merge.h"
#include "schedule.h"

namespace bn {
namespace {

class ForwardJob : public JobBase {
 public:
  ForwardJob(const Problem& p, bool writes) : JobBase(p, p.residual && writes ? 2 : 1, writes), variant_(variant(p)) {}

  std::int64_t partial_size() const { return 3 * item_channels_; }

  // `partial` gets the three rows of merge_moments.
  void reduce(std::int64_t item, std::int64_t index, bool fused, double* partial) {
    const Chunk chunk = chunk_to_reduce(item, index, fused, has_columns());
    const double count = std::max(partition_.count(slice(item), index), 1.0);
    const std::int64_t channels = this->channels(item);
    double* shift = partial + 2 * item_channels_;
    first_values(chunk, partition_.first_valid(slice(item), index), channels, shift);
    moments(chunk, channels, count, partial);
    if (p_.dtype != Dtype::f64) return;
    // No wider type can absorb the rounding of float64 data. A second pass uses the mean of the first one as its shift.
    for (std::int64_t k = 0; k < channels; ++k) shift[k] += partial[k] - partial[k] == 0 ? partial[k] : 0;
    moments(chunk, channels, count, partial);
  }

  void finalize(std::int64_t item, ChannelRange range, double* partials) {
    const std::int64_t slice = this->slice(item), chunks = this->chunks(item);
    std::vector<double> counts(static_cast<std::size_t>(chunks));
    for (std::int64_t c = 0; c < chunks; ++c) counts[static_cast<std::size_t>(c)] = partition_.count(slice, c);
    partials += range.first;
    merge_moments(partials, counts.data(), chunks, item_channels_, range.count);
    const double n = chunks ? counts[0] : 0;
    double *mean = item_row(p_.mean, item) + range.first, *var = item_row(p_.var, item) + range.first;
    for (std::int64_t k = 0; k < range.count; ++k) {
      mean[k] = n > 0 ? partials[2 * item_channels_ + k] + partials[k] : 0;
      var[k] = n > 0 ? partials[item_channels_ + k] / n : 0;
    }
    if (channel(item) + range.first == 0) p_.count[slice] = n;
    coefficients_.set_affine(item, slice, channel(item), range);
  }

  void write(std::int64_t item, std::int64_t index, bool fused) const {
    const bool columns = in_columns(item);
    Chunk chunk = chunk_to_write(item, index, fused, columns);
    const LoopTable& loops = coefficients_.select(item, chunk);
    (p_.channels_last || columns ? loops.apply_channels_last : loops.apply_contiguous)[variant_](chunk);
  }

  // Without channels there are no items, so no finalize sets the counts.
  void set_counts_without_channels() const {
    for (std::int64_t slice = 0; !p_.c && slice < p_.slices(); ++slice) p_.count[slice] = partition_.slice_count(slice);
  }

 private:
  static Variant variant(const Problem& p) {
    if (p.activation == Activation::none && !p.residual) return plain;
    if (p.activation == Activation::relu) return p.residual ? relu_residual : relu;
    return generic;
  }

  // The shift of each channel: the first valid value of the chunk, or 0 where that is not finite. An infinite shift
  // would turn every value into NaN.
  void first_values(const Chunk& chunk, std::int64_t offset, std::int64_t channels, double* shift) const {
    const auto to_float64 = kernels().loops[static_cast<int>(p_.dtype)].to_float64;
    const std::int64_t size = static_cast<std::int64_t>(size_of(p_.dtype));
    const std::int64_t stride = p_.channels_last ? 1 : chunk.channel_stride;
    const char* first = static_cast<const char*>(chunk.x) + offset * size;
    to_float64(first, channels, stride, shift);
    kernels().channels.finite_or_zero(shift, channels);
  }

  void moments(const Chunk& chunk, std::int64_t channels, double count, double* partial) const {
    double *square = partial + item_channels_, *shift = square + item_channels_;
    const LoopTable& loops = kernels().loops[static_cast<int>(p_.dtype)];
    if (has_columns()) {
      const ColumnSums columns(channels, partition_.columns());
      columns.spread(shift, 2);
      loops.moments_channels_last(chunk, columns.row(2), columns.row(0), columns.row(1));
      columns.gather(0, partial);
      columns.gather(1, square);
    } else {
      std::fill(partial, shift, 0.0);
      (p_.channels_last ? loops.moments_channels_last : loops.moments_contiguous)(chunk, shift, partial, square);
    }
    kernels().channels.sums_to_moments(shift, size_of(p_.dtype) > 2, count, channels, partial, square);
  }

  Variant variant_;
};

}  // namespace

void stats(const Problem& p, const ThreadPool& pool) {
  ForwardJob job(p, false);
  execute(job, pool, {true, false});
  job.set_counts_without_channels();
}

void apply(const Problem& p, const ThreadPool& pool) {
  ForwardJob job(p, true);
  job.set_affine(pool);
  execute(job, pool, {false, true});
}

void forward(const Problem& p, const ThreadPool& pool) {
  ForwardJob job(p, true);
  execute(job, pool, {true, true});
  job.set_counts_without_channels();
}

}  // namespace bn
