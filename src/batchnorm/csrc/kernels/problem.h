// The interface of the kernels. A caller (torch/register.cpp or the sanitizers' driver) fills in a Problem and calls a
// function.
#pragma once

#include <cmath>

#include "kernel_table.h"

namespace bn {

// The threads of the caller. `parallel_for` calls body(begin, end, context) on ranges that cover [0, count) and returns
// when all of them are done. No result depends on which thread takes which range.
struct ThreadPool {
  int threads = 1;
  void (*parallel_for)(std::int64_t count, void (*body)(std::int64_t, std::int64_t, void*), void* context) = nullptr;
};

// x is (n, c, s) in memory, or (n, s, c) where channels_last. All large tensors have the layout and the type of x.
struct Problem {
  Dtype dtype = Dtype::f32;
  bool channels_last = false;
  std::int64_t n = 0, c = 0, s = 1;
  std::int64_t slice_size = 0;  // samples a slice; 0 = one slice
  const void* x = nullptr;
  const void* grad = nullptr;
  const void* residual = nullptr;
  const std::uint8_t* valid_mask = nullptr;  // (n, s)
  void* out = nullptr;                       // output, or grad_input
  void* grad_residual = nullptr;
  bool in_place = false;           // backward: x contains the outputs of the forward; there is no residual
  const double* weight = nullptr;  // (c) or null
  const double* bias = nullptr;    // (c) or null
  double* mean = nullptr;          // (slices, c); stats and forward write it, all others read it
  double* var = nullptr;           // as mean
  double* count = nullptr;         // (slices); null in a backward: fixed statistics
  bool shared_moments = false;     // mean and var are (c), the same for every slice
  double* sum_dy = nullptr;        // (slices, c)
  double* sum_dy_xmu = nullptr;    // (slices, c)
  double eps = 0;
  Activation activation = Activation::none;
  double negative_slope = 0;

  std::int64_t slices() const {
    if (!slice_size || !n) return 1;
    return (n + slice_size - 1) / slice_size;
  }
};

void stats(const Problem&, const ThreadPool&);            // x, valid_mask -> mean, var, count
void apply(const Problem&, const ThreadPool&);            // x, mean, var, ... -> out
void forward(const Problem&, const ThreadPool&);          // stats and apply, fused
void backward_reduce(const Problem&, const ThreadPool&);  // -> sum_dy, sum_dy_xmu
void backward_elemt(const Problem&, const ThreadPool&);   // sums, count -> out (or null), grad_residual (or null)
void backward(const Problem&, const ThreadPool&);         // both, fused; count null: out does not depend on the sums

// The update of the running statistics by the moments of `slices` slices, pooled by their counts.
struct RunningUpdate {
  double* mean = nullptr;  // (c), read and written; may be null
  double* var = nullptr;   // as mean
  std::int64_t c = 0, slices = 1;
  const double* batch_mean = nullptr;  // (slices, c)
  const double* batch_var = nullptr;   // (slices, c)
  const double* count = nullptr;       // (slices)
  double factor = 0;                   // weight of the new batch
  bool skip_nonfinite = false;
  double overflow = HUGE_VAL;  // the smallest magnitude that is infinite in the dtype of the buffers
};
void update_running(const RunningUpdate&);

}  // namespace bn
