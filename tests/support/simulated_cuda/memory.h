// Device memory: host memory that counts itself and says it is on cuda:0. Pinned host memory, by address.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/Device.h>
#include <c10/util/Exception.h>

#include <atomic>
#include <cstring>
#include <map>
#include <mutex>

namespace {

using c10::Device;

const Device kDevice(c10::DeviceType::CUDA, 0);
const Device kHost(c10::DeviceType::CPU);

std::atomic<int64_t> allocated{0}, peak{0}, limit{int64_t(8) << 30};
std::atomic<bool> poison_new_memory{true};

void count(int64_t bytes) {
  int64_t now = allocated.fetch_add(bytes) + bytes;
  int64_t before = peak.load();
  while (now > before && !peak.compare_exchange_weak(before, now)) {
  }
  if (bytes > 0 && now > limit.load()) {
    allocated.fetch_sub(bytes);
    C10_THROW_ERROR(
        OutOfMemoryError,
        c10::str("CUDA out of memory (simulated device). Tried to allocate ", bytes, " bytes, ", now - bytes, " of ", limit.load(), " are in use."));
  }
}

// What a device storage owns: the host bytes behind it.
struct Owner {
  c10::DataPtr bytes;
  int64_t size;
};

void drop_owner(void* context) {
  auto* owner = static_cast<Owner*>(context);
  allocated.fetch_sub(owner->size);
  delete owner;
}

c10::DataPtr device_pointer(c10::DataPtr bytes, int64_t size) {
  count(size);
  void* at = bytes.get();
  return c10::DataPtr(at, new Owner{std::move(bytes), size}, &drop_owner, kDevice);
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    count(int64_t(size));  // before the host is asked: it may not have that much
    count(-int64_t(size));
    auto bytes = c10::GetCPUAllocator()->allocate(size);
    if (poison_new_memory && size)
      std::memset(bytes.get(), 0xFF, size);  // NaN in every floating type: memory read before it was written shows
    return device_pointer(std::move(bytes), int64_t(size));
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return nullptr;
  }
  void copy_data(void* to, const void* from, std::size_t size) const override {
    std::memcpy(to, from, size);
  }
};

DeviceAllocator device_allocator;

// Page-locked host memory, by address range.
std::mutex pinned_lock;
std::map<uintptr_t, size_t> pinned_ranges;

void pin(const void* at, size_t size) {
  std::lock_guard<std::mutex> hold(pinned_lock);
  pinned_ranges[reinterpret_cast<uintptr_t>(at)] = size;
}

void unpin(const void* at) {
  std::lock_guard<std::mutex> hold(pinned_lock);
  pinned_ranges.erase(reinterpret_cast<uintptr_t>(at));
}

bool is_pinned(const void* at) {
  std::lock_guard<std::mutex> hold(pinned_lock);
  auto address = reinterpret_cast<uintptr_t>(at);
  auto next = pinned_ranges.upper_bound(address);
  if (next == pinned_ranges.begin())
    return false;
  --next;
  return address < next->first + next->second;
}

void drop_pinned(void* context) {
  auto* bytes = static_cast<c10::DataPtr*>(context);
  unpin(bytes->get());
  delete bytes;
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    auto* bytes = new c10::DataPtr(c10::GetCPUAllocator()->allocate(size));
    void* at = bytes->get();
    if (size)
      pin(at, size);
    return c10::DataPtr(at, bytes, &drop_pinned, kHost);
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return nullptr;
  }
  void copy_data(void* to, const void* from, std::size_t size) const override {
    std::memcpy(to, from, size);
  }
};

PinnedAllocator pinned_allocator;

}  // namespace
