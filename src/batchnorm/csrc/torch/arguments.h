// One call of an operator: its tensors, checked and in a layout that the kernels accept, and the Problem made from
// them. All checks come before the first write.
#pragma once

#include <deque>

#include "tensor.h"

namespace bn {

struct OperatorCall {
  Tensor input, grad_output, residual, mask, weight, bias, mean, var, count;
  std::int64_t slice_size = 0;
  Problem problem;

  void take_affine(Arguments& in);
  void take_form(Arguments& in);
  void prepare();           // checks; sets the problem's fields, without outputs and moments
  void allocate_moments();  // allocates mean, var, count
  void convert_moments();   // mean and var, converted to float64
  ThreadPool pool() const;

  Tensor allocate_output() const;      // with the layout and type of the input
  Tensor allocate_slice_rows() const;  // (slices, c) float64
  Tensor empty_tensor() const { return empty({0}, input.dtype()); }
  Tensor affine_gradient(bool of_weight) const;  // grad_weight or grad_bias

  // The values of a small tensor as float64: its own memory, or else a copy that lives as long as this call.
  double* as_float64(const Tensor& t, std::int64_t expected, const char* name);
  void write_back(const Tensor& t, const double* values) const;
  double increment_batches(const Tensor& batches);  // returns the new count

 private:
  void choose_layout();
  Tensor like_input(Tensor t, const char* name) const;
  void fill_shape();
  std::deque<std::vector<double>> float64_copies_;
};

}  // namespace bn
