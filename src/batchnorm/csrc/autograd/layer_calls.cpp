// A layer's eager calls as C++ autograd functions: TrainingCall and FixedStatistics of ops/autograd.py, without Python
// between the operators and the engine. All operators are called through the dispatcher, so modes, fake tensors, other
// devices and the reference see what they see from Python.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/utils/object_ptr.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/csrc/utils/python_numbers.h>
#include <torch/csrc/utils/python_strings.h>

#include <array>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>

namespace batchnorm {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Optional = std::optional<Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// What can take a gradient, in the order of the operators' arguments and of the gradients.
enum Input : std::size_t { kInput, kWeight, kBias, kResidual, kInputs };
using Needs = std::array<bool, kInputs>;

struct Form {
  double eps;
  std::string activation;
  double negative_slope;
  std::int64_t slice_size;
};

struct Rest {
  Optional mask, running_mean, running_var, num_batches_tracked;
  std::optional<double> momentum;
  bool skip_nonfinite;
  Form form;
};

struct Running {
  Tensor mean, var;
  Form form;
};

// The dispatcher resolves a name once; per call that look-up would cost as much as a small kernel.
const auto& forward_operator() {
  static const auto found = c10::Dispatcher::singleton()
      .findSchemaOrThrow("batchnorm::forward_update_running_", "")
      .typed<Four(
          const Tensor&, const Optional&, const Optional&, const Optional&, const Optional&, const Optional&,
          const Optional&, const Optional&, std::optional<double>, bool, double, std::string_view, double,
          std::int64_t)>();
  return found;
}

const auto& apply_operator() {
  static const auto found = c10::Dispatcher::singleton()
      .findSchemaOrThrow("batchnorm::apply", "")
      .typed<Tensor(
          const Tensor&, const Tensor&, const Tensor&, const Optional&, const Optional&, const Optional&, double,
          std::string_view, double, std::int64_t)>();
  return found;
}

const auto& backward_operator() {
  static const auto found = c10::Dispatcher::singleton()
      .findSchemaOrThrow("batchnorm::backward", "")
      .typed<Four(
          const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Optional&, const Optional&, const Optional&,
          const Optional&, const Optional&, double, std::string_view, double, std::int64_t, Needs)>();
  return found;
}

Optional given(const Tensor& t) { return t.defined() ? Optional(t) : std::nullopt; }
Tensor defined(const Optional& t) { return t.value_or(Tensor()); }

}  // namespace

// Not in the unnamed namespace: their names are what profilers and anomaly mode show.
struct TrainingCall : torch::autograd::Function<TrainingCall> {
  // The backward is nothing but operators, so compiled autograd may look through it as it does through Python's.
  static constexpr bool is_traceable = true;

  static Tensor forward(
      AutogradContext* ctx, const Tensor& input, const Optional& weight, const Optional& bias, const Optional& residual,
      const Rest& rest);
  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs);
};

// The running statistics' call: the gradient does not pass through them.
struct RunningCall : torch::autograd::Function<RunningCall> {
  static constexpr bool is_traceable = true;

  static Tensor forward(
      AutogradContext* ctx, const Tensor& input, const Optional& weight, const Optional& bias, const Optional& residual,
      const Running& running);
  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    return TrainingCall::backward(ctx, grad_outputs);
  }
};

namespace {

// What the backward needs beside the tensors.
void note(
    AutogradContext* ctx, const Form& form, const Optional& weight, const Optional& bias, const Optional& residual) {
  ctx->saved_data["form"] = std::make_tuple(form.eps, form.activation, form.negative_slope, form.slice_size);
  // the engine numbers only the inputs that are tensors
  ctx->saved_data["given"] = std::make_tuple(true, weight.has_value(), bias.has_value(), residual.has_value());
  ctx->set_materialize_grads(false);
}

Tensor apply_running(
    const Tensor& input, const Optional& weight, const Optional& bias, const Optional& residual,
    const Running& running) {
  const Form& form = running.form;
  return apply_operator().call(
      input, running.mean, running.var, weight, bias, residual, form.eps, form.activation, form.negative_slope, 0);
}

}  // namespace

