// The operators of src/batchnorm/ops/schemas.py for the CPU. Each reads its arguments, fills a Problem and calls a
// kernel.
#include "../kernels/blocks.h"
#include "arguments.h"

namespace bn {
namespace {

// The first arguments of every backward.
void take_gradient(OperatorCall& call, Arguments& in) {
  call.grad_output = in.tensor();
  call.input = in.tensor();
  call.mean = in.tensor();
  call.var = in.tensor();
}

void release_moments(OperatorCall& call, StableIValue* stack) {
  stack[0] = call.mean.release();
  stack[1] = call.var.release();
  stack[2] = call.count.release();
}

void stats_boxed(StableIValue* stack, std::uint64_t, std::uint64_t) {
  Arguments in(stack);
  OperatorCall call;
  call.input = in.tensor();
  call.mask = in.optional_tensor();
  call.slice_size = in.integer();
  call.prepare();
  call.allocate_moments();
  stats(call.problem, call.pool());
  release_moments(call, stack);
}

void apply_boxed(StableIValue* stack, std::uint64_t, std::uint64_t) {
  Arguments in(stack);
  OperatorCall call;
  call.input = in.tensor();
  call.mean = in.tensor();
  call.var = in.tensor();
  call.take_affine(in);
  call.take_form(in);
  call.prepare();
  call.convert_moments();
  Tensor out = call.allocate_output();
  call.problem.out = out.data();
  apply(call.problem, call.pool());
  stack[0] = out.release();
}

void forward_boxed(StableIValue* stack, std::uint64_t, std::uint64_t) {
  Arguments in(stack);
  OperatorCall call;
  call.input = in.tensor();
  call.take_affine(in);
  call.mask = in.optional_tensor();
  call.take_form(in);
  call.prepare();
  call.allocate_moments();
  Tensor out = call.allocate_output();
  call.problem.out = out.data();
  forward(call.problem, call.pool());
  stack[0] = out.release();
  release_moments(call, stack + 1);
}

void backward_reduce_boxed(StableIValue* stack, std::uint64_t, std::uint64_t) {
  Arguments in(stack);
  OperatorCall call;
  take_gradient(call, in);
  call.take_affine(in);
  call.mask = in.optional_tensor();
  call.take_form(in);
  call.prepare();
  call.convert_moments();
  Tensor sum_dy = call.allocate_slice_rows(), sum_dy_xmu = call.allocate_slice_rows();
  call.problem.sum_dy = static_cast<double*>(sum_dy.data());
  call.problem.sum_dy_xmu = static_cast<double*>(sum_dy_xmu.data());
  backward_reduce(call.problem, call.pool());
  stack[0] = sum_dy.release();
  stack[1] = sum_dy_xmu.release();
}

void backward_elemt_boxed(StableIValue* stack, std::uint64_t, std::uint64_t) {
  Arguments in(stack);
  OperatorCall call;
  take_gradient(call, in);
  call.take_affine(in);
  call.mask = in.optional_tensor();
  const Tensor sum_dy = in.optional_tensor(), sum_dy_xmu = in.optional_tensor();
  call.count = in.optional_tensor();
  call.take_form(in);
  const bool need_residual = in.flag();
  call.prepare();
  call.convert_moments();
  if (call.count) {
    STD_TORCH_CHECK(sum_dy && sum_dy_xmu, "batchnorm::backward_elemt: count is given but sum_dy or sum_dy_xmu is not");
    const std::int64_t values = call.problem.slices() * call.problem.c;
    call.problem.sum_dy = call.as_float64(sum_dy, values, "sum_dy");
    call.problem.sum_dy_xmu = call.as_float64(sum_dy_xmu, values, "sum_dy_xmu");
    call.problem.count = call.as_float64(call.count, call.problem.slices(), "count");
  }
  Tensor grad_input = call.allocate_output(),
         grad_residual = need_residual ? call.allocate_output() : call.empty_tensor();
  call.problem.out = grad_input.data();
  if (need_residual) call.problem.grad_residual = grad_residual.data();
  backward_elemt(call.problem, call.pool());
  stack[0] = grad_input.release();
  stack[1] = grad_residual.release();
}

void backward_boxed(StableIValue* stack, std::uint64_t, std::uint64_t) {
  Arguments in(stack);
  OperatorCall call;
  take_gradient(call, in);
  call.count = in.optional_tensor();
  call.take_affine(in);
  call.mask = in.optional_tensor();
  call.take_form(in);
  const std::vector<bool> wanted = in.flags();
  call.prepare();
  call.convert_moments();
  Problem& p = call.problem;
  const bool need_sums = wanted[1] || wanted[2] || (wanted[0] && call.count);
  std::vector<double> sums(need_sums ? static_cast<std::size_t>(2 * p.slices() * p.c) : 0);
  p.sum_dy = sums.data();
  p.sum_dy_xmu = sums.data() + p.slices() * p.c;
  Tensor grad_input = wanted[0] ? call.allocate_output() : call.empty_tensor();
  Tensor grad_residual = wanted[3] ? call.allocate_output() : call.empty_tensor();
  if (wanted[0]) p.out = grad_input.data();
  if (wanted[3]) p.grad_residual = grad_residual.data();
  // The sums are not needed for grad_residual alone, nor for fixed statistics: no gradient passes through the moments.
  if (call.count && need_sums) p.count = call.as_float64(call.count, p.slices(), "count");
  if (need_sums) backward(p, call.pool());
  else if (p.out || p.grad_residual) backward_elemt(p, call.pool());
  Tensor grad_weight = wanted[1] && call.weight ? call.affine_gradient(true) : call.empty_tensor();
  Tensor grad_bias = wanted[2] && call.bias ? call.affine_gradient(false) : call.empty_tensor();
  stack[0] = grad_input.release();
  stack[1] = grad_weight.release();
  stack[2] = grad_bias.release();
  stack[3] = grad_residual.release();
}

// The smallest magnitude that rounds to infinity. It is half a unit in the last place above the largest finite value.
double overflow(const Tensor& buffer) {
  Dtype type;
  STD_TORCH_CHECK(to_dtype(buffer.dtype(), &type), "buffers must be floating-point tensors");
  switch (type) {
    case Dtype::f16: return 65520;
    case Dtype::bf16: return std::ldexp(2 - std::ldexp(1, -8), 127);
    case Dtype::f32: return std::ldexp(2 - std::ldexp(1, -24), 127);
    default: return HUGE_VAL;
  }
}

// The buffers of the running statistics, and how a batch updates them.
struct Buffers {
  Tensor mean, var, batches;
  double momentum = 0;
  bool has_momentum = false, skip_nonfinite = false;

