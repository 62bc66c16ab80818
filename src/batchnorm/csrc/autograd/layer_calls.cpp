// The eager calls of a layer as C++ autograd functions: TrainingCall and FixedStatistics of ops/autograd.py, without
// Python between the operators and the autograd engine. All operators are called through the dispatcher. So modes, fake
// tensors, other devices and the reference see the same calls as from Python.
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
using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// The inputs that can get a gradient, in the order of the operators' arguments and of the gradients.
enum Input : std::size_t { kInput, kWeight, kBias, kResidual, kInputs };
using Needs = std::array<bool, kInputs>;

struct Form {
  double eps;
  std::string activation;
  double negative_slope;
  std::int64_t slice_size;
};

struct TrainingArguments {
  Optional mask, running_mean, running_var, num_batches_tracked;
  std::optional<double> momentum;
  bool skip_nonfinite;
  Form form;
};

struct RunningArguments {
  Tensor mean, var;
  Form form;
};

// The handles of the operators. Each is looked up once, because a look-up costs as much as a small kernel.
const auto& forward_operator() {
  static const auto handle =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("batchnorm::forward_update_running_", "")
          .typed<FourTensors(const Tensor&, const Optional&, const Optional&, const Optional&, const Optional&,
                             const Optional&, const Optional&, const Optional&, std::optional<double>, bool, double,
                             std::string_view, double, std::int64_t)>();
  return handle;
}

const auto& apply_operator() {
  static const auto handle =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("batchnorm::apply", "")
          .typed<Tensor(const Tensor&, const Tensor&, const Tensor&, const Optional&, const Optional&, const Optional&,
                        double, std::string_view, double, std::int64_t)>();
  return handle;
}

const auto& backward_operator() {
  static const auto handle =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("batchnorm::backward", "")
          .typed<FourTensors(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Optional&,
                             const Optional&, const Optional&, const Optional&, const Optional&, double,
                             std::string_view, double, std::int64_t, Needs)>();
  return handle;
}

Optional to_optional(const Tensor& t) { return t.defined() ? Optional(t) : std::nullopt; }
Tensor to_tensor(const Optional& t) { return t.value_or(Tensor()); }

}  // namespace

// Not in the unnamed namespace, because profilers and anomaly mode show these names.
struct TrainingCall : torch::autograd::Function<TrainingCall> {
  // The backward consists of operators alone, so compiled autograd may trace it, as it traces the one in Python.
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Optional& weight, const Optional& bias,
                        const Optional& residual, const TrainingArguments& arguments);
  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs);
};

// The call with running statistics, through which no gradient passes.
struct RunningCall : torch::autograd::Function<RunningCall> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Optional& weight, const Optional& bias,
                        const Optional& residual, const RunningArguments& running);
  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    return TrainingCall::backward(ctx, grad_outputs);
  }
};

namespace {

// Saves what the backward needs besides the tensors.
void save_form(AutogradContext* ctx, const Form& form, const Optional& weight, const Optional& bias,
               const Optional& residual) {
  ctx->saved_data["form"] = std::make_tuple(form.eps, form.activation, form.negative_slope, form.slice_size);
  // needs_input_grad counts only the inputs that are tensors
  ctx->saved_data["given"] = std::make_tuple(true, weight.has_value(), bias.has_value(), residual.has_value());
  ctx->set_materialize_grads(false);
}

Tensor apply_running(const Tensor& input, const Optional& weight, const Optional& bias, const Optional& residual,
                     const RunningArguments& running) {
  const Form& form = running.form;
  return apply_operator().call(input, running.mean, running.var, weight, bias, residual, form.eps, form.activation,
                               form.negative_slope, 0);
}

}  // namespace

Tensor RunningCall::forward(AutogradContext* ctx, const Tensor& input, const Optional& weight, const Optional& bias,
                            const Optional& residual, const RunningArguments& running) {
  Tensor out = apply_running(input, weight, bias, residual, running);
  // Copies, because the buffers may change before the backward reads them (another forward, DDP's broadcast).
  const auto copy = [](const Tensor& t) { return t.to(at::kDouble, /*non_blocking=*/false, /*copy=*/true); };
  ctx->save_for_backward({input, copy(running.mean), copy(running.var), Tensor(), to_tensor(weight), to_tensor(bias),
                          running.form.activation.empty() ? Tensor() : to_tensor(residual), Tensor()});
  save_form(ctx, running.form, weight, bias, residual);
  return out;
}

