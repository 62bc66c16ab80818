#include "arguments.h"

#include <algorithm>
#include <cmath>

#include "../kernels/blocks.h"

namespace bn {
namespace {

Activation activation(const std::string& name) {
  static const std::pair<const char*, Activation> names[] = {
      {"", Activation::none},           {"relu", Activation::relu},
      {"relu6", Activation::relu6},     {"leaky_relu", Activation::leaky_relu},
      {"silu", Activation::silu},       {"hardswish", Activation::hardswish},
      {"sigmoid", Activation::sigmoid}, {"tanh", Activation::tanh}};
  for (const auto& entry : names)
    if (name == entry.first) return entry.second;
  STD_TORCH_CHECK(false, "activation must be relu, relu6, leaky_relu, silu, hardswish, sigmoid, tanh or empty, got ",
                  name);
}

}  // namespace

void OperatorCall::take_affine(Arguments& in) {
  weight = in.optional_tensor();
  bias = in.optional_tensor();
  residual = in.optional_tensor();
}

void OperatorCall::take_form(Arguments& in) {
  problem.eps = in.number();
  problem.activation = activation(in.text());
  problem.negative_slope = in.number();
  slice_size = in.integer();
}

void OperatorCall::prepare() {
  STD_TORCH_CHECK(input.dim() >= 2, "expected an input of at least 2 dimensions, (N, C, *), got shape ", input.shape());
  STD_TORCH_CHECK(to_dtype(input.dtype(), &problem.dtype),
                  "batch normalization takes float32, float64, bfloat16 or float16 on the CPU");
  STD_TORCH_CHECK(slice_size >= 0, "slice_size must be 0 (the whole batch) or positive, got ", slice_size);
  fill_shape();
  choose_layout();
  if (mask) {
    STD_TORCH_CHECK(mask.dtype() == aoti_torch_dtype_bool(), "mask must be a bool tensor");
    STD_TORCH_CHECK(mask.numel() == problem.n * problem.s, "mask of shape ", mask.shape(),
                    " must hold one value for each sample and position of the input ", input.shape());
    if (!mask.is_contiguous()) {
      Tensor dense = dense_like(mask, false);
      copy(dense, mask);
      mask = std::move(dense);
    }
    problem.valid_mask = static_cast<const std::uint8_t*>(mask.data());
  }
  if (weight) problem.weight = as_float64(weight, problem.c, "weight");
  if (bias) problem.bias = as_float64(bias, problem.c, "bias");
}

void OperatorCall::fill_shape() {
  const std::int64_t* size = input.sizes();
  problem.n = size[0];
  problem.c = size[1];
  for (std::int64_t i = 2; i < input.dim(); ++i) problem.s *= size[i];
  problem.slice_size = slice_size >= problem.n ? 0 : slice_size;  // then there is one slice
}

void OperatorCall::choose_layout() {
  bool channels_last = false;
  if (!input.is_contiguous()) {
    channels_last = input.is_channels_last();
    if (!channels_last) {  // one copy, into the more similar layout
      channels_last = input.strides()[1] == 1 && problem.c > 1;
      Tensor dense = dense_like(input, channels_last);
      copy(dense, input);
      input = std::move(dense);
    }
  }
  // An (N, C) tensor has both layouts. The loops for channels last are faster: a row then has c values and not one. A
  // tensor with one channel has both layouts too, and is faster as contiguous.
  problem.channels_last = (channels_last || problem.s == 1) && problem.c > 1;
  problem.x = input.data();
  if (grad_output) problem.grad = (grad_output = like_input(std::move(grad_output), "grad_output")).data();
  if (residual) problem.residual = (residual = like_input(std::move(residual), "residual")).data();
}

Tensor OperatorCall::like_input(Tensor t, const char* name) const {
  STD_TORCH_CHECK(t.same_sizes(input), name, " of shape ", t.shape(), " must have the input's shape ", input.shape());
  STD_TORCH_CHECK(t.dtype() == input.dtype(), name, " must have the input's dtype");
  if (input.is_contiguous() ? t.is_contiguous() : t.is_channels_last()) return t;
  Tensor dense = empty_like(input);
  copy(dense, t);
  return dense;
}

void OperatorCall::allocate_moments() {
  mean = allocate_slice_rows();
  var = allocate_slice_rows();
  count = empty({problem.slices()}, aoti_torch_dtype_float64());
  problem.mean = static_cast<double*>(mean.data());
  problem.var = static_cast<double*>(var.data());
  problem.count = static_cast<double*>(count.data());
}

void OperatorCall::convert_moments() {
  const std::int64_t values = problem.slices() * problem.c;
  problem.shared_moments = mean.numel() == problem.c;
  const std::int64_t expected = problem.shared_moments ? problem.c : values;
  problem.mean = as_float64(mean, expected, "mean");
  problem.var = as_float64(var, expected, "var");
}

ThreadPool OperatorCall::pool() const {
  ThreadPool pool;
  std::uint32_t threads;
  check(torch_get_num_threads(&threads), "get_num_threads");
  pool.threads = static_cast<int>(threads);
  pool.parallel_for = [](std::int64_t count, void (*body)(std::int64_t, std::int64_t, void*), void* context) {
    check(torch_parallel_for(0, count, 1, body, context), "parallel_for");
  };
  return pool;
}

Tensor OperatorCall::allocate_output() const {
  const std::size_t bytes = static_cast<std::size_t>(problem.n * problem.c * problem.s) * size_of(problem.dtype);
  return bytes < kMinBlockBytes ? empty_like(input) : large_empty_like(input, bytes);
}

Tensor OperatorCall::allocate_slice_rows() const {
  return empty({problem.slices(), problem.c}, aoti_torch_dtype_float64());
}

Tensor OperatorCall::affine_gradient(bool of_weight) const {
  const Problem& p = problem;
  std::vector<double> total(static_cast<std::size_t>(p.c)), invstd(of_weight ? total.size() : 0);
  for (std::int64_t r = 0; r < p.slices(); ++r) {
    if (of_weight && (r == 0 || !p.shared_moments))
      kernels().channels.invstd(p.var + (p.shared_moments ? 0 : r * p.c), p.eps, p.c, invstd.data());
    const double* sums = (of_weight ? p.sum_dy_xmu : p.sum_dy) + r * p.c;
    for (std::size_t k = 0; k < total.size(); ++k) total[k] += of_weight ? sums[k] * invstd[k] : sums[k];
  }
  Tensor grad = empty({p.c}, (of_weight ? weight : bias).dtype());
  write_back(grad, total.data());
  return grad;
}

double* OperatorCall::as_float64(const Tensor& t, std::int64_t expected, const char* name) {
  Dtype type;
  STD_TORCH_CHECK(to_dtype(t.dtype(), &type), name, " must be a floating-point tensor");
  STD_TORCH_CHECK(t.numel() == expected, name, " of shape ", t.shape(), " must hold ", expected, " values");
  const bool dense = t.is_contiguous();
  if (dense && type == Dtype::f64) return static_cast<double*>(t.data());
  Tensor copied;
  if (!dense) {
    copied = dense_like(t, false);
    copy(copied, t);
  }
  float64_copies_.emplace_back(static_cast<std::size_t>(expected));
  kernels().loops[static_cast<int>(type)].to_float64((dense ? t : copied).data(), expected, 1,
                                                     float64_copies_.back().data());
  return float64_copies_.back().data();
}

void OperatorCall::write_back(const Tensor& t, const double* values) const {
  Dtype type;
  STD_TORCH_CHECK(to_dtype(t.dtype(), &type), "buffers must be floating-point tensors");
  if (values == t.data()) return;
  if (t.is_contiguous()) return kernels().loops[static_cast<int>(type)].from_float64(values, t.numel(), t.data());
  Tensor dense = dense_like(t, false);
  kernels().loops[static_cast<int>(type)].from_float64(values, t.numel(), dense.data());
  copy(t, dense);
}

namespace {

template <class Integer> double increment(void* counter) {
  return static_cast<double>(++*static_cast<Integer*>(counter));
}

}  // namespace

// Averaged or converted models hold the counter in other types than int64. It counts on in its own type, as in torch.
double OperatorCall::increment_batches(const Tensor& batches) {
  STD_TORCH_CHECK(batches.numel() == 1, "num_batches_tracked must be one number, got shape ", batches.shape());
  const std::int32_t type = batches.dtype();
  if (type == aoti_torch_dtype_int64()) return increment<std::int64_t>(batches.data());
  if (type == aoti_torch_dtype_int32()) return increment<std::int32_t>(batches.data());
  if (type == aoti_torch_dtype_int16()) return increment<std::int16_t>(batches.data());
  if (type == aoti_torch_dtype_int8()) return increment<std::int8_t>(batches.data());
  if (type == aoti_torch_dtype_uint8()) return increment<std::uint8_t>(batches.data());
  if (type == aoti_torch_dtype_complex64()) return increment<float>(batches.data());  // the real part comes first
  if (type == aoti_torch_dtype_complex128()) return increment<double>(batches.data());
  Dtype floating;
  STD_TORCH_CHECK(to_dtype(type, &floating), "num_batches_tracked of this dtype cannot count");
  const double next = *as_float64(batches, 1, "num_batches_tracked") + 1;
  write_back(batches, &next);
  return *as_float64(batches, 1, "num_batches_tracked");  // as rounded to its type
}

}  // namespace bn