  void take(Arguments& in) {
    mean = in.optional_tensor();
    var = in.optional_tensor();
    batches = in.optional_tensor();
  }
  void take_update_rule(Arguments& in) {
    has_momentum = in.optional_number(&momentum);
    skip_nonfinite = in.flag();
  }
  void update(OperatorCall& call) const;  // with the moments of the call
};

void Buffers::update(OperatorCall& call) const {
  STD_TORCH_CHECK(has_momentum || batches, "momentum=None averages all batches and needs num_batches_tracked");
  RunningUpdate update;
  update.c = call.mean.sizes()[call.mean.dim() - 1];
  update.slices = call.count.numel();
  update.batch_mean = call.as_float64(call.mean, update.slices * update.c, "mean");
  update.batch_var = call.as_float64(call.var, update.slices * update.c, "var");
  update.count = call.as_float64(call.count, update.slices, "count");
  update.mean = mean ? call.as_float64(mean, update.c, "running_mean") : nullptr;
  update.var = var ? call.as_float64(var, update.c, "running_var") : nullptr;
  update.skip_nonfinite = skip_nonfinite;
  if (mean && skip_nonfinite) update.overflow = overflow(mean);
  double tracked = 0;
  if (batches) tracked = call.increment_batches(batches);
  update.factor = has_momentum ? momentum : 1 / tracked;
  update_running(update);
  if (mean) call.write_back(mean, update.mean);
  if (var) call.write_back(var, update.var);
}

void update_running_boxed(StableIValue* stack, std::uint64_t, std::uint64_t) {
  Arguments in(stack);
  Buffers buffers;
  buffers.take(in);
  OperatorCall call;
  call.mean = in.tensor();
  call.var = in.tensor();
  call.count = in.tensor();
  buffers.take_update_rule(in);
  buffers.update(call);
}

void forward_update_running_boxed(StableIValue* stack, std::uint64_t, std::uint64_t) {
  Arguments in(stack);
  OperatorCall call;
  call.input = in.tensor();
  call.take_affine(in);
  call.mask = in.optional_tensor();
  Buffers buffers;
  buffers.take(in);
  buffers.take_update_rule(in);
  call.take_form(in);
  call.prepare();
  call.allocate_moments();
  Tensor out = call.allocate_output();
  call.problem.out = out.data();
  forward(call.problem, call.pool());
  buffers.update(call);
  stack[0] = out.release();
  release_moments(call, stack + 1);
}

// In place, the backward computes z from the output.
void check_invertible(const Problem& p) {
  STD_TORCH_CHECK(p.activation == Activation::none || (p.activation == Activation::leaky_relu && p.negative_slope > 0),
                  "only leaky_relu with a negative_slope above 0, or no activation, can be undone from its output");
}

void forward_inplace_boxed(StableIValue* stack, std::uint64_t, std::uint64_t) {
  Arguments in(stack);
  OperatorCall call;
  call.input = in.tensor();
  call.weight = in.optional_tensor();
  call.bias = in.optional_tensor();
  Buffers buffers;
  buffers.take(in);
  buffers.take_update_rule(in);
  call.take_form(in);
  check_invertible(call.problem);
  const void* const data = call.input.data();
  call.prepare();
  STD_TORCH_CHECK(call.problem.x == data, "an input of shape ", call.input.shape(),
                  " is written over only where it is contiguous or channels_last");
  call.allocate_moments();
  call.problem.out = call.input.data();
  forward(call.problem, call.pool());
  buffers.update(call);
  release_moments(call, stack);
}

void backward_inplace_boxed(StableIValue* stack, std::uint64_t, std::uint64_t) {
  Arguments in(stack);
  OperatorCall call;
  take_gradient(call, in);
  call.count = in.tensor();
  call.weight = in.optional_tensor();
  call.bias = in.optional_tensor();
  call.take_form(in);
  const std::vector<bool> wanted = in.flags();
  check_invertible(call.problem);
  call.prepare();
  call.convert_moments();
  call.problem.in_place = true;
  Tensor grad_input = wanted[0] ? call.allocate_output() : call.empty_tensor();
  if (wanted[0]) call.problem.out = grad_input.data();
  std::vector<double> sums(static_cast<std::size_t>(2 * call.problem.slices() * call.problem.c));
  call.problem.sum_dy = sums.data();
  call.problem.sum_dy_xmu = sums.data() + sums.size() / 2;
  call.problem.count = call.as_float64(call.count, call.problem.slices(), "count");
  backward(call.problem, call.pool());
  stack[0] = grad_input.release();
  stack[1] = (wanted[1] && call.weight ? call.affine_gradient(true) : call.empty_tensor()).release();
  stack[2] = (wanted[2] && call.bias ? call.affine_gradient(false) : call.empty_tensor()).release();
}

void empty_cache_boxed(StableIValue* stack, std::uint64_t, std::uint64_t) {
  stack[0] = torch::stable::detail::from(static_cast<std::int64_t>(empty_cache()));
}

}  // namespace

// It has no tensor argument from which the dispatcher could take a device.
STABLE_TORCH_LIBRARY_IMPL(batchnorm, CompositeExplicitAutograd, m) { m.impl("empty_cache", &empty_cache_boxed); }

STABLE_TORCH_LIBRARY_IMPL(batchnorm, CPU, m) {
  m.impl("stats", &stats_boxed);
  m.impl("apply", &apply_boxed);
  m.impl("forward", &forward_boxed);
  m.impl("backward_reduce", &backward_reduce_boxed);
  m.impl("backward_elemt", &backward_elemt_boxed);
  m.impl("backward", &backward_boxed);
  m.impl("forward_inplace_", &forward_inplace_boxed);
  m.impl("backward_inplace", &backward_inplace_boxed);
  m.impl("update_running_", &update_running_boxed);
  m.impl("forward_update_running_", &forward_update_running_boxed);
}

}  // namespace bn
