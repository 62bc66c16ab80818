// stats, apply, and the two fused.
#include <algorithm>

#include "merge.h"
#include "schedule.h"

namespace bn {
namespace {

class Forward : public JobBase {
 public:
  Forward(const Problem& p, bool writes) : JobBase(p, p.residual && writes ? 2 : 1, writes), variant_(variant(p)) {}

  std::int64_t partial_size() const { return 3 * width_; }

  // partial: what merge_moments takes
  void reduce(std::int64_t item, std::int64_t chunk, bool fused, double* partial) {
    const Slab s = slab_to_sum(item, chunk, fused);
    const double count = std::max(parts_.count(slice(item), chunk), 1.0);
    const std::int64_t channels = this->channels(item);
    double* shift = partial + 2 * width_;
    first_values(s, parts_.first(slice(item), chunk), channels, shift);
    moments(s, channels, count, partial);
    if (p_.dtype != Dtype::f64) return;
    // float64 has no wider type to hide rounding in: once more, about the mean just found
    for (std::int64_t k = 0; k < channels; ++k) shift[k] += partial[k] - partial[k] == 0 ? partial[k] : 0;
    moments(s, channels, count, partial);
  }

  void finish(std::int64_t item, Channels which, double* partials) {
    const std::int64_t at = slice(item), chunks = this->chunks(item);
    std::vector<double> counts(static_cast<std::size_t>(chunks));
    for (std::int64_t c = 0; c < chunks; ++c) counts[static_cast<std::size_t>(c)] = parts_.count(at, c);
    partials += which.first;
    merge_moments(partials, counts.data(), chunks, width_, which.count);
    const double n = chunks ? counts[0] : 0;
    double *mean = row(p_.mean, item) + which.first, *var = row(p_.var, item) + which.first;
    for (std::int64_t k = 0; k < which.count; ++k) {
      mean[k] = n > 0 ? partials[2 * width_ + k] + partials[k] : 0;
      var[k] = n > 0 ? partials[width_ + k] / n : 0;
    }
    if (channel(item) + which.first == 0) p_.count[at] = n;
    coefficients_.set_affine(item, at, channel(item), which);
  }

  void map(std::int64_t item, std::int64_t chunk, bool fused) const {
    Slab s = slab_to_write(item, chunk, fused);
    const Leaf& leaf = coefficients_.use(item, s);
    (p_.channels_last ? leaf.apply_grid : leaf.apply_line)[variant_](s);
  }

  void count_without_channels() const {  // no item then stands for the slice
    for (std::int64_t r = 0; !p_.c && r < p_.rows(); ++r) p_.count[r] = parts_.slice_count(r);
  }

 private:
  static Variant variant(const Problem& p) {
    if (p.act == Act::none && !p.residual) return plain;
    if (p.act == Act::relu) return p.residual ? relu_residual : relu;
    return any;
  }

  // The chunk's first value of each channel, where it is finite: an infinite shift would leave NaN of every value.
  void first_values(const Slab& s, std::int64_t at, std::int64_t channels, double* shift) const {
    const auto widen = kernels().leaf[static_cast<int>(p_.dtype)].widen;
    const std::int64_t size = static_cast<std::int64_t>(size_of(p_.dtype)), step = p_.channels_last ? 1 : s.channel_stride;
    const char* first = static_cast<const char*>(s.x) + at * size;
    if (step == 1) widen(first, channels, shift);
    else for (std::int64_t k = 0; k < channels; ++k) widen(first + k * step * size, 1, shift + k);
    kernels().channels.finite_or_zero(shift, channels);
  }

  void moments(const Slab& s, std::int64_t channels, double count, double* partial) const {
    double *square = partial + width_, *shift = square + width_;
    std::fill(partial, shift, 0.0);
    const Leaf& leaf = kernels().leaf[static_cast<int>(p_.dtype)];
    (p_.channels_last ? leaf.moments_grid : leaf.moments_line)(s, shift, partial, square);
    kernels().channels.settle(shift, size_of(p_.dtype) > 2, count, channels, partial, square);
  }

  Variant variant_;
};

}  // namespace

void stats(const Problem& p, const Pool& pool) {
  Forward job(p, false);
  run(job, pool, {true, false});
  job.count_without_channels();
}

void apply(const Problem& p, const Pool& pool) {
  Forward job(p, true);
  job.set_affine(pool);
  run(job, pool, {false, true});
}

void forward(const Problem& p, const Pool& pool) {
  Forward job(p, true);
  run(job, pool, {true, true});
  job.count_without_channels();
}

}  // namespace bn