Tensor TrainingCall::forward(AutogradContext* ctx, const Tensor& input, const Optional& weight, const Optional& bias,
                             const Optional& residual, const TrainingArguments& arguments) {
  const Form& form = arguments.form;
  auto [out, mean, var, count] = forward_operator().call(
      input, weight, bias, residual, arguments.mask, arguments.running_mean, arguments.running_var,
      arguments.num_batches_tracked, arguments.momentum, arguments.skip_nonfinite, form.eps, form.activation,
      form.negative_slope, form.slice_size);
  ctx->save_for_backward({input, mean, var, count, to_tensor(weight), to_tensor(bias),
                          form.activation.empty() ? Tensor() : to_tensor(residual), to_tensor(arguments.mask)});
  save_form(ctx, form, weight, bias, residual);
  return out;
}

namespace {

Needs load_needs(AutogradContext* ctx) {
  const auto is_given = ctx->saved_data["given"].toTuple();
  Needs needs{};
  for (std::size_t i = 0, edge = 0; i < kInputs; ++i)
    if (is_given->elements()[i].toBool()) needs[i] = ctx->needs_input_grad(edge++);
  return needs;
}

Form load_form(AutogradContext* ctx) {
  const auto saved = ctx->saved_data["form"].toTuple();
  const auto& fields = saved->elements();
  return {fields[0].toDouble(), fields[1].toStringRef(), fields[2].toDouble(), fields[3].toInt()};
}

variable_list gradients(const Tensor& grad_output, const variable_list& saved, const Form& form, const Needs& needs) {
  Needs wanted = needs;
  wanted[kResidual] = needs[kResidual] && !form.activation.empty();
  auto [dx, dweight, dbias, dresidual] =
      backward_operator().call(grad_output, saved[0], saved[1], saved[2], to_optional(saved[3]), to_optional(saved[4]),
                               to_optional(saved[5]), to_optional(saved[6]), to_optional(saved[7]), form.eps,
                               form.activation, form.negative_slope, form.slice_size, wanted);
  variable_list grads(kInputs);
  if (needs[kInput]) grads[kInput] = std::move(dx);
  if (needs[kWeight]) grads[kWeight] = std::move(dweight);
  if (needs[kBias]) grads[kBias] = std::move(dbias);
  if (needs[kResidual]) grads[kResidual] = wanted[kResidual] ? std::move(dresidual) : grad_output;
  return grads;
}

// Gradients that can be differentiated again. Python computes them, because it has the reference.
variable_list differentiable_gradients(const Tensor& grad_output, const variable_list& saved, const Form& form,
                                       const Needs& needs) {
  pybind11::gil_scoped_acquire gil;
  pybind11::tuple tensors(saved.size());
  for (std::size_t i = 0; i < saved.size(); ++i) tensors[i] = pybind11::cast(to_optional(saved[i]));
  const auto fields = pybind11::make_tuple(form.eps, form.activation, form.negative_slope, form.slice_size);
  const auto function = pybind11::module_::import("batchnorm.ops.autograd").attr("gradients");
  const auto results = function(grad_output, tensors, fields, needs).cast<std::array<Optional, kInputs>>();
  variable_list grads(kInputs);
  for (std::size_t i = 0; i < kInputs; ++i) grads[i] = to_tensor(results[i]);
  return grads;
}

}  // namespace

variable_list TrainingCall::backward(AutogradContext* ctx, const variable_list& grad_outputs) {
  const Tensor& grad_output = grad_outputs[0];
  variable_list grads(kInputs);
  if (grad_output.defined()) {
    const auto compute = at::GradMode::is_enabled() ? differentiable_gradients : gradients;
    grads = compute(grad_output, ctx->get_saved_variables(), load_form(ctx), load_needs(ctx));
  }
  grads.emplace_back();  // for `arguments`
  return grads;
}

