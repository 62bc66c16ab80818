// The operators of src/batchnorm/ops/schemas.py for the CPU: arguments in, a Problem filled, a kernel called.
#include "arguments.h"
#include "blocks.h"

namespace bn {
namespace {

// Where every backward begins.
void take_gradient(Call& call, Arguments& in) {
  call.grad_output = in.tensor();
  call.input = in.tensor();
  call.mean = in.tensor();
  call.var = in.tensor();
}

void release_moments(Call& call, StableIValue* stack) {
  stack[0] = call.mean.release();
  stack[1] = call.var.release();
  stack[2] = call.count.release();
}

void stats_boxed(StableIValue* stack, std::uint64_t, std::uint64_t) {
  Arguments in(stack);
  Call call;
  call.input = in.tensor();
  call.mask = in.optional_tensor();
  call.slice_size = in.integer();
  call.prepare();
  call.new_moments();
  stats(call.problem, call.pool());
  release_moments(call, stack);
}

void apply_boxed(StableIValue* stack, std::uint64_t, std::uint64_t) {
  Arguments in(stack);
  Call call;
  call.input = in.tensor();
  call.mean = in.tensor();
  call.var = in.tensor();
  call.take_affine(in);
  call.take_form(in);
  call.prepare();
  call.read_moments();
  Tensor out = call.new_output();
  call.problem.out = out.data();
  apply(call.problem, call.pool());
  stack[0] = out.release();
}

void forward_boxed(StableIValue* stack, std::uint64_t, std::uint64_t) {
  Arguments in(stack);
  Call call;
  call.input = in.tensor();
  call.take_affine(in);
  call.mask = in.optional_tensor();
  call.take_form(in);
  call.prepare();
  call.new_moments();
  Tensor out = call.new_output();
  call.problem.out = out.data();
  forward(call.problem, call.pool());
  stack[0] = out.release();
  release_moments(call, stack + 1);
}

void backward_reduce_boxed(StableIValue* stack, std::uint64_t, std::uint64_t) {
  Arguments in(stack);
  Call call;
  take_gradient(call, in);
  call.take_affine(in);
  call.mask = in.optional_tensor();
  call.take_form(in);
  call.prepare();
  call.read_moments();
  Tensor sum_dy = call.new_rows(), sum_dy_xmu = call.new_rows();
  call.problem.sum_dy = static_cast<double*>(sum_dy.data());
  call.problem.sum_dy_xmu = static_cast<double*>(sum_dy_xmu.data());
  backward_reduce(call.problem, call.pool());
  stack[0] = sum_dy.release();
  stack[1] = sum_dy_xmu.release();
}

void backward_elemt_boxed(StableIValue* stack, std::uint64_t, std::uint64_t) {
  Arguments in(stack);
  Call call;
  take_gradient(call, in);
  call.take_affine(in);
  call.mask = in.optional_tensor();
  const Tensor sum_dy = in.optional_tensor(), sum_dy_xmu = in.optional_tensor();
  call.count = in.optional_tensor();
  call.take_form(in);
  const bool need_residual = in.flag();
  call.prepare();
  call.read_moments();
  if (call.count) {
    STD_TORCH_CHECK(sum_dy && sum_dy_xmu, "batchnorm::backward_elemt: count is given but sum_dy or sum_dy_xmu is not");
    const std::int64_t values = call.problem.rows() * call.problem.c;
    call.problem.sum_dy = call.doubles(sum_dy, values, "sum_dy");
    call.problem.sum_dy_xmu = call.doubles(sum_dy_xmu, values, "sum_dy_xmu");
    call.problem.count = call.doubles(call.count, call.problem.rows(), "count");
  }
  Tensor grad_input = call.new_output(), grad_residual = need_residual ? call.new_output() : call.nothing();
  call.problem.out = grad_input.data();
  if (need_residual) call.problem.grad_residual = grad_residual.data();
  backward_elemt(call.problem, call.pool());
  stack[0] = grad_input.release();
  stack[1] = grad_residual.release();
}

void backward_boxed(StableIValue* stack, std::uint64_t, std::uint64_t) {
  Arguments in(stack);
  Call call;
  take_gradient(call, in);
  call.count = in.optional_tensor();
  call.take_affine(in);
  call.mask = in.optional_tensor();
  call.take_form(in);
  const std::vector<bool> wanted = in.flags();
  call.prepare();
  call.read_moments();
  Problem& p = call.problem;
  const bool sums = wanted[1] || wanted[2] || (wanted[0] && call.count);
  std::vector<double> room(sums ? static_cast<std::size_t>(2 * p.rows() * p.c) : 0);
  p.sum_dy = room.data();
  p.sum_dy_xmu = room.data() + p.rows() * p.c;
  Tensor grad_input = wanted[0] ? call.new_output() : call.nothing();
  Tensor grad_residual = wanted[3] ? call.new_output() : call.nothing();
  if (wanted[0]) p.out = grad_input.data();
  if (wanted[3]) p.grad_residual = grad_residual.data();
  // without the sums nothing passes through the moments: only grad_residual can be wanted, or frozen statistics
  if (call.count && sums) p.count = call.doubles(call.count, p.rows(), "count");
  if (sums) backward(p, call.pool());
  else if (p.out || p.grad_residual) backward_elemt(p, call.pool());
  Tensor grad_weight = wanted[1] && call.weight ? call.grad_vector(true) : call.nothing();
  Tensor grad_bias = wanted[2] && call.bias ? call.grad_vector(false) : call.nothing();
  stack[0] = grad_input.release();
  stack[1] = grad_weight.release();
  stack[2] = grad_bias.release();
  stack[3] = grad_residual.release();
}

// The smallest magnitude that rounds to infinity: half a unit in the last place above the largest finite value.
double overflow(const Tensor& buffer) {
  Dtype type;
  STD_TORCH_CHECK(floating(buffer.dtype(), &type), "buffers must be floating-point tensors");
  switch (type) {
    case Dtype::f16: return 65520;
    case Dtype::bf16: return std::ldexp(2 - std::ldexp(1, -8), 127);
    case Dtype::f32: return std::ldexp(2 - std::ldexp(1, -24), 127);
    default: return HUGE_VAL;
  }
}

// The buffers, and how a batch moves them.
struct Buffers {
  Tensor mean, var, batches;
  double momentum = 0;
  bool given = false, skip_nonfinite = false;

