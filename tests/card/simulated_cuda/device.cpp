// A simulated CUDA device inside a CPU-only build of torch.
//
// Tensors carry device "cuda:0" (DispatchKey CUDA), their memory is host memory. Every operator goes
// through one boxed fallback: it checks that all tensors are on the device (as CUDA does, 0-dim CPU
// tensors and index tensors excepted), runs the CPU kernel on aliases of the same memory, and gives
// the results the device's tag. What makes the host wait is reported to Python.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/op_registration/adaption.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/Resize.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <set>
#include <string>
#include "aliases.h"

namespace py = pybind11;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::StorageImpl;

static py::object* g_report = nullptr;  // called with (kind, what)

static void report(const char* kind, const std::string& what) {
  if (!g_report) return;
  py::gil_scoped_acquire gil;
  try { (*g_report)(kind, what); } catch (py::error_already_set& e) { e.restore(); throw python_error(); }
}

// ---------------------------------------------------------------- generator
struct SimulatedGenerator final : at::CPUGeneratorImpl {
  explicit SimulatedGenerator(uint64_t seed = 67280421310721ull) : at::CPUGeneratorImpl(seed) {
    device_ = DEVICE;
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::CUDA);
  }
};
static at::Generator& default_generator() {
  static at::Generator g = at::make_generator<SimulatedGenerator>();
  return g;
}

// ---------------------------------------------------------------- hooks and guard
namespace at {
struct SimulatedHooks : public at::CUDAHooksInterface {
  SimulatedHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  bool isPinnedPtr(const void* p) const override { return inside(g_pinned, p); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &g_pinned_allocator; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &g_allocator; }
  Device getDeviceFromPtr(void*) const override { return DEVICE; }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(DeviceIndex) const override { return at::make_generator<SimulatedGenerator>(); }
  void deviceSynchronize(DeviceIndex) const override {}
};
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, SimulatedHooks)
}  // namespace at

