#include <cmath>
#include <vector>

#include "problem.h"

namespace bn {

void update_running(const RunningUpdate& update) {
  double values = 0, degrees_of_freedom = 0;
  for (std::int64_t k = 0; k < update.slices; ++k) {
    values += update.count[k];
    degrees_of_freedom += update.count[k] > 1 ? update.count[k] - 1 : 0;
  }
  // no slice has two values, so there is no unbiased variance: the buffers stay as they are
  if (degrees_of_freedom == 0) return;
  std::vector<double> mean(static_cast<std::size_t>(update.c)), var(static_cast<std::size_t>(update.c));
  for (std::int64_t k = 0; k < update.slices; ++k) {
    if (update.count[k] == 0) continue;  // an empty slice has no moments
    const double mean_weight = update.count[k] / values, var_weight = update.count[k] / degrees_of_freedom;
    for (std::int64_t c = 0; c < update.c; ++c) {
      mean[static_cast<std::size_t>(c)] += mean_weight * update.batch_mean[k * update.c + c];
      var[static_cast<std::size_t>(c)] += var_weight * update.batch_var[k * update.c + c];
    }
  }
  bool finite = true;
  for (std::size_t c = 0; c < mean.size(); ++c)  // a NaN compares false
    finite = finite && std::fabs(mean[c]) < update.overflow && std::fabs(var[c]) < update.overflow;
  if (update.skip_nonfinite && !finite) return;
  // not old + factor * (new - old), which at factor 1 loses a new value far below the old one
  for (std::size_t c = 0; c < mean.size(); ++c) {
    if (update.mean) update.mean[c] = (1 - update.factor) * update.mean[c] + update.factor * mean[c];
    if (update.var) update.var[c] = (1 - update.factor) * update.var[c] + update.factor * var[c];
  }
}

}  // namespace bn
