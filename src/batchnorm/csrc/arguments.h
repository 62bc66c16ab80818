// One call of an operator: its tensors, checked and brought into a layout that the kernels know, and the Problem made
// of them. Everything is refused before anything is written.
#pragma once

#include <deque>

#include "tensor.h"

namespace bn {

struct Call {
  Tensor input, grad_output, residual, mask, weight, bias, mean, var, count;
  std::int64_t slice_size = 0;
  Problem problem;

  void take_affine(Arguments& in);
  void take_form(Arguments& in);
  void prepare();       // checks; fills the problem but for outputs and moments
  void new_moments();   // allocates mean, var, count
  void read_moments();  // mean and var as float64
  Pool pool() const;

  Tensor new_output() const;  // of the input's layout and type
  Tensor new_rows() const;    // (rows, c) float64
  Tensor nothing() const { return empty({0}, input.dtype()); }
  Tensor grad_vector(bool weight) const;

  // A small vector as float64: itself where it is that already, else a copy that lives as long as the call.
  double* doubles(const Tensor& t, std::int64_t expected, const char* name);
  void write_back(const Tensor& t, const double* values) const;
  double count_batch(const Tensor& batches) const;

 private:
  void lay_out();
  Tensor like_input(Tensor t, const char* name) const;
  void fill_shape();
  std::deque<std::vector<double>> kept_;
};

}  // namespace bn