struct SimulatedGuard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return DEVICE; }
  Device getDevice() const override { return DEVICE; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  c10::Stream getStream(Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::Stream getDefaultStream(Device) const override { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::Stream getNewStream(Device, int) const override { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, SimulatedGuard)

// Arguments that CUDA takes from the CPU as well.
static bool cpu_allowed(const std::string& op, size_t at) {
  static const std::set<std::string> indexed = {
      "aten::index.Tensor", "aten::index.Tensor_out", "aten::index_put_", "aten::index_put",
      "aten::_index_put_impl_", "aten::_unsafe_index.Tensor", "aten::_unsafe_index_put"};
  return indexed.count(op) && at == 1;
}

static void strict(const std::string& op, const std::vector<std::pair<size_t, at::Tensor>>& all) {
  for (const auto& [at, t] : all) {
    if (!t.defined() || t.device().type() == DeviceType::CUDA) continue;
    if (t.device().type() != DeviceType::CPU)
      TORCH_CHECK(false, "[simulated] ", op, " got a tensor on ", t.device());
    if (t.dim() == 0 && op != "aten::mm" && op != "aten::addmm" && op != "aten::bmm") continue;
    if (cpu_allowed(op, at)) continue;
    TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two devices, "
                "cuda:0 and cpu! [simulated] argument ", at, " of ", op, ", ", t.sizes(), " ", t.dtype());
  }
}

// Rules of the CUDA kernels that the CPU ones do not have.
static void rules(const std::string& op, const std::vector<std::pair<size_t, at::Tensor>>& all) {
  if (op == "aten::_int_mm" || op == "aten::_int_mm.out") {
    const auto &a = all[0].second, &b = all[1].second;
    TORCH_CHECK(a.size(0) > 16, "self.size(0) needs to be greater than 16, but got ", a.size(0));
    TORCH_CHECK(a.size(1) > 0 && a.size(1) % 8 == 0, "self.size(1) needs to be greater than 0 and a multiple of 8, but got ", a.size(1));
    TORCH_CHECK(b.size(1) > 0 && b.size(1) % 8 == 0, "mat2.size(1) needs to be greater than 0 and a multiple of 8, but got ", b.size(1));
  }
  if (op == "aten::_scaled_mm" || op == "aten::_scaled_mm.out") {
    const auto &a = all[0].second, &b = all[1].second;
    TORCH_CHECK(a.stride(1) == 1, "mat1 must be row_major");
    TORCH_CHECK(b.stride(0) == 1, "mat2 must be col_major");
    TORCH_CHECK(a.size(1) % 16 == 0, "Expected trailing dimension of mat1 to be divisible by 16 but got mat1 shape: ", a.sizes());
    TORCH_CHECK(b.size(0) % 16 == 0 && b.size(1) % 16 == 0, "mat2 shape must be divisible by 16 ", b.sizes());
  }
}

// Operators whose CUDA kernels read a value on the host before they return.
static bool reads_on_host(const std::string& op) {
  static const std::set<std::string> known = {
      "aten::nonzero", "aten::_local_scalar_dense", "aten::masked_select", "aten::_unique2",
      "aten::unique_consecutive", "aten::is_set_to", "aten::repeat_interleave.Tensor",
      "aten::equal", "aten::nonzero.out", "aten::_linalg_check_errors", "aten::bincount",
      "aten::histc",};
  return known.count(op) > 0;
}

static void boxed(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const size_t n = schema.arguments().size();
  const size_t begin = stack->size() - n;
  const std::string name = op.operator_name().overload_name.empty()
      ? op.operator_name().name : op.operator_name().name + "." + op.operator_name().overload_name;

  std::vector<std::pair<size_t, at::Tensor>> all;
  for (size_t i = 0; i < n; ++i) {
    const auto& v = (*stack)[begin + i];
    if (v.isTensor()) all.emplace_back(i, v.toTensor());
    else if (v.isTensorList()) for (const at::Tensor& t : v.toTensorVector()) all.emplace_back(i, t);
    else if (v.isOptionalTensorList())
      for (const std::optional<at::Tensor>& t : v.toOptionalTensorVector()) if (t) all.emplace_back(i, *t);
  }
  strict(name, all);
  rules(name, all);
  if (reads_on_host(name)) report("sync", name);

  Aliases aliases;
  at::Generator swapped, given;
  for (size_t i = 0; i < n; ++i) {
    auto& v = (*stack)[begin + i];
    if (v.isTensor()) {
      const at::Tensor t = v.toTensor();
      if (on_device(t)) v = aliases.to_cpu(t);
    } else if (v.isTensorList()) {
      c10::List<at::Tensor> made;
      for (const at::Tensor& t : v.toTensorVector()) made.push_back(on_device(t) ? aliases.to_cpu(t) : t);
      v = made;
    } else if (v.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> made;
      for (const std::optional<at::Tensor>& t : v.toOptionalTensorVector())
        made.push_back(t && on_device(*t) ? std::optional<at::Tensor>(aliases.to_cpu(*t)) : t);
      v = made;
    } else if (v.isDevice()) {
      if (v.toDevice().type() == DeviceType::CUDA) v = Device(DeviceType::CPU);
    } else if (v.isGenerator()) {
      given = v.toGenerator();
      if (given.defined()) {
        TORCH_CHECK(given.device().type() == DeviceType::CUDA,
                    "Expected a 'cuda' device type for generator but found 'cpu'");
        swapped = at::make_generator<at::CPUGeneratorImpl>();
        auto* own = static_cast<at::CPUGeneratorImpl*>(given.unsafeGetGeneratorImpl());
        static_cast<at::CPUGeneratorImpl*>(swapped.unsafeGetGeneratorImpl())->set_engine(own->engine());
        v = swapped;
      }
    }
  }
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }
  if (swapped.defined()) {
    auto* own = static_cast<at::CPUGeneratorImpl*>(given.unsafeGetGeneratorImpl());
    own->set_engine(static_cast<at::CPUGeneratorImpl*>(swapped.unsafeGetGeneratorImpl())->engine());
  }
  aliases.settle();
  const size_t returns = schema.returns().size();
  for (size_t i = stack->size() - returns; i < stack->size(); ++i) {
    auto& v = (*stack)[i];
    if (v.isTensor()) v = aliases.from_cpu(v.toTensor());
    else if (v.isTensorList()) {
      c10::List<at::Tensor> made;
      for (const at::Tensor& t : v.toTensorVector()) made.push_back(aliases.from_cpu(t));
      v = made;
    }
  }
}

// ---------------------------------------------------------------- kernels of our own
static at::Tensor empty_memory_format(c10::IntArrayRef size, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout> layout, std::optional<Device> device, std::optional<bool> pin,
    std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  return at::detail::empty_generic(size, &g_allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                   dtype.value_or(c10::get_default_dtype_as_scalartype()), format);
}
static at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride,
    std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<Device>, std::optional<bool> pin) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  return at::detail::empty_strided_generic(size, stride, &g_allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                           dtype.value_or(c10::get_default_dtype_as_scalartype()));
}
static at::Tensor& copy_(at::Tensor& self, const at::Tensor& src, bool non_blocking) {
  if (self.is_same(src)) return self;
  const bool up = on_device(self) && !on_device(src), down = !on_device(self) && on_device(src);
  if (down && !(non_blocking && inside(g_pinned, self.data_ptr())))
    report("sync", "copy to host");
  if (up && src.numel() > 0) {
    const bool pinned = inside(g_pinned, src.data_ptr());
    if (!non_blocking) report("sync", pinned ? "blocking copy from pinned host" : "blocking copy from pageable host");
    else if (!pinned) report("staged", "non_blocking copy from pageable host");
  }
  if (down && non_blocking && inside(g_pinned, self.data_ptr())) report("async", "copy to pinned host");
  Aliases aliases;
  at::Tensor to = on_device(self) ? aliases.to_cpu(self) : self;
  at::Tensor from = on_device(src) ? aliases.to_cpu(src) : src;
  at::AutoDispatchBelowADInplaceOrView guard;
  to.copy_(from);
  return self;
}
static at::Scalar local_scalar(const at::Tensor& self) {
  report("sync", "item");
  Aliases aliases;
  at::AutoDispatchBelowADInplaceOrView guard;
  return aliases.to_cpu(self).item();
}
static const at::Tensor& resize_(const at::Tensor& self, c10::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->generic_set_sizes_contiguous(size);
  size_t need = (impl->numel() + impl->storage_offset()) * impl->itemsize();
  StorageImpl* s = impl->unsafe_storage().unsafeGetStorageImpl();
  if (need > s->nbytes()) {
    auto made = g_allocator.allocate(need);
    if (s->nbytes()) std::memcpy(made.get(), s->data(), s->nbytes());
    s->set_data_ptr_noswap(std::move(made));
    s->set_nbytes(need);
  }
  if (format && *format != at::MemoryFormat::Preserve) impl->empty_tensor_restride(*format);
  return self;
}
static at::Tensor& set_storage(at::Tensor& self, at::Storage source, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(source);
  impl->set_storage_offset(offset);
  if (stride.data() == nullptr || stride.empty()) impl->set_sizes_contiguous(size);
  else impl->set_sizes_and_strides(size, stride);
  return self;
}
static at::Tensor& set_source_storage(at::Tensor& self, at::Storage source) {
  int64_t length = source.nbytes() / self.dtype().itemsize();
  return set_storage(self, source, 0, {length}, {});
}
static at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}
static at::Tensor& set_nothing(at::Tensor& self) {
  c10::Storage made(c10::Storage::use_byte_size_t(), 0, &g_allocator, true);
  return set_storage(self, made, 0, {0}, {});
}
static void record_stream(at::Tensor&, at::Stream) {}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&boxed>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", TORCH_FN(empty_memory_format));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("copy_", TORCH_FN(copy_));
  m.impl("_local_scalar_dense", TORCH_FN(local_scalar));
  m.impl("resize_", TORCH_FN(resize_));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage));
  m.impl("set_.source_Storage", TORCH_FN(set_source_storage));
  m.impl("set_.source_Tensor", TORCH_FN(set_tensor));
  m.impl("set_", TORCH_FN(set_nothing));
  m.impl("record_stream", TORCH_FN(record_stream));
}

