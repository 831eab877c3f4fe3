// Memory of the simulated device: host memory that is counted, limited, and remembered as "device"
// or "pinned", so that an address tells which of them it belongs to.
#pragma once
#include <ATen/core/CachingHostAllocator.h>
#include <c10/core/Allocator.h>
#include <c10/core/StorageImpl.h>
#include <torch/csrc/Exceptions.h>
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

static const c10::Device DEVICE(c10::DeviceType::CUDA, 0);
static std::atomic<int64_t> g_now{0}, g_peak{0}, g_limit{0};
static std::atomic<bool> g_poison{false};
static std::mutex g_lock;
// First address -> bytes.
static std::map<uintptr_t, size_t> g_device, g_pinned;

static void count(int64_t bytes) {
  int64_t now = g_now += bytes;
  int64_t peak = g_peak;
  while (now > peak && !g_peak.compare_exchange_weak(peak, now)) {}
}
// As CUDA's caching allocator rounds.
static int64_t rounded(size_t n) { return (int64_t)((n + 511) / 512 * 512); }
static void remember(std::map<uintptr_t, size_t>& where, void* p, size_t n) {
  std::lock_guard<std::mutex> hold(g_lock);
  where[(uintptr_t)p] = n;
}
static bool forget(std::map<uintptr_t, size_t>& where, void* p) {
  std::lock_guard<std::mutex> hold(g_lock);
  return where.erase((uintptr_t)p) > 0;
}
static bool inside(const std::map<uintptr_t, size_t>& where, const void* p) {
  std::lock_guard<std::mutex> hold(g_lock);
  auto it = where.upper_bound((uintptr_t)p);
  if (it == where.begin()) return false;
  --it;
  return (uintptr_t)p < it->first + std::max<size_t>(it->second, 1);
}
static void check_limit(size_t n) {
  int64_t limit = g_limit;
  if (limit > 0 && g_now + rounded(n) > limit)
    TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", n,
                     " bytes. The simulated device holds ", g_now.load(), " of ", limit);
}

struct Block { void* p; size_t n; };

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    check_limit(n);
    void* p = nullptr;
    if (n) {
      if (posix_memalign(&p, 512, n)) TORCH_CHECK_WITH(OutOfMemoryError, false, "host out of memory");
      // Every byte 0xFF is NaN in every float type: nothing may depend on memory it did not write.
      if (g_poison) std::memset(p, 0xFF, n);
      remember(g_device, p, n);
    }
    count(rounded(n));
    return {p, new Block{p, n}, &release, DEVICE};
  }
  static void release(void* context) {
    auto* block = static_cast<Block*>(context);
    if (block->p) { forget(g_device, block->p); std::free(block->p); }
    count(-rounded(block->n));
    delete block;
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t n) const override { std::memcpy(to, from, n); }
};
static DeviceAllocator g_allocator;

struct PinnedAllocator final : at::HostAllocator {
  c10::DataPtr allocate(size_t n) override {
    void* p = nullptr;
    if (posix_memalign(&p, 4096, std::max<size_t>(n, 1))) TORCH_CHECK(false, "host out of memory");
    remember(g_pinned, p, n);
    return {p, new Block{p, n}, &release, c10::Device(c10::DeviceType::CPU)};
  }
  static void release(void* context) {
    auto* block = static_cast<Block*>(context);
    forget(g_pinned, block->p);
    std::free(block->p);
    delete block;
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t n) const override { std::memcpy(to, from, n); }
  bool record_event(void*, void*, c10::Stream) override { return true; }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
};
static PinnedAllocator g_pinned_allocator;

// Memory that a CPU kernel allocated becomes device memory: its storage lives in the deleter.
struct Taken { c10::Storage held; int64_t n; };
static void release_taken(void* context) {
  auto* taken = static_cast<Taken*>(context);
  forget(g_device, taken->held.mutable_data());
  count(-rounded(taken->n));
  delete taken;
}
static c10::DataPtr take(const c10::Storage& made) {
  int64_t n = made.nbytes();
  check_limit(n);
  void* p = made.mutable_data();
  remember(g_device, p, n);
  count(rounded(n));
  return {p, new Taken{made, n}, &release_taken, DEVICE};
}
