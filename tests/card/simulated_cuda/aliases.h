// Device tensors as CPU tensors on the same memory, and the way back, for one call of an operator.
#pragma once
#include <ATen/ATen.h>
#include <c10/core/CPUAllocator.h>
#include <unordered_map>
#include <vector>
#include "memory.h"

static bool on_device(const at::Tensor& t) {
  return t.defined() && t.device().type() == c10::DeviceType::CUDA;
}

struct Aliases {
  std::unordered_map<c10::StorageImpl*, c10::Storage> cpu_of;     // device storage -> its alias
  std::unordered_map<c10::StorageImpl*, c10::Storage> device_of;  // alias -> device storage
  std::unordered_map<c10::StorageImpl*, void*> start;             // alias -> address when made
  std::unordered_map<c10::TensorImpl*, at::Tensor> originals;     // alias -> device tensor
  std::vector<at::Tensor> kept;  // the stack lets go of the aliases before they are settled

  c10::Storage storage(const c10::Storage& s) {
    auto it = cpu_of.find(s.unsafeGetStorageImpl());
    if (it != cpu_of.end()) return it->second;
    void* p = s.mutable_data();
    auto impl = c10::make_intrusive<c10::StorageImpl>(
        c10::StorageImpl::use_byte_size_t(), s.nbytes(),
        c10::DataPtr(p, c10::Device(c10::DeviceType::CPU)), c10::GetCPUAllocator(), /*resizable=*/true);
    c10::Storage made(std::move(impl));
    cpu_of[s.unsafeGetStorageImpl()] = made;
    device_of[made.unsafeGetStorageImpl()] = s;
    start[made.unsafeGetStorageImpl()] = p;
    return made;
  }

  static at::Tensor like(const at::Tensor& t, c10::Storage held, c10::DispatchKey key) {
    auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(held), c10::DispatchKeySet(key), t.dtype());
    auto* impl = made.unsafeGetTensorImpl();
    impl->set_sizes_and_strides(t.sizes(), t.strides());
    impl->set_storage_offset(t.storage_offset());
    if (t.is_conj()) impl->_set_conj(true);
    if (t.is_neg()) impl->_set_neg(true);
    if (t.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
    return made;
  }

  at::Tensor to_cpu(const at::Tensor& t) {
    auto made = like(t, storage(t.storage()), c10::DispatchKey::CPU);
    originals[made.unsafeGetTensorImpl()] = t;
    kept.push_back(made);
    return made;
  }

  at::Tensor from_cpu(const at::Tensor& t) {
    if (!t.defined() || t.device().type() != c10::DeviceType::CPU) return t;
    auto seen = originals.find(t.unsafeGetTensorImpl());
    if (seen != originals.end()) return seen->second;
    if (!t.has_storage()) return t;
    c10::StorageImpl* key = t.storage().unsafeGetStorageImpl();
    auto known = device_of.find(key);
    if (known == device_of.end()) {
      auto impl = c10::make_intrusive<c10::StorageImpl>(
          c10::StorageImpl::use_byte_size_t(), t.storage().nbytes(), take(t.storage()), &g_allocator, true);
      known = device_of.emplace(key, c10::Storage(std::move(impl))).first;
    }
    return like(t, known->second, c10::DispatchKey::CUDA);
  }

  // What the operator resized or re-seated on an alias happens to the original too.
  void settle() {
    for (auto& [made, held] : device_of) {
      auto it = start.find(made);
      if (it == start.end()) continue;
      c10::StorageImpl* own = held.unsafeGetStorageImpl();
      if (made->data() != it->second || made->nbytes() != own->nbytes()) {
        c10::Storage grown(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(made));
        own->set_data_ptr_noswap(take(grown));
        own->set_nbytes(grown.nbytes());
      }
    }
    for (auto& [impl, t] : originals) {
      auto* own = t.unsafeGetTensorImpl();
      if (impl->sizes() != own->sizes() || impl->strides() != own->strides() ||
          impl->storage_offset() != own->storage_offset()) {
        own->set_sizes_and_strides(impl->sizes(), impl->strides());
        own->set_storage_offset(impl->storage_offset());
      }
    }
  }
};
