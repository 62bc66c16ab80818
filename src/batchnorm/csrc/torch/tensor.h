// The part of torch's stable ABI that the registration needs: tensors, and the arguments of a boxed call.
// torch::stable::Tensor is not used because it allocates a shared_ptr for each tensor. Its conversion to std::string
// leaks the string at every call (torch 2.10 to 2.13), and every operator has the string `activation`.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <string>
#include <utility>
#include <vector>

#include "../kernels/problem.h"

namespace bn {

inline void check(AOTITorchError code, const char* what) { STD_TORCH_CHECK(code == 0, "batchnorm: ", what, " failed"); }

// A tensor that this call owns, or no tensor.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {}
  Tensor(Tensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }

  explicit operator bool() const { return handle_ != nullptr; }
  AtenTensorHandle get() const { return handle_; }
  StableIValue release() { return torch::stable::detail::from(std::exchange(handle_, nullptr)); }

  std::int64_t dim() const;
  const std::int64_t* sizes() const;
  const std::int64_t* strides() const;
  std::int64_t numel() const;
  std::int32_t dtype() const;
  void* data() const;
  bool same_sizes(const Tensor& other) const;
  bool is_contiguous() const;     // the strides of axes of size 1 do not matter
  bool is_channels_last() const;  // (N, *, C) in memory
  std::string shape() const;      // for messages

 private:
  AtenTensorHandle handle_ = nullptr;
};

Tensor empty(const std::vector<std::int64_t>& sizes, const std::vector<std::int64_t>& strides, std::int32_t dtype);
Tensor empty(const std::vector<std::int64_t>& sizes, std::int32_t dtype);  // contiguous
Tensor empty_like(const Tensor& like);                                     // same sizes, strides and dtype
Tensor large_empty_like(const Tensor& like, std::size_t bytes);            // the same, in a block (blocks.h)
Tensor dense_like(const Tensor& from, bool channels_last);  // same sizes and dtype, contiguous or channels_last
void copy(const Tensor& to, const Tensor& from);

// False where the kernels do not support the dtype.
bool to_dtype(std::int32_t dtype, Dtype* out);

// The arguments of a boxed call, in order. Each tensor and string that is read belongs to the reader.
class Arguments {
 public:
  explicit Arguments(StableIValue* stack) : next_(stack) {}
  Tensor tensor() { return Tensor(torch::stable::detail::to<AtenTensorHandle>(*next_++)); }
  Tensor optional_tensor();
  double number() { return torch::stable::detail::to<double>(*next_++); }
  bool optional_number(double* value);
  std::int64_t integer() { return torch::stable::detail::to<std::int64_t>(*next_++); }
  bool flag() { return torch::stable::detail::to<bool>(*next_++); }
  std::string text();
  std::vector<bool> flags();

 private:
  StableIValue* next_;
};

}  // namespace bn
