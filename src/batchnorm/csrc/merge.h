// Putting the chunks' results together, in pairs, pairs of pairs and so on: the order depends on their number alone,
// and the error grows with its logarithm. Each chunk has rows of `width` values, of which `c` are put together from the
// pointer on. Afterwards chunk 0 holds the result.
#pragma once

#include <algorithm>

#include "leaf.h"

namespace bn {

// Three rows: deviations of the means from the shifts, sums of squared deviations from the means, shifts; of count[chunk]
// values each (Chan, Golub and LeVeque 1979). Means that are rounded by themselves would differ by their rounding.
inline void merge_moments(double* chunk, double* count, std::int64_t chunks, std::int64_t width, std::int64_t c) {
  for (std::int64_t step = 1; step < chunks; step *= 2)
    for (std::int64_t i = 0; i + step < chunks; i += 2 * step) {
      double *a = chunk + 3 * width * i, *b = chunk + 3 * width * (i + step);
      if (count[i + step] == 0) continue;
      if (count[i] == 0)
        for (std::int64_t row = 0; row < 3; ++row) std::copy_n(b + row * width, c, a + row * width);
      else kernels().channels.join(count[i], count[i + step], c, width, a, b);
      count[i] += count[i + step];
    }
}

// Two rows.
inline void merge_sums(double* chunk, std::int64_t chunks, std::int64_t width, std::int64_t c) {
  for (std::int64_t step = 1; step < chunks; step *= 2)
    for (std::int64_t i = 0; i + step < chunks; i += 2 * step)
      for (std::int64_t row = 0; row < 2; ++row)
        kernels().channels.add(chunk + (2 * (i + step) + row) * width, c, chunk + (2 * i + row) * width);
}

}  // namespace bn
