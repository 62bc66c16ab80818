// backward_reduce, backward_elemt, and both fused.
#include <algorithm>

#include "merge.h"
#include "schedule.h"

namespace bn {
namespace {

class BackwardJob : public JobBase {
 public:
  explicit BackwardJob(const Problem& p)
      : JobBase(p, p.residual ? 3 : 2, (p.out != nullptr) + (p.grad_residual != nullptr)) {}

  std::int64_t partial_size() const { return 2 * item_channels_; }

  void reduce(std::int64_t item, std::int64_t index, bool fused, double* partial) const {
    const bool columns = in_columns(item);
    Chunk chunk = chunk_to_reduce(item, index, fused, columns);
    const LoopTable& loops = coefficients_.select(item, chunk);
    if (columns ? sums_of_columns(loops, chunk, channels(item), partial) : sums(loops, chunk, partial)) return;
    if (columns) chunk = chunk_to_reduce(item, index, fused, false);
    sums(coefficients_.select_float64(item, chunk), chunk, partial);
  }

  void finalize(std::int64_t item, ChannelRange range, double* partials) {
    partials += range.first;
    merge_sums(partials, chunks(item), item_channels_, range.count);
    double *dy = item_row(p_.sum_dy, item) + range.first, *dy_xmu = item_row(p_.sum_dy_xmu, item) + range.first;
    const bool has_values = chunks(item) > 0;
    for (std::int64_t k = 0; k < range.count; ++k) {
      const std::int64_t channel = range.first + k;
      const double centered = partials[item_channels_ + k] - coefficients_.residue(item, channel) * partials[k];
      dy[k] = has_values ? partials[k] : 0;
      dy_xmu[k] = has_values ? centered / coefficients_.sum_scale(item, channel) : 0;
    }
    set_backward(item, range);
  }

  void set_backward(std::int64_t item, ChannelRange range) {
    if (p_.count) coefficients_.set_backward(item, slice(item), channel(item), range, p_.count[slice(item)]);
  }
  void set_backward(const ThreadPool& pool) {
    for_each_range(pool, items() * item_channels_ < kMinParallelSums,
                   [&](std::int64_t item, ChannelRange range) { set_backward(item, range); });
  }

  void write(std::int64_t item, std::int64_t index, bool fused) const {
    const bool columns = in_columns(item);
    Chunk chunk = chunk_to_write(item, index, fused, columns);
    const LoopTable& loops = coefficients_.select(item, chunk);
    (p_.channels_last || columns ? loops.backward_elemt_channels_last
                                 : loops.backward_elemt_contiguous)[elemt_variant()](chunk);
  }

 private:
  // False where a float32 product may have overflowed or been subnormal. The caller then repeats the sums in float64.
  bool sums(const LoopTable& loops, const Chunk& chunk, double* partial) const {
    double* const dz_x = partial + item_channels_;
    std::fill(partial, dz_x + item_channels_, 0.0);
    bool exact = true;
    if (p_.channels_last) exact = loops.backward_reduce_channels_last[reduce_variant()](chunk, partial, dz_x);
    else
      for_each_block(chunk, [&](const Chunk& block, std::int64_t first) {
        exact &= loops.backward_reduce_contiguous[reduce_variant()](block, partial + first, dz_x + first);
      });
    return exact && kernels().channels.all_finite(partial, 2 * item_channels_);
  }
  bool sums_of_columns(const LoopTable& loops, const Chunk& chunk, std::int64_t channels, double* partial) const {
    const ColumnSums columns(channels, partition_.columns());
    const bool exact = loops.backward_reduce_channels_last[reduce_variant()](chunk, columns.row(0), columns.row(1));
    columns.gather(0, partial);
    columns.gather(1, partial + item_channels_);
    return exact && kernels().channels.all_finite(partial, channels) &&
           kernels().channels.all_finite(partial + item_channels_, channels);
  }

  Variant reduce_variant() const {
    if (p_.valid_mask) return generic_masked;
    if (p_.in_place) return generic;
    if (p_.activation == Activation::none) return plain;  // then dz = grad, whatever the residual
    if (p_.activation == Activation::relu) return p_.residual ? relu_residual : relu;
    return generic;
  }

  Variant elemt_variant() const {
    if (p_.valid_mask) return generic_masked;
    if (!p_.out || p_.in_place) return generic;
    if (p_.activation == Activation::none && !p_.grad_residual) return plain;
    if (p_.activation == Activation::relu && !p_.residual && !p_.grad_residual) return relu;
    if (p_.activation == Activation::relu && p_.residual && p_.grad_residual) return relu_residual;
    return generic;
  }
};

}  // namespace

void backward_reduce(const Problem& p, const ThreadPool& pool) {
  Problem sums_only = p;
  sums_only.out = sums_only.grad_residual = nullptr;
  sums_only.count = nullptr;
  BackwardJob job(sums_only);
  job.set_affine(pool);
  execute(job, pool, {true, false});
}

void backward_elemt(const Problem& p, const ThreadPool& pool) {
  BackwardJob job(p);
  job.set_affine(pool);
  job.set_backward(pool);
  execute(job, pool, {false, true});
}

void backward(const Problem& p, const ThreadPool& pool) {
  BackwardJob job(p);
  job.set_affine(pool);
  execute(job, pool, {true, p.out || p.grad_residual});
}

}  // namespace bn
