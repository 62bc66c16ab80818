// The kernels' interface: what a caller (register.cpp, or the sanitizers' driver) fills in and calls.
#pragma once

#include <cmath>
#include <cstddef>

#include "leaf.h"

namespace bn {

// The caller's threads. `run` calls body(begin, end, context) on ranges that cover [0, count) and returns when all are
// done; which thread takes which range changes no result.
struct Pool {
  int threads = 1;
  void (*run)(std::int64_t count, void (*body)(std::int64_t, std::int64_t, void*), void* context) = nullptr;
};

// x is (n, c, s) in memory, or (n, s, c) where channels_last. All large tensors share its layout and type.
struct Problem {
  Dtype dtype = Dtype::f32;
  bool channels_last = false;
  std::int64_t n = 0, c = 0, s = 1;
  std::int64_t slice_size = 0;  // samples a slice; 0 = all in one
  const void* x = nullptr;
  const void* grad = nullptr;
  const void* residual = nullptr;
  const std::uint8_t* mask = nullptr;  // (n, s)
  void* out = nullptr;                 // output, or grad_input
  void* grad_residual = nullptr;
  bool in_place = false;               // of a backward: x holds what the forward wrote over it, without a residual
  const double* weight = nullptr;  // (c) or null
  const double* bias = nullptr;
  double* mean = nullptr;  // (rows, c); stats and forward write it, all others read it
  double* var = nullptr;
  double* count = nullptr;  // (rows); null in a backward: frozen statistics
  bool one_row = false;     // mean and var are (c), the same for every slice
  double* sum_dy = nullptr;  // (rows, c)
  double* sum_dy_xmu = nullptr;
  double eps = 0;
  Act act = Act::none;
  double negative_slope = 0;

  std::int64_t rows() const {
    if (!slice_size || !n) return 1;
    return (n + slice_size - 1) / slice_size;
  }
};

void stats(const Problem&, const Pool&);            // x, mask -> mean, var, count
void apply(const Problem&, const Pool&);            // x, mean, var, ... -> out
void forward(const Problem&, const Pool&);          // the two, a channel still in cache
void backward_reduce(const Problem&, const Pool&);  // -> sum_dy, sum_dy_xmu
void backward_elemt(const Problem&, const Pool&);   // sums, count -> out (if any), grad_residual (if any)
void backward(const Problem&, const Pool&);         // the two together; count null: the sums alone do not matter to out

// The running statistics, of `rows` sets of moments pooled by their counts. Buffers may be null.
struct Running {
  double* mean = nullptr;  // (c), read and written
  double* var = nullptr;
  std::int64_t c = 0, rows = 1;
  const double* batch_mean = nullptr;  // (rows, c)
  const double* batch_var = nullptr;
  const double* count = nullptr;  // (rows)
  double factor = 0;              // weight of the new batch
  bool skip_nonfinite = false;
  double overflow = HUGE_VAL;  // from here on a value is infinite in the buffers' dtype
};
void update_running(const Running&);

}  // namespace bn
