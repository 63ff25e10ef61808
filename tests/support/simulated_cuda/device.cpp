// A pretend CUDA device for a CPU build of PyTorch.
//
// Tensors "on cuda:0" have the real CUDA dispatch key and device, but their bytes are host memory. Every
// operator goes through `fallback` below, which
//   1. raises, as CUDA does, when CPU and CUDA tensors meet in one operator,
//   2. gives the CPU kernel CPU tensors over the same bytes,
//   3. gives its results back as CUDA tensors (views stay views).
// Copies are the only crossing; asynchronous ones are watched (transfers.h).
// Nothing here is fast, and nothing shows what a kernel on a real GPU would compute.

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <string>
#include <unordered_set>
#include <vector>

#include "call.h"
#include "memory.h"
#include "runtime.h"
#include "transfers.h"

namespace {

using c10::IValue;
using Stack = torch::jit::Stack;

// Operators that take indices from the CPU, as CUDA's do.
bool takes_host_indices(const std::string& name) {
  return name == "aten::index" || name == "aten::index_put" || name == "aten::index_put_" || name == "aten::_index_put_impl_" ||
      name == "aten::_unsafe_index" || name == "aten::_unsafe_index_put";
}

// Operators after which the host knows the result, so that it has waited for the device.
bool waits(const std::string& name) {
  static const std::unordered_set<std::string> names = {
      "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero", "aten::_unique2",
      "aten::unique_consecutive", "aten::unique_dim"};
  return names.count(name) > 0;
}

// Sums of products of 16-bit floats: the CPU's own kernels take up to a hundred times as long as in float32, in which a GPU adds, too.
bool adds_in_float32(const c10::FunctionSchema& schema) {
  static const std::unordered_set<std::string> names = {
      "aten::convolution", "aten::convolution_backward", "aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm"};
  return schema.overload_name().empty() && names.count(schema.name()) > 0;
}

// The last `count` values of the stack, tensors of one type as such of another.
void convert(Stack& stack, size_t count, at::ScalarType from, at::ScalarType to) {
  for (size_t i = stack.size() - count; i < stack.size(); i++)
    if (stack[i].isTensor() && stack[i].toTensor().defined() && stack[i].toTensor().scalar_type() == from)
      stack[i] = IValue(stack[i].toTensor().to(to));
}

struct Seen {
  std::string argument;
  Tensor tensor;
  bool written;
};

std::atomic<int64_t> operators{0};
bool (*may_mix)() = nullptr;  // asked when an operator reads CPU tensors beside the device's: device.mixing

bool may_read(const Seen& one) {
  return !one.written && may_mix != nullptr && may_mix();
}

void check_devices(const std::string& name, const std::vector<Seen>& seen) {
  bool device = false;
  for (auto& one : seen)
    device = device || one.tensor.is_cuda();
  if (!device)
    return;
  bool self_on_device = !seen.empty() && seen.front().tensor.is_cuda();
  for (auto& one : seen) {
    if (!one.tensor.is_cpu())
      continue;
    if (takes_host_indices(name)) {
      if (self_on_device && one.argument == "indices")
        continue;
      TORCH_CHECK(
          one.argument != "self" || may_read(one), "indices should be either on cpu or on the same device as the indexed tensor (cpu) [simulated device, ", name, "]");
    }
    if ((one.tensor.dim() == 0 && !one.written) || may_read(one))
      continue;
    std::string others;
    for (auto& other : seen)
      others += c10::str("\n    ", other.argument, ": ", other.tensor.device(), " ", other.tensor.scalar_type(), " ", other.tensor.sizes());
    TORCH_CHECK(
        false, "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! [simulated device: ", name, ", argument ",
        one.argument, " is on the CPU]", others);
  }
}

void fallback(const c10::OperatorHandle& handle, Stack* stack) {
  operators++;
  const auto& schema = handle.schema();
  const auto& name = schema.name();
  const auto& arguments = schema.arguments();
  const size_t first = stack->size() - arguments.size();

  std::vector<Seen> seen;
  bool to_host_device = false, on_device = false;
  for (size_t i = 0; i < arguments.size(); i++) {
    const IValue& value = (*stack)[first + i];
    bool written = arguments[i].alias_info() != nullptr && arguments[i].alias_info()->isWrite();
    auto note = [&](const Tensor& tensor) {
      if (tensor.defined()) {
        seen.push_back({arguments[i].name(), tensor, written});
        on_device = on_device || tensor.is_cuda();
      }
    };
    if (value.isTensor()) {
      note(value.toTensor());
    } else if (value.isTensorList()) {
      for (const Tensor& tensor : value.toTensorVector())
        note(tensor);
    } else if (value.isOptionalTensorList()) {
      for (const std::optional<Tensor>& tensor : value.toOptionalTensorVector())
        if (tensor.has_value())
          note(*tensor);
    } else if (value.isDevice()) {
      if (value.toDevice().is_cuda())
        on_device = true;
      else if (value.toDevice().is_cpu())
        to_host_device = true;
    }
  }
  check_devices(name, seen);
  if (waits(name))
    transfers().wait();

  Call call;
  for (size_t i = 0; i < arguments.size(); i++) {
    IValue& value = (*stack)[first + i];
    if (value.isTensor()) {
      value = IValue(call.to_host(value.toTensor()));
    } else if (value.isTensorList()) {
      c10::List<Tensor> hosts;
      for (const Tensor& tensor : value.toTensorVector())
        hosts.push_back(call.to_host(tensor));
      value = IValue(std::move(hosts));
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> hosts;
      for (const std::optional<Tensor>& tensor : value.toOptionalTensorVector())
        hosts.push_back(tensor.has_value() ? std::optional<Tensor>(call.to_host(*tensor)) : std::nullopt);
      value = IValue(std::move(hosts));
    } else if (value.isDevice() && value.toDevice().is_cuda()) {
      value = IValue(kHost);
    } else if (value.isGenerator()) {
      auto generator = value.toGenerator();
      if (generator.defined()) {
        TORCH_CHECK(
            generator.device().is_cuda(), "Expected a 'cuda' device type for generator but found 'cpu' [simulated device: ", name, "]");
        TORCH_CHECK(on_device, "Expected a 'cpu' device type for generator but found 'cuda' [simulated device: ", name, "]");
        value = IValue(static_cast<DeviceGenerator*>(generator.unsafeGetGeneratorImpl())->host);
      }
    } else if (arguments[i].name() == "generator" && value.isNone() && on_device) {
      value = IValue(static_cast<DeviceGenerator*>(default_generator().unsafeGetGeneratorImpl())->host);
    } else if (arguments[i].name() == "pin_memory" && value.isBool() && value.toBool()) {
      TORCH_CHECK(to_host_device, "Only dense CPU tensors can be pinned [simulated device: ", name, "]");
    }
  }
  const size_t results = schema.returns().size();
  const auto type = seen.empty() ? at::kFloat : seen.front().tensor.scalar_type();
  const bool widen = (type == at::kHalf || type == at::kBFloat16) && adds_in_float32(schema) &&
      std::all_of(seen.begin(), seen.end(), [&](const Seen& one) { return one.tensor.scalar_type() == type; });
  {
    at::AutoDispatchBelowADInplaceOrView below;
    if (widen)
      convert(*stack, arguments.size(), type, at::kFloat);
    handle.callBoxed(stack);
    if (widen)
      convert(*stack, results, at::kFloat, type);
  }
  call.finish();
  if (to_host_device)
    return;
  for (size_t i = stack->size() - results; i < stack->size(); i++) {
    IValue& value = (*stack)[i];
    if (value.isTensor()) {
      value = IValue(call.to_device(value.toTensor()));
    } else if (value.isTensorList()) {
      c10::List<Tensor> devices;
      for (const Tensor& tensor : value.toTensorVector())
        devices.push_back(call.to_device(tensor));
      value = IValue(std::move(devices));
    }
  }
}

std::string shown(const Tensor& tensor) {
  return c10::str(tensor.scalar_type(), " ", tensor.sizes());
}

Tensor& copy(Tensor& self, const Tensor& source, bool non_blocking) {
  operators++;
  Call call;
  auto to = call.to_host(self), from = call.to_host(source);
  at::AutoDispatchBelowADInplaceOrView below;
  const bool download = self.is_cpu() && source.is_cuda(), upload = self.is_cuda() && source.is_cpu();
  if (download && non_blocking && is_pinned(to.data_ptr()) && to.numel()) {
    // the bytes as they are now in the device's order of work
    transfers().download(to, from.to(to.scalar_type()).expand(to.sizes()));
    return self;
  }
  if (download)
    transfers().wait();
  to.copy_(from);
  if (upload && non_blocking && from.numel() && is_pinned(from.data_ptr()))
    transfers().upload(from, "upload of " + shown(source) + " to " + shown(self));
  return self;
}

Tensor empty(
    c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout, std::optional<Device> device,
    std::optional<bool> pinned, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pinned.value_or(false), "Only dense CPU tensors can be pinned");
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  auto shape = at::detail::empty_meta(sizes, dtype, layout, Device(c10::DeviceType::Meta), false, format);
  auto bytes = size_t(shape.numel()) * shape.dtype().itemsize();
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, device_allocator.allocate(bytes), &device_allocator, true);
  return make_device_tensor(std::move(storage), shape.dtype(), shape.sizes(), shape.strides(), 0);
}