static at::Tensor from_pointer(uintptr_t p, int64_t n) {
  auto impl = c10::make_intrusive<StorageImpl>(StorageImpl::use_byte_size_t(), n,
      c10::DataPtr((void*)p, DEVICE), nullptr, false);
  auto made = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(std::move(impl)),
      c10::DispatchKeySet(c10::DispatchKey::CUDA), caffe2::TypeMeta::Make<uint8_t>());
  made.unsafeGetTensorImpl()->set_sizes_contiguous({n});
  return made;
}

static at::Tensor pinned_empty(std::vector<int64_t> size, py::object dtype) {
  auto kind = dtype.is_none() ? c10::get_default_dtype_as_scalartype()
                              : reinterpret_cast<THPDtype*>(dtype.ptr())->scalar_type;
  return at::detail::empty_generic(size, &g_pinned_allocator, c10::DispatchKeySet(c10::DispatchKey::CPU), kind, std::nullopt);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("pinned_empty", &pinned_empty);
  c10::SetAllocator(DeviceType::CUDA, &g_allocator, 100);
  at::setHostAllocator(DeviceType::CUDA, &g_pinned_allocator, 100);
  m.def("allocated", [] { return g_now.load(); });
  m.def("peak", [] { return g_peak.load(); });
  m.def("reset_peak", [] { g_peak = g_now.load(); });
  m.def("set_limit", [](int64_t n) { g_limit = n; });
  m.def("limit", [] { return g_limit.load(); });
  m.def("add", [](int64_t n) { count(n); });
  m.def("poison", [](bool on) { g_poison = on; });
  m.def("pin", [](uintptr_t p, size_t n) { remember(g_pinned, (void*)p, n); });
  m.def("unpin", [](uintptr_t p) { return forget(g_pinned, (void*)p); });
  m.def("is_pinned_pointer", [](uintptr_t p) { return inside(g_pinned, (void*)p); });
  m.def("is_device_pointer", [](uintptr_t p) { return inside(g_device, (void*)p); });
  m.def("from_pointer", &from_pointer);
  m.def("default_generator", [] { return default_generator(); });
  m.def("on_report", [](py::object f) { delete g_report; g_report = f.is_none() ? nullptr : new py::object(f); });
}
