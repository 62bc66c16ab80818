#include "coefficients.h"

namespace bn {

Coefficients::Coefficients(const Problem& p, std::int64_t items, std::int64_t item_channels, std::int64_t columns)
    : p_(p),
      item_channels_(item_channels),
      columns_(columns),
      float64_(static_cast<std::size_t>(items * kCoefs * item_channels)),
      residue_(static_cast<std::size_t>(items * item_channels)),
      invstd_(residue_.size()),
      out_of_range_(new std::atomic<bool>[static_cast<std::size_t>(items)]()) {
  // not set to zero: that would take longer than a small tensor's sums
  if (p.dtype != Dtype::f64) float32_.reset(new float[float64_.size() * static_cast<std::size_t>(columns)]);
}

ChannelCoefs Coefficients::channel_coefs(std::int64_t item, std::int64_t first) {
  double* c = float64_coefs(item) + first;
  const std::int64_t k = item * item_channels_ + first;
  return {c + Coef::center * item_channels_,
          c + Coef::scale * item_channels_,
          c + Coef::shift * item_channels_,
          c + Coef::slope * item_channels_,
          c + Coef::offset * item_channels_,
          residue_.data() + k,
          invstd_.data() + k};
}

void Coefficients::set_affine(std::int64_t item, std::int64_t slice, std::int64_t channel, ChannelRange range) {
  const std::int64_t first = channel + range.first, moments = (p_.shared_moments ? 0 : slice * p_.c) + first;
  const ChannelCoefs c = channel_coefs(item, range.first);
  const ChannelKernels& channels = kernels().channels;
  channels.invstd(p_.var + moments, p_.eps, range.count, c.invstd);
  const double *weight = p_.weight ? p_.weight + first : nullptr, *bias = p_.bias ? p_.bias + first : nullptr;
  const std::vector<double> no_bias(p_.in_place && !bias ? static_cast<std::size_t>(range.count) : 0);
  // in place the loops see z, whose mean is the bias
  const double* center = p_.in_place ? (bias ? bias : no_bias.data()) : p_.mean + moments;
  if (channels.affine_coefs(center, weight, bias, p_.dtype != Dtype::f64, range.count, c)) set_out_of_range(item);
  // a backward through fixed statistics reads slope and offset, which stay 0
  const bool fixed_statistics = p_.grad && !p_.count;
  convert(item, Coef::center, fixed_statistics ? kCoefs : Coef::slope, range);
}

void Coefficients::set_backward(std::int64_t item, std::int64_t slice, std::int64_t channel, ChannelRange range,
                                double count) {
  const std::int64_t sums = slice * p_.c + channel + range.first;
  const double inverse_count = 1 / (count < 1 ? 1 : count);
  if (kernels().channels.backward_coefs(p_.sum_dy + sums, p_.sum_dy_xmu + sums, inverse_count, !p_.in_place,
                                        range.count, channel_coefs(item, range.first)))
    set_out_of_range(item);
  convert(item, Coef::slope, kCoefs, range);
}

double Coefficients::residue(std::int64_t item, std::int64_t k) const {
  return residue_[static_cast<std::size_t>(item * item_channels_ + k)];
}

void Coefficients::convert(std::int64_t item, int begin, int end, ChannelRange range) {
  if (p_.dtype == Dtype::f64) return;
  const auto reorder = kernels().loops[static_cast<int>(p_.dtype)].reorder_coefs;
  std::vector<float> of_channels(columns_ > 1 ? static_cast<std::size_t>(range.count) : 0);
  for (int coef = begin; coef < end; ++coef) {
    float* to = float32_.get() + ((item * kCoefs + coef) * item_channels_ + range.first) * columns_;
    float* converted = columns_ > 1 ? of_channels.data() : to;
    kernels().channels.to_float32(float64_coefs(item) + coef * item_channels_ + range.first, range.count, converted);
    if (columns_ > 1) kernels().channels.spread(converted, range.count, columns_, to);
    if (reorder && (p_.channels_last || columns_ > 1)) reorder(to, range.count * columns_);
  }
}

const LoopTable& Coefficients::select(std::int64_t item, Chunk& chunk) const {
  if (needs_float64(item)) return select_float64(item, chunk);
  chunk.coef_stride = item_channels_ * columns_;
  chunk.coefs = float32_.get() + item * kCoefs * chunk.coef_stride;
  return kernels().loops[static_cast<int>(p_.dtype)];
}

const LoopTable& Coefficients::select_float64(std::int64_t item, Chunk& chunk) const {
  chunk.coef_stride = item_channels_;
  chunk.coefs = float64_coefs(item);
  return kernels().float64_loops[static_cast<int>(p_.dtype)];
}

}  // namespace bn
