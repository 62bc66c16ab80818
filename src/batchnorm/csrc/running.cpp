#include <cmath>
#include <vector>

#include "problem.h"

namespace bn {

void update_running(const Running& r) {
  double total = 0, free = 0;
  for (std::int64_t k = 0; k < r.rows; ++k) {
    total += r.count[k];
    free += r.count[k] > 1 ? r.count[k] - 1 : 0;
  }
  if (free == 0) return;  // no variance can be told (empty, or one value a slice): the buffers stay
  std::vector<double> mean(static_cast<std::size_t>(r.c)), var(static_cast<std::size_t>(r.c));
  for (std::int64_t k = 0; k < r.rows; ++k) {
    if (r.count[k] == 0) continue;  // its moments say nothing
    const double of_mean = r.count[k] / total, of_var = r.count[k] / free;
    for (std::int64_t c = 0; c < r.c; ++c) {
      mean[static_cast<std::size_t>(c)] += of_mean * r.batch_mean[k * r.c + c];
      var[static_cast<std::size_t>(c)] += of_var * r.batch_var[k * r.c + c];
    }
  }
  bool finite = true;
  for (std::size_t c = 0; c < mean.size(); ++c)
    finite = finite && std::fabs(mean[c]) < r.overflow && std::fabs(var[c]) < r.overflow;  // false for NaN
  if (r.skip_nonfinite && !finite) return;
  for (std::size_t c = 0; c < mean.size(); ++c) {
    if (r.mean) r.mean[c] += r.factor * (mean[c] - r.mean[c]);
    if (r.var) r.var[c] += r.factor * (var[c] - r.var[c]);
  }
}

}  // namespace bn
