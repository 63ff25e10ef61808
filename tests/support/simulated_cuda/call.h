// One operator call: its device tensors as CPU tensors over the same bytes, and the way back.
#pragma once

#include <ATen/ATen.h>

#include <unordered_map>

#include "memory.h"

namespace {

using at::Tensor;
using c10::DispatchKey;

void drop_storage(void* context) {
  delete static_cast<c10::Storage*>(context);
}

Tensor make_device_tensor(c10::Storage storage, caffe2::TypeMeta dtype, c10::IntArrayRef sizes, c10::IntArrayRef strides, int64_t offset) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(DispatchKey::CUDA), dtype);
  made.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, offset);
  return made;
}

// The CPU's view of the device tensors of one operator call, and the way back.
class Call {
 public:
  Tensor to_host(const Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cuda())
      return tensor;
    TORCH_CHECK(tensor.layout() == at::kStrided, "simulated device: only strided tensors");
    auto known = hosts_.find(tensor.unsafeGetTensorImpl());
    if (known != hosts_.end())
      return known->second;
    auto storage = host_storage(tensor.storage(), tensor.key_set());
    auto host = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(DispatchKey::CPU), tensor.dtype());
    auto* impl = host.unsafeGetTensorImpl();
    impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
    if (tensor.unsafeGetTensorImpl()->is_wrapped_number())
      impl->set_wrapped_number(true);
    if (tensor.is_conj())
      host._set_conj(true);
    if (tensor.is_neg())
      host._set_neg(true);
    hosts_.emplace(tensor.unsafeGetTensorImpl(), host);
    devices_.emplace(impl, tensor);
    return host;
  }

  // Operators may resize, restride or replace what they write to.
  void finish() {
    for (auto& [impl, device] : devices_) {
      auto& host = hosts_.at(device.unsafeGetTensorImpl());
      auto source = origin_.find(host.storage().unsafeGetStorageImpl());
      auto storage = device.storage();
      if (source == origin_.end() || source->second.device.unsafeGetStorageImpl() != storage.unsafeGetStorageImpl()) {
        device.unsafeGetTensorImpl()->set_storage_keep_dtype(device_storage(host.storage()));
      } else if (host.storage().data() != source->second.data || host.storage().nbytes() != source->second.size) {
        auto size = int64_t(host.storage().nbytes());
        c10::Storage moved = host.storage();
        auto bytes = moved.set_data_ptr(c10::DataPtr(nullptr, kHost));
        storage.set_data_ptr_noswap(device_pointer(std::move(bytes), size));
        storage.set_nbytes(size);
      }
      if (device.sizes() != host.sizes() || device.strides() != host.strides() || device.storage_offset() != host.storage_offset())
        device.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
    }
  }

  Tensor to_device(const Tensor& result) {
    if (!result.defined() || !result.is_cpu())
      return result;
    auto given = devices_.find(result.unsafeGetTensorImpl());
    if (given != devices_.end())
      return given->second;
    auto view = origin_.find(result.storage().unsafeGetStorageImpl());
    Tensor made;
    if (view != origin_.end()) {  // a view has the keys of its base: under inference mode a new tensor's would differ
      made = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(view->second.device), view->second.keys, result.dtype());
      made.unsafeGetTensorImpl()->set_sizes_and_strides(result.sizes(), result.strides(), result.storage_offset());
    } else {
      made = make_device_tensor(device_storage(result.storage()), result.dtype(), result.sizes(), result.strides(), result.storage_offset());
    }
    if (result.unsafeGetTensorImpl()->is_wrapped_number())
      made.unsafeGetTensorImpl()->set_wrapped_number(true);
    if (result.is_conj())
      made._set_conj(true);
    if (result.is_neg())
      made._set_neg(true);
    return made;
  }

 private:
  struct Origin {
    c10::Storage device;
    const void* data;
    size_t size;
    c10::DispatchKeySet keys;
  };

  c10::Storage host_storage(const c10::Storage& device, c10::DispatchKeySet keys) {
    auto known = made_.find(device.unsafeGetStorageImpl());
    if (known != made_.end())
      return known->second;
    void* at = const_cast<void*>(device.data());
    c10::Storage host(
        c10::Storage::use_byte_size_t(), device.nbytes(), c10::DataPtr(at, new c10::Storage(device), &drop_storage, kHost),
        c10::GetCPUAllocator(), /*resizable=*/true);
    made_.emplace(device.unsafeGetStorageImpl(), host);
    origin_.emplace(host.unsafeGetStorageImpl(), Origin{device, at, device.nbytes(), keys});
    return host;
  }

  c10::Storage device_storage(const c10::Storage& host) {
    auto known = origin_.find(host.unsafeGetStorageImpl());
    if (known != origin_.end())
      return known->second.device;
    auto again = wrapped_.find(host.unsafeGetStorageImpl());
    if (again != wrapped_.end())
      return again->second;
    void* at = const_cast<void*>(host.data());
    auto bytes = c10::DataPtr(at, new c10::Storage(host), &drop_storage, kHost);
    c10::Storage device(
        c10::Storage::use_byte_size_t(), host.nbytes(), device_pointer(std::move(bytes), int64_t(host.nbytes())), &device_allocator,
        /*resizable=*/true);
    wrapped_.emplace(host.unsafeGetStorageImpl(), device);
    return device;
  }

  std::unordered_map<c10::TensorImpl*, Tensor> hosts_;    // device tensor -> host tensor
  std::unordered_map<c10::TensorImpl*, Tensor> devices_;  // host tensor -> device tensor
  std::unordered_map<c10::StorageImpl*, c10::Storage> made_;
  std::unordered_map<c10::StorageImpl*, Origin> origin_;
  std::unordered_map<c10::StorageImpl*, c10::Storage> wrapped_;
};

}  // namespace
