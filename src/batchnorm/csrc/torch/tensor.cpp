#include "tensor.h"

#include <memory>

#include "../kernels/blocks.h"

// torch has this function since 2.11. The extension also loads with 2.10, so the symbol is weak: it is null there.
#if defined(__GNUC__) && !defined(__APPLE__)
extern "C" __attribute__((weak)) AOTITorchError
torch_from_blob(void* data, std::int64_t ndim, const std::int64_t* sizes, const std::int64_t* strides,
                std::int64_t storage_offset, std::int32_t dtype, std::int32_t device_type, std::int32_t device_index,
                AtenTensorHandle* result, std::int32_t layout, const std::uint8_t* opaque_metadata,
                std::int64_t opaque_metadata_size, void (*deleter)(void* data, void* context), void* context);
#define BN_FROM_BLOB 1
#endif

namespace bn {

std::int64_t Tensor::dim() const {
  std::int64_t value;
  check(aoti_torch_get_dim(handle_, &value), "dim");
  return value;
}
const std::int64_t* Tensor::sizes() const {
  std::int64_t* value;
  check(aoti_torch_get_sizes(handle_, &value), "sizes");
  return value;
}
const std::int64_t* Tensor::strides() const {
  std::int64_t* value;
  check(aoti_torch_get_strides(handle_, &value), "strides");
  return value;
}
std::int64_t Tensor::numel() const {
  std::int64_t value;
  check(aoti_torch_get_numel(handle_, &value), "numel");
  return value;
}
std::int32_t Tensor::dtype() const {
  std::int32_t value;
  check(aoti_torch_get_dtype(handle_, &value), "dtype");
  return value;
}
void* Tensor::data() const {
  void* value;
  check(aoti_torch_get_data_ptr(handle_, &value), "data_ptr");
  return value;
}

bool Tensor::same_sizes(const Tensor& other) const {
  const std::int64_t n = dim(), *a = sizes(), *b = other.sizes();
  if (n != other.dim()) return false;
  for (std::int64_t i = 0; i < n; ++i)
    if (a[i] != b[i]) return false;
  return true;
}

bool Tensor::is_contiguous() const {
  const std::int64_t *size = sizes(), *stride = strides();
  std::int64_t expected = 1;
  for (std::int64_t i = dim(); i-- > 0;) {
    if (size[i] == 0) return true;
    if (size[i] != 1 && stride[i] != expected) return false;
    expected *= size[i];
  }
  return true;
}

bool Tensor::is_channels_last() const {
  const std::int64_t *size = sizes(), *stride = strides(), last = dim() - 1;
  if (last < 1 || (size[1] != 1 && stride[1] != 1)) return false;
  std::int64_t expected = size[1];
  for (std::int64_t i = last; i >= 0; --i) {
    if (i == 1) continue;
    if (size[i] != 1 && stride[i] != expected) return false;
    expected *= size[i];
  }
  return true;
}

std::string Tensor::shape() const {
  std::string text = "(";
  for (std::int64_t i = 0; i < dim(); ++i) text += (i ? ", " : "") + std::to_string(sizes()[i]);
  return text + ")";
}

Tensor empty(const std::vector<std::int64_t>& sizes, const std::vector<std::int64_t>& strides, std::int32_t dtype) {
  AtenTensorHandle handle;
  check(aoti_torch_empty_strided(static_cast<std::int64_t>(sizes.size()), sizes.data(), strides.data(), dtype,
                                 aoti_torch_device_type_cpu(), 0, &handle),
        "empty");
  return Tensor(handle);
}

Tensor empty(const std::vector<std::int64_t>& sizes, std::int32_t dtype) {
  std::vector<std::int64_t> strides(sizes.size());
  std::int64_t step = 1;
  for (std::size_t i = sizes.size(); i-- > 0;) {
    strides[i] = step;
    step *= sizes[i] > 1 ? sizes[i] : 1;
  }
  return empty(sizes, strides, dtype);
}

Tensor empty_like(const Tensor& like) {
  AtenTensorHandle handle;
  check(aoti_torch_empty_strided(like.dim(), like.sizes(), like.strides(), like.dtype(), aoti_torch_device_type_cpu(),
                                 0, &handle),
        "empty_like");
  return Tensor(handle);
}

Tensor large_empty_like(const Tensor& like, std::size_t bytes) {
#if defined(BN_FROM_BLOB)
  Block* const block = torch_from_blob ? take_block(bytes) : nullptr;
  if (block) {
    AtenTensorHandle handle;
    const auto code = torch_from_blob(
        block->data, like.dim(), like.sizes(), like.strides(), 0, like.dtype(), aoti_torch_device_type_cpu(), -1,
        &handle, aoti_torch_layout_strided(), nullptr, 0,
        [](void*, void* context) { give_block(static_cast<Block*>(context)); }, block);
    if (code == 0) return Tensor(handle);
    give_block(block);
  }
#else
  (void)bytes;
#endif
  return empty_like(like);
}

Tensor dense_like(const Tensor& from, bool channels_last) {
  const std::vector<std::int64_t> sizes(from.sizes(), from.sizes() + from.dim());
  if (!channels_last) return empty(sizes, from.dtype());
  std::vector<std::int64_t> strides(sizes.size());
  strides[1] = 1;
  std::int64_t step = sizes[1] > 1 ? sizes[1] : 1;
  for (std::size_t i = sizes.size(); i-- > 0;) {
    if (i == 1) continue;
    strides[i] = step;
    step *= sizes[i] > 1 ? sizes[i] : 1;
  }
  return empty(sizes, strides, from.dtype());
}

void copy(const Tensor& to, const Tensor& from) {
  AtenTensorHandle self, source;
  check(aoti_torch_new_tensor_handle(to.get(), &self), "handle");
  check(aoti_torch_new_tensor_handle(from.get(), &source), "handle");
  StableIValue stack[] = {torch::stable::detail::from(self), torch::stable::detail::from(source),
                          torch::stable::detail::from(false)};
  check(torch_call_dispatcher("aten::copy_", "", stack, TORCH_ABI_VERSION), "copy");
  const Tensor returned(torch::stable::detail::to<AtenTensorHandle>(stack[0]));
}

bool to_dtype(std::int32_t dtype, Dtype* out) {
  if (dtype == aoti_torch_dtype_float32()) *out = Dtype::f32;
  else if (dtype == aoti_torch_dtype_float64()) *out = Dtype::f64;
  else if (dtype == aoti_torch_dtype_bfloat16()) *out = Dtype::bf16;
  else if (dtype == aoti_torch_dtype_float16()) *out = Dtype::f16;
  else return false;
  return true;
}

Tensor Arguments::optional_tensor() {
  const auto handle = torch::stable::detail::to<std::optional<AtenTensorHandle>>(*next_++);
  return handle ? Tensor(*handle) : Tensor();
}

bool Arguments::optional_number(double* value) {
  const auto number = torch::stable::detail::to<std::optional<double>>(*next_++);
  if (number) *value = *number;
  return number.has_value();
}

std::string Arguments::text() {
  const auto handle = torch::stable::detail::to<StringHandle>(*next_++);
  const std::unique_ptr<StringOpaque, AOTITorchError (*)(StringHandle)> owner(handle, &torch_delete_string);
  std::size_t length;
  const char* characters;
  check(torch_string_length(handle, &length), "string");
  check(torch_string_c_str(handle, &characters), "string");
  return std::string(characters, length);
}

std::vector<bool> Arguments::flags() { return torch::stable::detail::to<std::vector<bool>>(*next_++); }

}  // namespace bn