Tensor RunningCall::forward(
    AutogradContext* ctx, const Tensor& input, const Optional& weight, const Optional& bias, const Optional& residual,
    const Running& running) {
  Tensor out = apply_running(input, weight, bias, residual, running);
  // copies: the buffers may move before the backward reads them (another forward, DDP's broadcast)
  const auto copy = [](const Tensor& t) { return t.to(at::kDouble, /*non_blocking=*/false, /*copy=*/true); };
  ctx->save_for_backward(
      {input, copy(running.mean), copy(running.var), Tensor(), defined(weight), defined(bias),
       running.form.activation.empty() ? Tensor() : defined(residual), Tensor()});
  note(ctx, running.form, weight, bias, residual);
  return out;
}

Tensor TrainingCall::forward(
    AutogradContext* ctx, const Tensor& input, const Optional& weight, const Optional& bias, const Optional& residual,
    const Rest& rest) {
  const Form& form = rest.form;
  auto [out, mean, var, count] = forward_operator().call(
      input, weight, bias, residual, rest.mask, rest.running_mean, rest.running_var, rest.num_batches_tracked,
      rest.momentum, rest.skip_nonfinite, form.eps, form.activation, form.negative_slope, form.slice_size);
  ctx->save_for_backward(
      {input, mean, var, count, defined(weight), defined(bias),
       form.activation.empty() ? Tensor() : defined(residual), defined(rest.mask)});
  note(ctx, form, weight, bias, residual);
  return out;
}

namespace {

Needs needed(AutogradContext* ctx) {
  const auto is_given = ctx->saved_data["given"].toTuple();
  Needs needs{};
  for (std::size_t i = 0, edge = 0; i < kInputs; ++i)
    if (is_given->elements()[i].toBool()) needs[i] = ctx->needs_input_grad(edge++);
  return needs;
}

Form form_of(AutogradContext* ctx) {
  const auto saved = ctx->saved_data["form"].toTuple();
  const auto& fields = saved->elements();
  return {fields[0].toDouble(), fields[1].toStringRef(), fields[2].toDouble(), fields[3].toInt()};
}

variable_list first_order(const Tensor& grad_output, const variable_list& saved, const Form& form, const Needs& needs) {
  Needs wanted = needs;
  wanted[kResidual] = needs[kResidual] && !form.activation.empty();
  auto [dx, dweight, dbias, dresidual] = backward_operator().call(
      grad_output, saved[0], saved[1], saved[2], given(saved[3]), given(saved[4]), given(saved[5]), given(saved[6]),
      given(saved[7]), form.eps, form.activation, form.negative_slope, form.slice_size, wanted);
  variable_list grads(kInputs);
  if (needs[kInput]) grads[kInput] = std::move(dx);
  if (needs[kWeight]) grads[kWeight] = std::move(dweight);
  if (needs[kBias]) grads[kBias] = std::move(dbias);
  if (needs[kResidual]) grads[kResidual] = wanted[kResidual] ? std::move(dresidual) : grad_output;
  return grads;
}

// Gradients that can be differentiated again: Python's, which has the reference.
variable_list by_python(const Tensor& grad_output, const variable_list& saved, const Form& form, const Needs& needs) {
  pybind11::gil_scoped_acquire gil;
  pybind11::tuple tensors(saved.size());
  for (std::size_t i = 0; i < saved.size(); ++i) tensors[i] = pybind11::cast(given(saved[i]));
  const auto fields = pybind11::make_tuple(form.eps, form.activation, form.negative_slope, form.slice_size);
  const auto gradients = pybind11::module_::import("batchnorm.ops.autograd").attr("gradients");
  const auto found = gradients(grad_output, tensors, fields, needs).cast<std::array<Optional, kInputs>>();
  variable_list grads(kInputs);
  for (std::size_t i = 0; i < kInputs; ++i) grads[i] = defined(found[i]);
  return grads;
}

}  // namespace

variable_list TrainingCall::backward(AutogradContext* ctx, const variable_list& grad_outputs) {
  const Tensor& grad_output = grad_outputs[0];
  variable_list grads(kInputs);
  if (grad_output.defined()) {
    const auto compute = at::GradMode::is_enabled() ? by_python : first_order;
    grads = compute(grad_output, ctx->get_saved_variables(), form_of(ctx), needed(ctx));
  }
  grads.emplace_back();  // for `rest`
  return grads;
}

