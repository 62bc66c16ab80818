#include "arguments.h"

#include <algorithm>
#include <cmath>

#include "blocks.h"

namespace bn {
namespace {

Act activation(const std::string& name) {
  static const std::pair<const char*, Act> names[] = {
      {"", Act::none},   {"relu", Act::relu},           {"relu6", Act::relu6},     {"leaky_relu", Act::leaky_relu},
      {"silu", Act::silu}, {"hardswish", Act::hardswish}, {"sigmoid", Act::sigmoid}, {"tanh", Act::tanh}};
  for (const auto& known : names)
    if (name == known.first) return known.second;
  STD_TORCH_CHECK(false, "activation must be relu, relu6, leaky_relu, silu, hardswish, sigmoid, tanh or empty, got ", name);
}

std::size_t step(Dtype t) { return t == Dtype::f64 ? 8 : t == Dtype::f32 ? 4 : 2; }

}  // namespace

void Call::take_affine(Arguments& in) {
  weight = in.optional_tensor();
  bias = in.optional_tensor();
  residual = in.optional_tensor();
}

void Call::take_form(Arguments& in) {
  problem.eps = in.number();
  problem.act = activation(in.text());
  problem.negative_slope = in.number();
  slice_size = in.integer();
}

void Call::prepare() {
  STD_TORCH_CHECK(input.dim() >= 2, "expected an input of at least 2 dimensions, (N, C, *), got shape ", input.shape());
  STD_TORCH_CHECK(floating(input.dtype(), &problem.dtype),
                  "batch normalization takes float32, float64, bfloat16 or float16 on the CPU");
  STD_TORCH_CHECK(slice_size >= 0, "slice_size must be 0 (the whole batch) or positive, got ", slice_size);
  fill_shape();
  lay_out();
  if (mask) {
    STD_TORCH_CHECK(mask.dtype() == aoti_torch_dtype_bool(), "mask must be a bool tensor");
    STD_TORCH_CHECK(mask.numel() == problem.n * problem.s, "mask of shape ", mask.shape(),
                    " must hold one value for each sample and position of the input ", input.shape());
    if (!mask.contiguous()) {
      Tensor whole = dense_like(mask, false);
      copy(whole, mask);
      mask = std::move(whole);
    }
    problem.mask = static_cast<const std::uint8_t*>(mask.data());
  }
  if (weight) problem.weight = doubles(weight, problem.c, "weight");
  if (bias) problem.bias = doubles(bias, problem.c, "bias");
}

void Call::fill_shape() {
  const std::int64_t* size = input.sizes();
  problem.n = size[0];
  problem.c = size[1];
  for (std::int64_t i = 2; i < input.dim(); ++i) problem.s *= size[i];
  problem.slice_size = slice_size >= problem.n ? 0 : slice_size;  // one slice either way
}

void Call::lay_out() {
  bool innermost = false;
  if (!input.contiguous()) {
    innermost = input.channels_innermost();
    if (!innermost) {  // one copy, into the nearer layout
      innermost = input.strides()[1] == 1 && problem.c > 1;
      Tensor dense = dense_like(input, innermost);
      copy(dense, input);
      input = std::move(dense);
    }
  }
  // (N, C): both layouts at once; rows are the longer runs. One channel: likewise, but one line.
  problem.channels_last = (innermost || problem.s == 1) && problem.c > 1;
  problem.x = input.data();
  if (grad_output) problem.grad = (grad_output = like_input(std::move(grad_output), "grad_output")).data();
  if (residual) problem.residual = (residual = like_input(std::move(residual), "residual")).data();
}

Tensor Call::like_input(Tensor t, const char* name) const {
  STD_TORCH_CHECK(t.same_sizes(input), name, " of shape ", t.shape(), " must have the input's shape ", input.shape());
  STD_TORCH_CHECK(t.dtype() == input.dtype(), name, " must have the input's dtype");
  if (input.contiguous() ? t.contiguous() : t.channels_innermost()) return t;
  Tensor dense = empty_like(input);
  copy(dense, t);
  return dense;
}

void Call::new_moments() {
  mean = new_rows();
  var = new_rows();
  count = empty({problem.rows()}, aoti_torch_dtype_float64());
  problem.mean = static_cast<double*>(mean.data());
  problem.var = static_cast<double*>(var.data());
  problem.count = static_cast<double*>(count.data());
}

void Call::read_moments() {
  const std::int64_t all = problem.rows() * problem.c;
  problem.one_row = mean.numel() == problem.c;
  const std::int64_t expected = problem.one_row ? problem.c : all;
  problem.mean = doubles(mean, expected, "mean");
  problem.var = doubles(var, expected, "var");
}

Pool Call::pool() const {
  Pool pool;
  std::uint32_t threads;
  check(torch_get_num_threads(&threads), "get_num_threads");
  pool.threads = static_cast<int>(threads);
  pool.run = [](std::int64_t count, void (*body)(std::int64_t, std::int64_t, void*), void* context) {
    check(torch_parallel_for(0, count, 1, body, context), "parallel_for");
  };
  return pool;
}

Tensor Call::new_output() const {
  const std::size_t bytes = static_cast<std::size_t>(problem.n * problem.c * problem.s) * step(problem.dtype);
  return bytes < kLeastBlock ? empty_like(input) : large_empty_like(input, bytes);
}

Tensor Call::new_rows() const { return empty({problem.rows(), problem.c}, aoti_torch_dtype_float64()); }

Tensor Call::grad_vector(bool of_weight) const {
  const Problem& p = problem;
  std::vector<double> total(static_cast<std::size_t>(p.c)), invstd(of_weight ? total.size() : 0);
  for (std::int64_t r = 0; r < p.rows(); ++r) {
    if (of_weight && (r == 0 || !p.one_row)) kernels().channels.invstd(p.var + (p.one_row ? 0 : r * p.c), p.eps, p.c, invstd.data());
    const double* sums = (of_weight ? p.sum_dy_xmu : p.sum_dy) + r * p.c;
    for (std::size_t k = 0; k < total.size(); ++k) total[k] += of_weight ? sums[k] * invstd[k] : sums[k];
  }
  Tensor grad = empty({p.c}, (of_weight ? weight : bias).dtype());
  write_back(grad, total.data());
  return grad;
}

double* Call::doubles(const Tensor& t, std::int64_t expected, const char* name) {
  Dtype type;
  STD_TORCH_CHECK(floating(t.dtype(), &type), name, " must be a floating-point tensor");
  STD_TORCH_CHECK(t.numel() == expected, name, " of shape ", t.shape(), " must hold ", expected, " values");
  const bool dense = t.contiguous();
  if (dense && type == Dtype::f64) return static_cast<double*>(t.data());
  Tensor whole;
  if (!dense) {
    whole = dense_like(t, false);
    copy(whole, t);
  }
  kept_.emplace_back(static_cast<std::size_t>(expected));
  kernels().leaf[static_cast<int>(type)].widen((dense ? t : whole).data(), expected, kept_.back().data());
  return kept_.back().data();
}

void Call::write_back(const Tensor& t, const double* values) const {
  Dtype type;
  STD_TORCH_CHECK(floating(t.dtype(), &type), "buffers must be floating-point tensors");
  if (values == t.data()) return;
  if (t.contiguous()) return kernels().leaf[static_cast<int>(type)].narrow(values, t.numel(), t.data());
  Tensor dense = dense_like(t, false);
  kernels().leaf[static_cast<int>(type)].narrow(values, t.numel(), dense.data());
  copy(t, dense);
}

double Call::count_batch(const Tensor& batches) const {
  STD_TORCH_CHECK(batches.dtype() == aoti_torch_dtype_int64() && batches.numel() == 1,
                  "num_batches_tracked must be one int64 value");
  return static_cast<double>(++*static_cast<std::int64_t*>(batches.data()));
}

}  // namespace bn
