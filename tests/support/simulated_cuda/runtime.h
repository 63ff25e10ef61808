// Generators, streams, events and the hooks through which PyTorch asks about CUDA. One queue, always finished.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "memory.h"
#include "transfers.h"

namespace {

using c10::DispatchKey;

// The CPU's generator behind a CUDA face. Its numbers differ from the CPU's for the same seed, as on a real GPU.
struct DeviceGenerator final : c10::GeneratorImpl {
  at::Generator host;

  explicit DeviceGenerator() : c10::GeneratorImpl(kDevice, c10::DispatchKeySet(DispatchKey::CUDA)), host(at::detail::createCPUGenerator(scramble(67280421310721ULL))), seed_(67280421310721ULL) {}

  static uint64_t scramble(uint64_t seed) {
    return seed * 6364136223846793005ULL + 1442695040888963407ULL;
  }
  void set_current_seed(uint64_t seed) override {
    seed_ = seed;
    host.set_current_seed(scramble(seed));
  }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override {
    return 0;
  }
  uint64_t current_seed() const override {
    return seed_;
  }
  uint64_t seed() override {
    auto made = c10::detail::getNonDeterministicRandom();
    set_current_seed(made);
    return made;
  }
  void set_state(const c10::TensorImpl& state) override {
    host.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return host.unsafeGetGeneratorImpl()->get_state();
  }
  c10::GeneratorImpl* clone_impl() const override {
    auto* copy = new DeviceGenerator();
    copy->seed_ = seed_;
    copy->host = host.clone();
    return copy;
  }

 private:
  uint64_t seed_;
};

at::Generator& default_generator() {
  static auto* generator = new at::Generator(c10::make_intrusive<DeviceGenerator>());
  return *generator;
}

std::atomic<int64_t> next_stream{1};
thread_local int64_t current_stream = 0;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override {
    return c10::DeviceType::CUDA;
  }
  Device exchangeDevice(Device) const override {
    return kDevice;
  }
  Device getDevice() const override {
    return kDevice;
  }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  c10::Stream getStream(Device) const override {
    return c10::Stream(c10::Stream::UNSAFE, kDevice, current_stream);
  }
  c10::Stream getDefaultStream(Device) const override {
    return c10::Stream(c10::Stream::UNSAFE, kDevice, 0);
  }
  c10::Stream getNewStream(Device, int) const override {
    return c10::Stream(c10::Stream::UNSAFE, kDevice, next_stream++);
  }
  c10::Stream getStreamFromGlobalPool(Device, bool) const override {
    return c10::Stream(c10::Stream::UNSAFE, kDevice, next_stream++);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    auto before = getStream(kDevice);
    current_stream = stream.id();
    return before;
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return 1;
  }
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    *event = reinterpret_cast<void*>(1);
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override {
    return true;
  }
  void synchronizeEvent(void*) const override {
    transfers().wait();
  }
  bool queryStream(const c10::Stream&) const override {
    return true;
  }
  void synchronizeStream(const c10::Stream&) const override {
    transfers().wait();
  }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    transfers().wait();
  }
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  Hooks() = default;
  void init() const override {}
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  bool hasCUDA() const override {
    return true;
  }
  bool hasPrimaryContext(c10::DeviceIndex) const override {
    return true;
  }
  c10::DeviceIndex deviceCount() const override {
    return 1;
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return 0;
  }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override {
    return 0;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override {
    return 0;
  }
  c10::DeviceIndex current_device() const override {
    return 0;
  }
  int getNumGPUs() const override {
    return 1;
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return default_generator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::Generator(c10::make_intrusive<DeviceGenerator>());
  }
  bool isPinnedPtr(const void* at) const override {
    return is_pinned(at);
  }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    return &pinned_allocator;
  }
  c10::Allocator* getCUDADeviceAllocator() const override {
    return &device_allocator;
  }
  Device getDeviceFromPtr(void*) const override {
    return kDevice;
  }
  void deviceSynchronize(c10::DeviceIndex) const override {
    transfers().wait();
  }
};

}  // namespace