Tensor empty_strided(
    c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
    std::optional<Device> device, std::optional<bool> pinned) {
  TORCH_CHECK(!pinned.value_or(false), "Only dense CPU tensors can be pinned");
  auto sizes = C10_AS_INTARRAYREF_SLOW(size), strides = C10_AS_INTARRAYREF_SLOW(stride);
  auto type = c10::scalarTypeToTypeMeta(dtype.value_or(at::get_default_dtype_as_scalartype()));
  auto bytes = at::detail::computeStorageNbytes(sizes, strides, type.itemsize());
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, device_allocator.allocate(bytes), &device_allocator, true);
  return make_device_tensor(std::move(storage), type, sizes, strides, 0);
}

Tensor& set_storage(Tensor& self, c10::Storage source, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  auto sizes = C10_AS_INTARRAYREF_SLOW(size), strides = C10_AS_INTARRAYREF_SLOW(stride);
  TORCH_CHECK(source.device() == self.device(), "set_: storage is on ", source.device(), ", tensor on ", self.device());
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(source);
  if (strides.size() == sizes.size()) {
    impl->set_sizes_and_strides(sizes, strides, offset.expect_int());
  } else {
    impl->set_storage_offset(offset.expect_int());
    impl->set_sizes_contiguous(sizes);
  }
  return self;
}

