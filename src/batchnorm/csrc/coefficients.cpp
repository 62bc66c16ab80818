#include "coefficients.h"

namespace bn {

Coefficients::Coefficients(const Problem& p, std::int64_t items, std::int64_t width)
    : p_(p), width_(width), values_(static_cast<std::size_t>(items * kCoefs * width)),
      residue_(static_cast<std::size_t>(items * width)), invstd_(residue_.size()),
      wide_(new std::atomic<bool>[static_cast<std::size_t>(items)]()) {
  if (p.dtype != Dtype::f64) narrow_.resize(values_.size());
}

ChannelCoefs Coefficients::at(std::int64_t item, std::int64_t first) {
  double* v = values(item) + first;
  const std::int64_t one = item * width_ + first;
  return {v + Coef::center * width_, v + Coef::scale * width_, v + Coef::shift * width_, v + Coef::slope * width_,
          v + Coef::offset * width_, residue_.data() + one, invstd_.data() + one};
}

void Coefficients::set_affine(std::int64_t item, std::int64_t slice, std::int64_t channel, Channels which) {
  const std::int64_t from = channel + which.first, row = (p_.one_row ? 0 : slice * p_.c) + from;
  const ChannelCoefs c = at(item, which.first);
  const ChannelKernels& run = kernels().channels;
  run.invstd(p_.var + row, p_.eps, which.count, c.invstd);
  const double *weight = p_.weight ? p_.weight + from : nullptr, *bias = p_.bias ? p_.bias + from : nullptr;
  const std::vector<double> no_bias(p_.in_place && !bias ? static_cast<std::size_t>(which.count) : 0);
  // in place the loops see z, which lies about the bias as x does about the mean
  const double* center = p_.in_place ? (bias ? bias : no_bias.data()) : p_.mean + row;
  if (run.affine(center, weight, bias, p_.dtype != Dtype::f64, which.count, c)) set_wide(item);
  encode(item, Coef::center, Coef::slope, which);
}

void Coefficients::set_through(std::int64_t item, std::int64_t slice, std::int64_t channel, Channels which, double count) {
  const std::int64_t sums = slice * p_.c + channel + which.first;
  const double share = 1 / (count < 1 ? 1 : count);
  if (kernels().channels.through(p_.sum_dy + sums, p_.sum_dy_xmu + sums, share, !p_.in_place, which.count, at(item, which.first)))
    set_wide(item);
  encode(item, Coef::slope, kCoefs, which);
}

double Coefficients::center_residue(std::int64_t item, std::int64_t k) const {
  return residue_[static_cast<std::size_t>(item * width_ + k)];
}

void Coefficients::encode(std::int64_t item, int begin, int end, Channels which) {
  if (p_.dtype == Dtype::f64) return;
  const auto arrange = kernels().leaf[static_cast<int>(p_.dtype)].arrange;
  for (int row = begin; row < end; ++row) {
    float* to = narrow_.data() + (item * kCoefs + row) * width_ + which.first;
    kernels().channels.round(values(item) + row * width_ + which.first, which.count, to);
    if (arrange && p_.channels_last) arrange(to, which.count);
  }
}

const Leaf& Coefficients::use(std::int64_t item, Slab& slab) const {
  if (p_.dtype == Dtype::f64 || is_wide(item)) return use_wide(item, slab);
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