namespace {

const Tensor& tensor(PyObject* object) {
  TORCH_CHECK_TYPE(THPVariable_Check(object), "expected a Tensor, got ", Py_TYPE(object)->tp_name);
  return THPVariable_Unpack(object);
}

Optional optional_tensor(PyObject* object) { return object == Py_None ? std::nullopt : Optional(tensor(object)); }

// (eps, activation, negative_slope, slice_size)
Form form_from(PyObject* const* fields) {
  return {
      THPUtils_unpackDouble(fields[0]), THPUtils_unpackString(fields[1]), THPUtils_unpackDouble(fields[2]),
      THPUtils_unpackLong(fields[3])};
}

std::optional<double> momentum_from(PyObject* object) {
  return object == Py_None ? std::nullopt : std::optional(THPUtils_unpackDouble(object));
}

PyObject* call(PyObject* const* affine, const Rest& rest) {
  const Tensor input = tensor(affine[kInput]);
  const Optional weight = optional_tensor(affine[kWeight]), bias = optional_tensor(affine[kBias]),
                 residual = optional_tensor(affine[kResidual]);
  Tensor out;
  {
    pybind11::gil_scoped_release no_gil;
    out = TrainingCall::apply(input, weight, bias, residual, rest);
  }
  return THPVariable_Wrap(out);
}

// (input, weight, bias, residual, mask, running_mean, running_var, num_batches_tracked, momentum, skip_nonfinite, eps,
// activation, negative_slope, slice_size) -> out
PyObject* training_call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 14, "training_call takes 14 arguments, got ", count);
  return call(
      arguments,
      {optional_tensor(arguments[4]), optional_tensor(arguments[5]), optional_tensor(arguments[6]),
       optional_tensor(arguments[7]), momentum_from(arguments[8]), THPUtils_unpackNumberAsBool(arguments[9]),
       form_from(arguments + 10)});
  END_HANDLE_TH_ERRORS
}

// Null for all but a strided tensor of torch's own type whose sizes are numbers.
const Tensor* plain(PyObject* object) {
  if (!THPVariable_CheckExact(object)) return nullptr;
  const Tensor& t = THPVariable_Unpack(object);
  const bool odd = t.layout() != at::kStrided || t.key_set().has_any(c10::python_ks) ||
      t.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
  return odd ? nullptr : &t;
}

bool half(at::ScalarType type) { return type == at::kHalf || type == at::kBFloat16; }

bool input_fits(const Tensor* input, bool training, double eps, std::int64_t slice_size) {
  if (!input || input->dim() < 2 || !(eps > 0) || slice_size < 0) return false;
  const auto type = input->scalar_type();
  if (type != at::kFloat && type != at::kDouble && !half(type)) return false;
  if (!training) return true;
  return (input->size(0) > 1 && slice_size != 1) || input->numel() > input->size(0) * input->size(1);
}

bool vector_fits(const Tensor& input, const Tensor* vector) {
  if (!vector || vector->dim() != 1 || vector->size(0) != input.size(1)) return false;
  const auto type = vector->scalar_type(), wanted = input.scalar_type();
  return (type == wanted || (half(wanted) && type == at::kFloat)) && vector->device() == input.device();
}

bool buffer_fits(const Tensor& input, const Tensor* buffer) {
  return vector_fits(input, buffer) && !buffer->requires_grad() && (buffer->stride(0) != 0 || buffer->size(0) < 2);
}

bool residual_fits(const Tensor& input, const Tensor* residual) {
  return residual && residual->sizes() == input.sizes() && residual->scalar_type() == input.scalar_type() &&
      residual->device() == input.device();
}

// (input, weight, bias, residual, running_mean, running_var): whether batchnorm.validation surely has nothing to refuse; with
// `training` also whether there are values enough for a variance.
bool tensors_fit(PyObject* const* tensors, bool training, double eps, std::int64_t slice_size) {
  const Tensor* input = plain(tensors[0]);
  if (!input_fits(input, training, eps, slice_size)) return false;
  for (PyObject* vector : {tensors[1], tensors[2]})
    if (vector != Py_None && !vector_fits(*input, plain(vector))) return false;
  if (tensors[3] != Py_None && !residual_fits(*input, plain(tensors[3]))) return false;
  for (PyObject* buffer : {tensors[4], tensors[5]})
    if (!buffer_fits(*input, plain(buffer))) return false;
  return true;
}

