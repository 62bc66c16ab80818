// stats, apply, and the two fused.
#include "merge.h"
#include "schedule.h"

namespace bn {
namespace {

class Forward : public JobBase {
 public:
  Forward(const Problem& p, bool writes) : JobBase(p, p.residual && writes ? 2 : 1, writes), variant_(variant(p)) {}

  // partial: means, then sums of squared deviations
  void reduce(std::int64_t item, std::int64_t chunk, double* partial) {
    const Slab s = slab(item, chunk);
    const double count = parts_.count(slice(item), chunk);
    const Leaf& leaf = kernels().leaf[static_cast<int>(p_.dtype)];
    double few[3 * kMostChannels];
    std::vector<double> many(static_cast<std::size_t>(p_.channels_last ? 3 * width_ : 0));
    double* shift = p_.channels_last ? many.data() : few;
    const std::int64_t channels = this->channels(item);
    if (size_of(p_.dtype) == 2) return unshifted(leaf, s, channels, count, shift, partial);
    first_values(leaf, s, parts_.first(slice(item), chunk), channels, shift);
    shifted(leaf, s, channels, count, shift, partial);
    if (p_.dtype != Dtype::f64) return;
    // float64 has no wider type to hide rounding in: once more, about the mean just found
    for (std::int64_t k = 0; k < channels; ++k) shift[k] = partial[k] - partial[k] == 0 ? partial[k] : shift[k];
    shifted(leaf, s, channels, count, shift, partial);
  }

  void finish(std::int64_t item, double* partials) {
    const std::int64_t at = slice(item), chunks = this->chunks(item);
    std::vector<double> counts(static_cast<std::size_t>(chunks));
    for (std::int64_t c = 0; c < chunks; ++c) counts[static_cast<std::size_t>(c)] = parts_.count(at, c);
    merge_moments(partials, counts.data(), chunks, width_);
    const double n = chunks ? counts[0] : 0;
    double *mean = row(p_.mean, item), *var = row(p_.var, item);
    for (std::int64_t k = 0; k < channels(item); ++k) {
      mean[k] = n > 0 ? partials[k] : 0;
      var[k] = n > 0 ? partials[width_ + k] / n : 0;
    }
    if (channel(item) == 0) p_.count[at] = n;
    coefficients_.set_affine(item, at, channel(item));
  }

  void map(std::int64_t item, std::int64_t chunk, bool fused) const {
    Slab s = slab(item, chunk, fused);
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

  // The chunk's first value of each channel, which is finite where it can be.
  void first_values(const Leaf& leaf, const Slab& s, std::int64_t at, std::int64_t channels, double* shift) const {
    const std::int64_t size = static_cast<std::int64_t>(size_of(p_.dtype)), step = p_.channels_last ? 1 : s.channel_stride;
    const char* first = static_cast<const char*>(s.x) + at * size;
    if (step == 1) leaf.widen(first, channels, shift);
    else for (std::int64_t k = 0; k < channels; ++k) leaf.widen(first + k * step * size, 1, shift + k);
    for (std::int64_t k = 0; k < channels; ++k)
      if (shift[k] - shift[k] != 0) shift[k] = 0;  // an infinite shift would leave NaN of every value
  }

  // Σx and Σx² as they are: what cancels in Σx² - (Σx)²/n is exact, so long as the quotient's rounding is taken in.
  void unshifted(const Leaf& leaf, const Slab& s, std::int64_t channels, double count, double* room, double* partial) const {
    double *sum = room + width_, *square = sum + width_;
    for (std::int64_t k = 0; k < 3 * width_; ++k) room[k] = 0;
    (p_.channels_last ? leaf.moments_grid : leaf.moments_line)(s, room, sum, square);
    const double n = count > 0 ? count : 1;
    for (std::int64_t k = 0; k < channels; ++k) {
      const double mean = sum[k] / n, rounding = std::fma(-mean, n, sum[k]) / n;
      const double rest = std::fma(-sum[k], mean, square[k]) - sum[k] * rounding;
      partial[k] = mean;
      partial[width_ + k] = rest < 0 ? 0 : rest;  // NaN stays
    }
  }

  // shift has room for the sums, each `width_` behind the last
  void shifted(const Leaf& leaf, const Slab& s, std::int64_t channels, double count, double* shift, double* partial) const {
    double *sum = shift + width_, *square = sum + width_;
    for (std::int64_t k = 0; k < channels; ++k) sum[k] = square[k] = 0;
    (p_.channels_last ? leaf.moments_grid : leaf.moments_line)(s, shift, sum, square);
    const double divisor = count > 0 ? count : 1;
    for (std::int64_t k = 0; k < channels; ++k) {
      const double deviation = sum[k] / divisor, rest = square[k] - sum[k] * deviation;
      partial[k] = shift[k] + deviation;
      partial[width_ + k] = rest < 0 ? 0 : rest;  // NaN stays
    }
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
