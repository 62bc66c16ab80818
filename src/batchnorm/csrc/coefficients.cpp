#include "coefficients.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace bn {
namespace {

// Outside these float32 coefficients, or the differences they multiply, may overflow or lose their digits.
constexpr double kLargest = 1e25, kLargestCenter = 1e30, kLeastSlope = 1e-36;

}  // namespace

Coefficients::Coefficients(const Problem& p, std::int64_t items, std::int64_t width)
    : p_(p), width_(width), values_(static_cast<std::size_t>(items * kCoefs * width)),
      residue_(static_cast<std::size_t>(items * width)), invstd_(residue_.size()), wide_(static_cast<std::size_t>(items)) {
  if (p.dtype != Dtype::f64) narrow_.resize(values_.size());
}

void Coefficients::set_affine(std::int64_t item, std::int64_t slice, std::int64_t channel) {
  double* v = values(item);
  const std::int64_t row = (p_.one_row ? 0 : slice * p_.c) + channel, count = channels(channel);
  double *center = v + Coef::center * width_, *scale = v + Coef::scale * width_, *shift = v + Coef::shift * width_;
  double* residue = residue_.data() + item * width_;
  double* invstd = invstd_.data() + item * width_;
  kernels().channels.invstd(p_.var + row, p_.eps, count, invstd);
  double most = 0, least = 1, most_center = 0;  // magnitudes
  for (std::int64_t k = 0; k < count; ++k) {
    const double bias = p_.bias ? p_.bias[channel + k] : 0.0, mean = p_.in_place ? bias : p_.mean[row + k];
    center[k] = p_.dtype == Dtype::f64 ? mean : static_cast<double>(static_cast<float>(mean));
    residue[k] = std::isfinite(center[k]) ? mean - center[k] : 0.0;
    scale[k] = p_.weight ? p_.weight[channel + k] * invstd[k] : invstd[k];
    shift[k] = bias - residue[k] * scale[k];
    most = std::max({most, invstd[k], std::fabs(scale[k])});
    least = std::min(least, invstd[k]);
    most_center = std::max({most_center, std::fabs(center[k]), std::fabs(shift[k])});
  }
  wide_[static_cast<std::size_t>(item)] = most > kLargest || least < 1 / kLargest || most_center > kLargestCenter;
  encode(item, Coef::center, Coef::slope);
}

void Coefficients::set_through(std::int64_t item, std::int64_t slice, std::int64_t channel, double count) {
  double *slope = values(item) + Coef::slope * width_, *offset = values(item) + Coef::offset * width_;
  const double *scale = values(item) + Coef::scale * width_;
  const double *residue = residue_.data() + item * width_, *invstd = invstd_.data() + item * width_;
  bool wide = wide_[static_cast<std::size_t>(item)] != 0;
  const std::int64_t sums = slice * p_.c + channel;
  const double share = 1 / (count < 1 ? 1 : count);
  for (std::int64_t k = 0; k < channels(channel); ++k) {
    slope[k] = -p_.sum_dy_xmu[sums + k] * share * invstd[k] * invstd[k] * (p_.in_place ? 1 : scale[k]);
    offset[k] = -p_.sum_dy[sums + k] * share * scale[k] - residue[k] * slope[k];
    wide |= std::fabs(slope[k]) > kLargest || std::fabs(offset[k]) > kLargestCenter;
    wide |= slope[k] != 0 && std::fabs(slope[k]) < kLeastSlope && invstd[k] < 1;
  }
  wide_[static_cast<std::size_t>(item)] = wide;
  encode(item, Coef::slope, kCoefs);
}

double Coefficients::center_residue(std::int64_t item, std::int64_t k) const {
  return residue_[static_cast<std::size_t>(item * width_ + k)];
}

void Coefficients::encode(std::int64_t item, int begin, int end) {
  if (p_.dtype == Dtype::f64 || wide_[static_cast<std::size_t>(item)]) return;
  const double* v = values(item);
  float* f = narrow_.data() + item * kCoefs * width_;
  constexpr float nan = std::numeric_limits<float>::quiet_NaN();  // without the payload that γ or β may carry
  for (std::int64_t k = begin * width_; k < end * width_; ++k) f[k] = v[k] == v[k] ? static_cast<float>(v[k]) : nan;
  const auto arrange = kernels().leaf[static_cast<int>(p_.dtype)].arrange;
  for (int row = begin; arrange && p_.channels_last && row < end; ++row) arrange(f + row * width_, width_);
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