// Whether the call runs now and once: nothing traces, transforms or recomputes it. Compilers are seen in Python alone.
bool runs_eagerly() {
  const bool functorch = c10::impl::tls_is_dispatch_key_included(at::DispatchKey::FuncTorchDynamicLayerFrontMode);
  return !functorch && !at::impl::torch_function_mode_enabled() &&
      !torch::jit::tracer::isTracing() && torch::autograd::get_current_graph_task_id() == -1 &&
      !torch::autograd::ForwardADLevel::try_get_by_idx(0);
}

// (eps, activation, negative_slope): numbers and a word, so that nothing here raises in other words than Python.
bool form_fits(PyObject* const* form) {
  return PyFloat_Check(form[0]) && PyUnicode_Check(form[1]) && PyFloat_Check(form[2]);
}

// (input, weight, bias, residual, running_mean, running_var, num_batches_tracked, momentum, eps, activation,
// negative_slope, slice_size) -> out, or None, which decides nothing: what is rare, and every refusal with its words, is
// Python's.
PyObject* plain_training_call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 12, "plain_training_call takes 12 arguments, got ", count);
  PyObject *const momentum = arguments[7], *const slice_size = arguments[11];
  if (!form_fits(arguments + 8) || !PyLong_Check(slice_size) || !(momentum == Py_None || PyFloat_Check(momentum)))
    Py_RETURN_NONE;
  if (!tensors_fit(arguments, true, PyFloat_AS_DOUBLE(arguments[8]), THPUtils_unpackLong(slice_size)) ||
      !plain(arguments[6]) || !runs_eagerly())
    Py_RETURN_NONE;
  return call(
      arguments,
      {std::nullopt, tensor(arguments[4]), tensor(arguments[5]), tensor(arguments[6]), momentum_from(momentum), false,
       form_from(arguments + 8)});
  END_HANDLE_TH_ERRORS
}

bool wants_gradient(const Optional& t) { return t && t->requires_grad(); }

// (input, weight, bias, residual, running_mean, running_var, eps, activation, negative_slope) -> out, or None as above.
PyObject* plain_running_call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 9, "plain_running_call takes 9 arguments, got ", count);
  if (!form_fits(arguments + 6) || !tensors_fit(arguments, false, PyFloat_AS_DOUBLE(arguments[6]), 0) ||
      !runs_eagerly())
    Py_RETURN_NONE;
  const Tensor input = tensor(arguments[kInput]);
  const Optional weight = optional_tensor(arguments[kWeight]), bias = optional_tensor(arguments[kBias]),
                 residual = optional_tensor(arguments[kResidual]);
  const Running running{
      tensor(arguments[4]), tensor(arguments[5]),
      {THPUtils_unpackDouble(arguments[6]), THPUtils_unpackString(arguments[7]), THPUtils_unpackDouble(arguments[8]), 0}};
  Tensor out;
  {
    pybind11::gil_scoped_release no_gil;
    const bool differentiable = at::GradMode::is_enabled() &&
        (input.requires_grad() || wants_gradient(weight) || wants_gradient(bias) || wants_gradient(residual));
    out = differentiable ? RunningCall::apply(input, weight, bias, residual, running)
                         : apply_running(input, weight, bias, residual, running);
  }
  return THPVariable_Wrap(out);
  END_HANDLE_TH_ERRORS
}

using FastCall = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

// C's table holds functions of one type, whatever their calling convention
PyCFunction erased(FastCall function) { return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)); }

PyMethodDef methods[] = {
    {"training_call", erased(training_call), METH_FASTCALL, nullptr},
    {"plain_running_call", erased(plain_running_call), METH_FASTCALL, nullptr},
    {"plain_training_call", erased(plain_training_call), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "batchnorm._autograd", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace batchnorm

#define BN_JOINED(a, b) a##b
#define BN_INIT(name) BN_JOINED(PyInit_, name)

PyMODINIT_FUNC BN_INIT(TORCH_EXTENSION_NAME)() {
  PyObject* module = PyModule_Create(&batchnorm::definition);
#ifdef Py_GIL_DISABLED
  // nothing here is shared but what the dispatcher guards; without this an import would bring the lock back
  if (module) PyUnstable_Module_SetGIL(module, Py_MOD_GIL_NOT_USED);
#endif
  return module;
}