namespace {

const Tensor& tensor(PyObject* object) {
  TORCH_CHECK_TYPE(THPVariable_Check(object), "expected a Tensor, got ", Py_TYPE(object)->tp_name);
  return THPVariable_Unpack(object);
}

Optional optional_tensor(PyObject* object) { return object == Py_None ? std::nullopt : Optional(tensor(object)); }

// (eps, activation, negative_slope, slice_size)
Form unpack_form(PyObject* const* fields) {
  return {THPUtils_unpackDouble(fields[0]), THPUtils_unpackString(fields[1]), THPUtils_unpackDouble(fields[2]),
          THPUtils_unpackLong(fields[3])};
}

std::optional<double> unpack_momentum(PyObject* object) {
  return object == Py_None ? std::nullopt : std::optional(THPUtils_unpackDouble(object));
}

PyObject* call(PyObject* const* affine, const TrainingArguments& arguments) {
  const Tensor input = tensor(affine[kInput]);
  const Optional weight = optional_tensor(affine[kWeight]), bias = optional_tensor(affine[kBias]),
                 residual = optional_tensor(affine[kResidual]);
  Tensor out;
  {
    pybind11::gil_scoped_release no_gil;
    out = TrainingCall::apply(input, weight, bias, residual, arguments);
  }
  return THPVariable_Wrap(out);
}

// (input, weight, bias, residual, mask, running_mean, running_var, num_batches_tracked, momentum, skip_nonfinite, eps,
// activation, negative_slope, slice_size) -> out
PyObject* training_call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 14, "training_call takes 14 arguments, got ", count);
  return call(arguments, {optional_tensor(arguments[4]), optional_tensor(arguments[5]), optional_tensor(arguments[6]),
                          optional_tensor(arguments[7]), unpack_momentum(arguments[8]),
                          THPUtils_unpackNumberAsBool(arguments[9]), unpack_form(arguments + 10)});
  END_HANDLE_TH_ERRORS
}

// The tensor, if it is a strided one of torch's own type with plain numbers as sizes. Else null.
const Tensor* plain_tensor(PyObject* object) {
  if (!THPVariable_CheckExact(object)) return nullptr;
  const Tensor& t = THPVariable_Unpack(object);
  const bool unusual = t.layout() != at::kStrided || t.is_nested() || t.key_set().has_any(c10::python_ks) ||
                       t.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
  return unusual ? nullptr : &t;
}

bool is_reduced_floating(at::ScalarType type) { return type == at::kHalf || type == at::kBFloat16; }

bool input_fits(const Tensor* input, bool training, double eps, std::int64_t slice_size) {
  if (!input || input->dim() < 2 || !(eps > 0) || slice_size < 0) return false;
  const auto type = input->scalar_type();
  if (type != at::kFloat && type != at::kDouble && !is_reduced_floating(type)) return false;
  if (!training) return true;
  return (input->size(0) > 1 && slice_size != 1) || input->numel() > input->size(0) * input->size(1);
}

bool vector_fits(const Tensor& input, const Tensor* vector) {
  if (!vector || vector->dim() != 1 || vector->size(0) != input.size(1)) return false;
  const auto type = vector->scalar_type(), wanted = input.scalar_type();
  return (type == wanted || (is_reduced_floating(wanted) && type == at::kFloat)) && vector->device() == input.device();
}

bool buffer_fits(const Tensor& input, const Tensor* buffer) {
  return vector_fits(input, buffer) && !buffer->requires_grad() && (buffer->stride(0) != 0 || buffer->size(0) < 2);
}

bool residual_fits(const Tensor& input, const Tensor* residual) {
  return residual && residual->sizes() == input.sizes() && residual->scalar_type() == input.scalar_type() &&
         residual->device() == input.device();
}

// Of (input, weight, bias, residual, running_mean, running_var): whether batchnorm.validation certainly accepts them.
// With `training` also whether there are enough values for a variance.
bool tensors_fit(PyObject* const* tensors, bool training, double eps, std::int64_t slice_size) {
  const Tensor* input = plain_tensor(tensors[0]);
  if (!input_fits(input, training, eps, slice_size)) return false;
  for (PyObject* vector : {tensors[1], tensors[2]})
    if (vector != Py_None && !vector_fits(*input, plain_tensor(vector))) return false;
  if (tensors[3] != Py_None && !residual_fits(*input, plain_tensor(tensors[3]))) return false;
  for (PyObject* buffer : {tensors[4], tensors[5]})
    if (!buffer_fits(*input, plain_tensor(buffer))) return false;
  return true;
}

