// Asynchronous copies.
// A real non_blocking copy happens some time between its call and the next wait for the device. Both ends of
// that range are wrong for somebody, so
//   host -> device from pinned memory: copied at once, and the source must still be the same at the next wait;
//   device -> host into pinned memory: the destination holds NaN until the next wait.
// (From or into pageable memory CUDA stages the bytes before the call returns: no race.)
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <limits>
#include <mutex>
#include <string>
#include <vector>

namespace {

using at::Tensor;

struct Transfers {
  struct Upload {
    Tensor source;
    Tensor snapshot;
    std::string what;
  };
  struct Download {
    Tensor target;
    Tensor snapshot;
  };

  std::recursive_mutex lock;
  std::vector<Upload> uploads;
  std::vector<Download> downloads;
  std::vector<std::string> races;
  int64_t uploads_seen = 0, downloads_seen = 0;
  bool draining = false;
  int64_t watched_bytes = 0;

  void upload(const Tensor& source, std::string what) {
    std::lock_guard<std::recursive_mutex> hold(lock);
    uploads_seen++;
    watched_bytes += source.nbytes();
    uploads.push_back({source, source.clone(), std::move(what)});
    if (watched_bytes > (int64_t(1) << 30))
      wait();
  }

  void download(const Tensor& target, const Tensor& source) {
    std::lock_guard<std::recursive_mutex> hold(lock);
    downloads_seen++;
    downloads.push_back({target, source.clone()});
    if (target.is_floating_point())
      target.fill_(std::numeric_limits<double>::quiet_NaN());
    else
      target.fill_(target.scalar_type() == at::kBool ? 1 : 77);
  }

  void wait() {
    std::lock_guard<std::recursive_mutex> hold(lock);
    if (draining)
      return;
    draining = true;
    at::AutoDispatchBelowADInplaceOrView below;
    for (auto& one : downloads)
      one.target.copy_(one.snapshot);
    for (auto& one : uploads) {
      bool same = one.source.nbytes() == one.snapshot.nbytes() &&
          at::equal(one.source.contiguous().view({-1}).view(at::kByte), one.snapshot.contiguous().view({-1}).view(at::kByte));
      if (!same)
        races.push_back("pinned memory was overwritten before the device had read it: " + one.what);
    }
    downloads.clear();
    uploads.clear();
    watched_bytes = 0;
    draining = false;
  }
};

Transfers& transfers() {
  static auto* all = new Transfers();
  return *all;
}

}  // namespace