Tensor& set_whole_storage(Tensor& self, c10::Storage source) {
  int64_t count = int64_t(source.nbytes() / self.dtype().itemsize());
  return set_storage(self, source, 0, c10::fromIntArrayRefSlow({count}), {});
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sym_sizes(), source.sym_strides());
}

Tensor& set_nothing(Tensor& self) {
  c10::Storage storage(c10::Storage::use_byte_size_t(), 0, device_allocator.allocate(0), &device_allocator, true);
  return set_storage(self, storage, 0, c10::fromIntArrayRefSlow({0}), {});
}

void record_stream(Tensor&, c10::Stream) {}

bool registered = [] {
  c10::SetAllocator(c10::DeviceType::CUDA, &device_allocator);
  return true;
}();

}  // namespace

namespace at {
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)
}

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("copy_", &copy);
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("set_", &set_nothing);
  m.impl("record_stream", &record_stream);

  // Every operator with a CPU kernel has the CPU kernel here too, also where PyTorch has a composite one that
  // would be taken before the fallback.
  static const std::unordered_set<std::string> own = {
      "copy_", "empty.memory_format", "empty_strided", "set_.source_Storage_storage_offset", "set_.source_Storage",
      "set_.source_Tensor", "set_", "record_stream", "_pin_memory", "is_pinned"};
  for (const auto& operator_name : c10::Dispatcher::singleton().getAllOpNames()) {
    if (operator_name.name.rfind("aten::", 0) != 0)
      continue;
    std::string name = operator_name.name.substr(6);
    if (!operator_name.overload_name.empty())
      name += "." + operator_name.overload_name;
    auto handle = c10::Dispatcher::singleton().findSchema(operator_name);
    if (own.count(name) || !handle)
      continue;
    bool wanted = handle->hasKernelForDispatchKey(DispatchKey::CPU) || name == "convolution" || name == "convolution_backward";
    if (wanted && !handle->hasKernelForDispatchKey(DispatchKey::CUDA))
      m.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&fallback>());
  }
}

TORCH_LIBRARY(simulated_cuda, m) {
  m.def("allocated", []() -> int64_t { return allocated.load(); });
  m.def("peak", []() -> int64_t { return peak.load(); });
  m.def("reset_peak", []() { peak.store(allocated.load()); });
  m.def("set_limit", [](int64_t bytes) { limit.store(bytes); });
  m.def("limit", []() -> int64_t { return limit.load(); });
  m.def("operators", []() -> int64_t { return operators.load(); });
  m.def("poison", [](bool on) { poison_new_memory = on; });
  m.def("wait", []() { transfers().wait(); });
  m.def("uploads", []() -> int64_t { return transfers().uploads_seen; });
  m.def("downloads", []() -> int64_t { return transfers().downloads_seen; });
  m.def("races", []() -> std::vector<std::string> {
    transfers().wait();
    return transfers().races;
  });
  m.def("mixing", [](int64_t asked) { may_mix = reinterpret_cast<bool (*)()>(asked); });
  m.def("clear_races", []() { transfers().races.clear(); });
  m.def("pin", [](int64_t at, int64_t size) { pin(reinterpret_cast<void*>(at), size_t(size)); });
  m.def("unpin", [](int64_t at) { unpin(reinterpret_cast<void*>(at)); });
  m.def("default_generator", []() -> at::Generator { return default_generator(); });
}