  void take(Arguments& in) {
    mean = in.optional_tensor();
    var = in.optional_tensor();
    batches = in.optional_tensor();
  }
  void take_rule(Arguments& in) {
    given = in.optional_number(&momentum);
    skip_nonfinite = in.flag();
  }
  void move(Call& call) const;  // by the moments that the call holds
};

void Buffers::move(Call& call) const {
  STD_TORCH_CHECK(given || batches, "momentum=None averages all batches and needs num_batches_tracked");
  Running r;
  r.c = call.mean.sizes()[call.mean.dim() - 1];
  r.rows = call.count.numel();
  r.batch_mean = call.doubles(call.mean, r.rows * r.c, "mean");
  r.batch_var = call.doubles(call.var, r.rows * r.c, "var");
  r.count = call.doubles(call.count, r.rows, "count");
  r.mean = mean ? call.doubles(mean, r.c, "running_mean") : nullptr;
  r.var = var ? call.doubles(var, r.c, "running_var") : nullptr;
  r.skip_nonfinite = skip_nonfinite;
  if (mean && skip_nonfinite) r.overflow = overflow(mean);
  double tracked = 0;
  if (batches) tracked = call.count_batch(batches);
  r.factor = given ? momentum : 1 / tracked;
  update_running(r);
  if (mean) call.write_back(mean, r.mean);
  if (var) call.write_back(var, r.var);
}

void update_running_boxed(StableIValue* stack, std::uint64_t, std::uint64_t) {
  Arguments in(stack);
  Buffers buffers;
  buffers.take(in);
  Call call;
  call.mean = in.tensor();
  call.var = in.tensor();
  call.count = in.tensor();
  buffers.take_rule(in);
  buffers.move(call);
}

void forward_update_running_boxed(StableIValue* stack, std::uint64_t, std::uint64_t) {
  Arguments in(stack);
  Call call;
  call.input = in.tensor();
  call.take_affine(in);
  call.mask = in.optional_tensor();
  Buffers buffers;
  buffers.take(in);
  buffers.take_rule(in);
  call.take_form(in);
  call.prepare();
  call.new_moments();
  Tensor out = call.new_output();
  call.problem.out = out.data();
  forward(call.problem, call.pool());
  buffers.move(call);
  stack[0] = out.release();
  release_moments(call, stack + 1);
}

// An output that tells its z.
void check_undone(const Problem& p) {
  STD_TORCH_CHECK(p.act == Act::none || (p.act == Act::leaky_relu && p.negative_slope > 0),
                  "only leaky_relu with a negative_slope above 0, or no activation, can be undone from its output");
}

void forward_inplace_boxed(StableIValue* stack, std::uint64_t, std::uint64_t) {
  Arguments in(stack);
  Call call;
  call.input = in.tensor();
  call.weight = in.optional_tensor();
  call.bias = in.optional_tensor();
  Buffers buffers;
  buffers.take(in);
  buffers.take_rule(in);
  call.take_form(in);
  check_undone(call.problem);
  const void* const place = call.input.data();
  call.prepare();
  STD_TORCH_CHECK(call.problem.x == place, "an input of shape ", call.input.shape(),
                  " is written over only where it is contiguous or channels_last");
  call.new_moments();
  call.problem.out = call.input.data();
  forward(call.problem, call.pool());
  buffers.move(call);
  release_moments(call, stack);
}

void backward_inplace_boxed(StableIValue* stack, std::uint64_t, std::uint64_t) {
  Arguments in(stack);
  Call call;
  take_gradient(call, in);
  call.count = in.tensor();
  call.weight = in.optional_tensor();
  call.bias = in.optional_tensor();
  call.take_form(in);
  const std::vector<bool> wanted = in.flags();
  check_undone(call.problem);
  call.prepare();
  call.read_moments();
  call.problem.in_place = true;
  Tensor grad_input = wanted[0] ? call.new_output() : call.nothing();
  if (wanted[0]) call.problem.out = grad_input.data();
  std::vector<double> room(static_cast<std::size_t>(2 * call.problem.rows() * call.problem.c));
  call.problem.sum_dy = room.data();
  call.problem.sum_dy_xmu = room.data() + room.size() / 2;
  call.problem.count = call.doubles(call.count, call.problem.rows(), "count");
  backward(call.problem, call.pool());
  stack[0] = grad_input.release();
  stack[1] = (wanted[1] && call.weight ? call.grad_vector(true) : call.nothing()).release();
  stack[2] = (wanted[2] && call.bias ? call.grad_vector(false) : call.nothing()).release();
}

void empty_cache_boxed(StableIValue* stack, std::uint64_t, std::uint64_t) {
  stack[0] = torch::stable::detail::from(static_cast<std::int64_t>(empty_cache()));
}

}  // namespace

// No tensor tells this one its device.
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
