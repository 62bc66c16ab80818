// Putting the chunks' results together, in pairs, pairs of pairs and so on: the order depends on their number alone,
// and the error grows with its logarithm.
#pragma once

#include <cstdint>

namespace bn {

// Each chunk holds `c` first values and `c` second values. Afterwards chunk 0 holds the result.

// Means and sums of squared deviations, of count[chunk] values each (Chan, Golub and LeVeque 1979).
inline void merge_moments(double* chunk, double* count, std::int64_t chunks, std::int64_t c) {
  for (std::int64_t step = 1; step < chunks; step *= 2)
    for (std::int64_t i = 0; i + step < chunks; i += 2 * step) {
      const double na = count[i], nb = count[i + step], n = na + nb;
      if (nb == 0) continue;
      double *mean = chunk + 2 * c * i, *square = mean + c;
      const double *mean_b = chunk + 2 * c * (i + step), *square_b = mean_b + c;
      const double share = nb / n, weight = na * share;
      for (std::int64_t k = 0; k < c; ++k) {
        // equal means may be infinite, and then have no difference
        const double delta = mean[k] == mean_b[k] ? 0.0 : mean_b[k] - mean[k];
        mean[k] = na == 0 ? mean_b[k] : mean[k] + delta * share;
        square[k] = na == 0 ? square_b[k] : square[k] + square_b[k] + delta * delta * weight;
      }
      count[i] = n;
    }
}

inline void merge_sums(double* chunk, std::int64_t chunks, std::int64_t c) {
  for (std::int64_t step = 1; step < chunks; step *= 2)
    for (std::int64_t i = 0; i + step < chunks; i += 2 * step) {
      double* a = chunk + 2 * c * i;
      const double* b = chunk + 2 * c * (i + step);
      for (std::int64_t k = 0; k < 2 * c; ++k) a[k] += b[k];
    }
}

}  // namespace bn