// Whether the call is eager: no tracing, no functorch transform, no recompute. Only Python can detect a compiler.
bool runs_eagerly() {
  const bool functorch = c10::impl::tls_is_dispatch_key_included(at::DispatchKey::FuncTorchDynamicLayerFrontMode);
  return !functorch && !at::impl::torch_function_mode_enabled() && !torch::jit::tracer::isTracing() &&
         torch::autograd::get_current_graph_task_id() == -1 && !torch::autograd::ForwardADLevel::try_get_by_idx(0);
}

// Whether (eps, activation, negative_slope) have the expected types. Otherwise Python raises, with its own message.
bool form_fits(PyObject* const* form) {
  return PyFloat_Check(form[0]) && PyUnicode_Check(form[1]) && PyFloat_Check(form[2]);
}

// (input, weight, bias, residual, running_mean, running_var, num_batches_tracked, momentum, eps, activation,
// negative_slope, slice_size) -> out, or None. None means that Python must do the call: it handles the rare cases and
// raises all errors.
PyObject* plain_training_call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 12, "plain_training_call takes 12 arguments, got ", count);
  PyObject *const momentum = arguments[7], *const slice_size = arguments[11];
  if (!form_fits(arguments + 8) || !PyLong_Check(slice_size) || !(momentum == Py_None || PyFloat_Check(momentum)))
    Py_RETURN_NONE;
  if (!tensors_fit(arguments, true, PyFloat_AS_DOUBLE(arguments[8]), THPUtils_unpackLong(slice_size)) ||
      !plain_tensor(arguments[6]) || !runs_eagerly())
    Py_RETURN_NONE;
  return call(arguments, {std::nullopt, tensor(arguments[4]), tensor(arguments[5]), tensor(arguments[6]),
                          unpack_momentum(momentum), false, unpack_form(arguments + 8)});
  END_HANDLE_TH_ERRORS
}

bool wants_gradient(const Optional& t) { return t && t->requires_grad(); }

// (input, weight, bias, residual, running_mean, running_var, eps, activation, negative_slope) -> out, or None (see
// plain_training_call).
PyObject* plain_running_call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 9, "plain_running_call takes 9 arguments, got ", count);
  if (!form_fits(arguments + 6) || !tensors_fit(arguments, false, PyFloat_AS_DOUBLE(arguments[6]), 0) ||
      !runs_eagerly())
    Py_RETURN_NONE;
  const Tensor input = tensor(arguments[kInput]);
  const Optional weight = optional_tensor(arguments[kWeight]), bias = optional_tensor(arguments[kBias]),
                 residual = optional_tensor(arguments[kResidual]);
  const RunningArguments running{tensor(arguments[4]),
                                 tensor(arguments[5]),
                                 {THPUtils_unpackDouble(arguments[6]), THPUtils_unpackString(arguments[7]),
                                  THPUtils_unpackDouble(arguments[8]), 0}};
  Tensor out;
  {
    pybind11::gil_scoped_release no_gil;
    const bool differentiable = at::GradMode::is_enabled() && (input.requires_grad() || wants_gradient(weight) ||
                                                               wants_gradient(bias) || wants_gradient(residual));
    out = differentiable ? RunningCall::apply(input, weight, bias, residual, running)
                         : apply_running(input, weight, bias, residual, running);
  }
  return THPVariable_Wrap(out);
  END_HANDLE_TH_ERRORS
}

using FastCall = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

// The method table holds pointers of one type, whatever the calling convention of the function.
PyCFunction erased(FastCall function) { return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)); }

PyMethodDef methods[] = {{"training_call", erased(training_call), METH_FASTCALL, nullptr},
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
  // This module has no shared state of its own. Without this call an import would switch the GIL on again.
  if (module) PyUnstable_Module_SetGIL(module, Py_MOD_GIL_NOT_USED);
#endif
  return module;
}
