// backward_reduce, backward_elemt, and the two fused.
#include <algorithm>

#include "merge.h"
#include "schedule.h"

namespace bn {
namespace {

class Backward : public JobBase {
 public:
  explicit Backward(const Problem& p)
      : JobBase(p, p.residual ? 3 : 2, (p.out != nullptr) + (p.grad_residual != nullptr)) {}

  std::int64_t partial_size() const { return 2 * width_; }

  void reduce(std::int64_t item, std::int64_t chunk, bool fused, double* partial) const {
    Slab s = slab_to_sum(item, chunk, fused);
    if (sums(coefficients_.use(item, s), s, partial)) return;
    sums(coefficients_.use_wide(item, s), s, partial);
  }

  void finish(std::int64_t item, Channels which, double* partials) {
    partials += which.first;
    merge_sums(partials, chunks(item), width_, which.count);
    double *dy = row(p_.sum_dy, item) + which.first, *dy_xmu = row(p_.sum_dy_xmu, item) + which.first;
    const bool any = chunks(item) > 0;
    for (std::int64_t k = 0; k < which.count; ++k) {
      const std::int64_t channel = which.first + k;
      const double about_mean = partials[width_ + k] - coefficients_.center_residue(item, channel) * partials[k];
      dy[k] = any ? partials[k] : 0;
      dy_xmu[k] = any ? about_mean / coefficients_.sum_scale(item, channel) : 0;
    }
    set_through(item, which);
  }

  void set_through(std::int64_t item, Channels which) {
    if (p_.count) coefficients_.set_through(item, slice(item), channel(item), which, p_.count[slice(item)]);
  }
  void set_through(const Pool& pool) {
    over_channels(pool, items() * width_ < kLeastSums, [&](std::int64_t item, Channels which) { set_through(item, which); });
  }

  void map(std::int64_t item, std::int64_t chunk, bool fused) const {
    Slab s = slab_to_write(item, chunk, fused);
    const Leaf& leaf = coefficients_.use(item, s);
    (p_.channels_last ? leaf.elemt_grid : leaf.elemt_line)[elementwise()](s);
  }

 private:
  // False where float32 products may have overflowed or been subnormal: float64 takes them then.
  bool sums(const Leaf& leaf, const Slab& s, double* partial) const {
    std::fill(partial, partial + 2 * width_, 0.0);
    const bool sound = (p_.channels_last ? leaf.reduce_grid : leaf.reduce_line)[reduction()](s, partial, partial + width_);
    return sound && kernels().channels.finite(partial, 2 * width_);
  }

  Variant reduction() const {
    if (p_.mask) return any_masked;
    if (p_.in_place) return any;
    if (p_.act == Act::none) return plain;  // neither activation nor residual reaches dz
    if (p_.act == Act::relu) return p_.residual ? relu_residual : relu;
    return any;
  }

  Variant elementwise() const {
    if (p_.mask) return any_masked;
    if (!p_.out || p_.in_place) return any;
    if (p_.act == Act::none && !p_.grad_residual) return plain;
    if (p_.act == Act::relu && !p_.residual && !p_.grad_residual) return relu;
    if (p_.act == Act::relu && p_.residual && p_.grad_residual) return relu_residual;
    return any;
  }
};

}  // namespace

void backward_reduce(const Problem& p, const Pool& pool) {
  Problem sums_only = p;
  sums_only.out = sums_only.grad_residual = nullptr;
  sums_only.count = nullptr;
  Backward job(sums_only);
  job.set_affine(pool);
  run(job, pool, {true, false});
}

void backward_elemt(const Problem& p, const Pool& pool) {
  Backward job(p);
  job.set_affine(pool);
  job.set_through(pool);
  run(job, pool, {false, true});
}

void backward(const Problem& p, const Pool& pool) {
  Backward job(p);
  job.set_affine(pool);
  run(job, pool, {true, p.out || p.grad_residual});
}

}  // namespace bn
