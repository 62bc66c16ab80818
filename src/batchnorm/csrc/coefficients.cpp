#include "coefficients.h"

#include <cmath>

namespace bn {
namespace {

// Outside these float32 coefficients, or the differences they multiply, may overflow or lose their digits.
constexpr double kLargest = 1e25, kLargestCenter = 1e30, kLeastSlope = 1e-36;

}  // namespace

Coefficients::Coefficients(const Problem& p, std::int64_t items, std::int64_t width)
    : p_(p), width_(width), values_(static_cast<std::size_t>(items * kCoefs * width)),
      residue_(static_cast<std::size_t>(items * width)), wide_(static_cast<std::size_t>(items)) {
  if (p.dtype != Dtype::f64) narrow_.resize(values_.size());
}

void Coefficients::set_affine(std::int64_t item, std::int64_t slice, std::int64_t channel) {
  double* v = values(item);
  bool wide = false;
  const std::int64_t row = (p_.one_row ? 0 : slice * p_.c) + channel;
  for (std::int64_t k = 0; k < channels(channel); ++k) {
    const double mean = p_.mean[row + k], invstd = 1 / std::sqrt(p_.var[row + k] + p_.eps);
    const double center = p_.dtype == Dtype::f64 ? mean : static_cast<double>(static_cast<float>(mean));
    const double residue = std::isfinite(center) ? mean - center : 0.0;
    const double scale = p_.weight ? p_.weight[channel + k] * invstd : invstd;
    const double shift = (p_.bias ? p_.bias[channel + k] : 0.0) - residue * scale;
    v[Coef::center * width_ + k] = center;
    v[Coef::scale * width_ + k] = scale;
    v[Coef::shift * width_ + k] = shift;
    v[Coef::slope * width_ + k] = v[Coef::offset * width_ + k] = 0;
    residue_[static_cast<std::size_t>(item * width_ + k)] = residue;
    wide |= invstd > kLargest || invstd < 1 / kLargest || std::fabs(scale) > kLargest;
    wide |= std::fabs(center) > kLargestCenter || std::fabs(shift) > kLargestCenter;
  }
  wide_[static_cast<std::size_t>(item)] = wide;
  encode(item);
}

void Coefficients::set_through(std::int64_t item, std::int64_t slice, std::int64_t channel, double count) {
  double* v = values(item);
  bool wide = wide_[static_cast<std::size_t>(item)];
  const std::int64_t row = (p_.one_row ? 0 : slice * p_.c) + channel, sums = slice * p_.c + channel;
  const double divisor = count < 1 ? 1 : count;
  for (std::int64_t k = 0; k < channels(channel); ++k) {
    const double variance = p_.var[row + k] + p_.eps;
    const double slope = p_.sum_dy_xmu[sums + k] / divisor / variance;
    const double offset = p_.sum_dy[sums + k] / divisor - center_residue(item, k) * slope;
    v[Coef::slope * width_ + k] = slope;
    v[Coef::offset * width_ + k] = offset;
    wide |= std::fabs(slope) > kLargest || std::fabs(offset) > kLargestCenter;
    wide |= slope != 0 && std::fabs(slope) < kLeastSlope && variance > 1;
  }
  wide_[static_cast<std::size_t>(item)] = wide;
  encode(item);
}

double Coefficients::center_residue(std::int64_t item, std::int64_t k) const {
  return residue_[static_cast<std::size_t>(item * width_ + k)];
}

void Coefficients::encode(std::int64_t item) {
  if (p_.dtype == Dtype::f64 || wide_[static_cast<std::size_t>(item)]) return;
  const double* v = values(item);
  float* f = narrow_.data() + item * kCoefs * width_;
  for (std::int64_t k = 0; k < kCoefs * width_; ++k) f[k] = static_cast<float>(v[k]);
}

const Leaf& Coefficients::use(std::int64_t item, Slab& slab) const {
  if (p_.dtype == Dtype::f64 || wide_[static_cast<std::size_t>(item)]) return use_wide(item, slab);
  slab.coef_width = width_;
  slab.coef = narrow_.data() + item * kCoefs * width_;
  return kernels().leaf[static_cast<int>(p_.dtype)];
}

const Leaf& Coefficients::use_wide(std::int64_t item, Slab& slab) const {
  slab.coef_width = width_;
  slab.coef = values(item);
  return kernels().wide[static_cast<int>(p_.dtype)];
}

}  // namespace bn
