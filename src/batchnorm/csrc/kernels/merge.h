// Merges the results of an item's chunks: in pairs, then pairs of pairs, and so on. The order depends on the number of
// chunks alone, and the error grows with its logarithm. The results of a chunk are rows of `width` values. The
// functions merge the first `n` channels from the pointer on. Afterwards chunk 0 holds the result.
#pragma once

#include <algorithm>

#include "kernel_table.h"

namespace bn {

// Three rows a chunk: mean of (x - shift), Σ(x - mean)², shift. The shift is not added to the mean: the rounding
// of that sum would be an error of the differences between the chunks.
inline void merge_moments(double* chunk, double* count, std::int64_t chunks, std::int64_t width, std::int64_t n) {
  for (std::int64_t step = 1; step < chunks; step *= 2)
    for (std::int64_t i = 0; i + step < chunks; i += 2 * step) {
      double *a = chunk + 3 * width * i, *b = chunk + 3 * width * (i + step);
      if (count[i + step] == 0) continue;
      if (count[i] == 0)
        for (std::int64_t row = 0; row < 3; ++row) std::copy_n(b + row * width, n, a + row * width);
      else kernels().channels.chan_merge(count[i], count[i + step], n, width, a, b);
      count[i] += count[i + step];
    }
}

// Two rows a chunk: Σ dz and Σ dz·(x - center).
inline void merge_sums(double* chunk, std::int64_t chunks, std::int64_t width, std::int64_t n) {
  for (std::int64_t step = 1; step < chunks; step *= 2)
    for (std::int64_t i = 0; i + step < chunks; i += 2 * step)
      for (std::int64_t row = 0; row < 2; ++row)
        kernels().channels.add(chunk + (2 * (i + step) + row) * width, n, chunk + (2 * i + row) * width);
}

}  // namespace bn
