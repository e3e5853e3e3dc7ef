// A device for tests. Its tensors lie in the CPU's memory, but torch takes them for another device's: an operator runs
// by copying to the CPU and back, and a CPU tensor among tensors of the device is an error, as on an accelerator.

#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace {

constexpr auto kDevice = c10::DeviceType::PrivateUse1;
constexpr c10::DeviceIndex kDevices = 4;  // cores of a host

c10::DeviceIndex current = 0;   // the core of this process
bool group_exists = false;
bool in_graph = false;
std::map<std::string, int64_t> eager;  // how often each operator ran outside of a graph

// AWS's guide "How to use torch.distributed on Neuron" makes the process group before anything touches the device. In
// TorchNeuron's source of 2025 the group is what gives each process its NeuronCore.
void use_runtime() {
  const char* world_size = std::getenv("WORLD_SIZE");
  TORCH_CHECK(
      group_exists || world_size == nullptr || std::atoi(world_size) == 1,
      "the device is used before the process group exists, which gives each process its NeuronCore");
}

// ---- memory

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    use_runtime();
    void* data = bytes ? std::malloc(bytes) : nullptr;
    return {data, data, &std::free, c10::Device(kDevice, current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Memory memory;
REGISTER_ALLOCATOR(kDevice, &memory);

void choose(c10::Device device) {
  use_runtime();
  TORCH_CHECK(device.index() < kDevices, "there are ", int(kDevices), " devices, not ", device);
  current = device.has_index() ? device.index() : current;
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kDevice; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const auto before = getDevice();
    choose(device);
    return before;
  }
  c10::Device getDevice() const override { return c10::Device(kDevice, current); }
  void setDevice(c10::Device device) const override { choose(device); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current = device.index(); }
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto data = memory.allocate(bytes);
    std::memcpy(data.get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(data));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};

// ---- operators

at::Tensor empty(
    c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(*device);
  const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(size, &memory, keys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool>) {
  const c10::DeviceGuard guard(*device);
  const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(size, stride, &memory, keys, c10::dtype_or_default(dtype));
}

// A CPU tensor on the same memory.
at::Tensor on_cpu(const at::Tensor& x) {
  if (x.device().type() != kDevice) return x;
  auto* data = const_cast<void*>(x.storage().data());
  auto storage = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), x.storage().nbytes(), c10::DataPtr(data, c10::Device(c10::kCPU)), nullptr,
      false);
  const c10::DispatchKeySet keys(c10::DispatchKey::CPU);
  auto y = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), keys, x.dtype());
  y.unsafeGetTensorImpl()->set_sizes_and_strides(x.sizes(), x.strides(), x.storage_offset());
  return y;
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar local_scalar_dense(const at::Tensor& x) { return on_cpu(x).item(); }

void require_device(const std::string& name, const at::Tensor& x) {
  const bool fits = !x.defined() || x.device().type() == kDevice || x.dim() == 0;
  TORCH_CHECK(fits, name, ": a CPU tensor among tensors of the device");
}

void fallback(const c10::OperatorHandle& op, c10::Stack* stack) {
  const auto name = toString(op.operator_name());
  if (!in_graph) ++eager[name];
  for (const auto& value : torch::jit::last(stack, op.schema().arguments().size())) {
    if (value.isTensor()) require_device(name, value.toTensor());
    if (value.isTensorList()) {
      for (const at::Tensor& x : value.toTensorVector()) require_device(name, x);
    }
    if (value.isOptionalTensorList()) {
      for (const std::optional<at::Tensor>& x : value.toOptionalTensorList()) {
        if (x) require_device(name, *x);
      }
    }
  }
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("alias", &at::native::alias);
  m.impl("resize_", &at::native::resize_);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar_dense);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

// ---- process group

using Tensors = std::vector<at::Tensor>;
using Work = c10::intrusive_ptr<c10d::Work>;

// Collectives over tensors of the device, and nothing else, by gloo.
class Group final : public c10d::Backend {
 public:
  Group(c10::intrusive_ptr<c10d::Backend> gloo, std::string name)
      : Backend(gloo->getRank(), gloo->getSize()), gloo_(std::move(gloo)), name_(std::move(name)) {
    group_exists = true;
  }

  const std::string getBackendName() const override { return name_; }

  Work allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    auto hosts = to_host(tensors);
    auto work = gloo_->allreduce(hosts, options);
    return finish(work, hosts, tensors);
  }

  Work allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) override {
    auto hosts = to_host(tensors);
    auto work = gloo_->allreduce_coalesced(hosts, options);
    return finish(work, hosts, tensors);
  }

  Work broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    auto hosts = to_host(tensors);
    auto work = gloo_->broadcast(hosts, options);
    return finish(work, hosts, tensors);
  }

  Work _allgather_base(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) override {
    Tensors outputs{output}, inputs{input};
    return allgather_into_tensor_coalesced(outputs, inputs, options);
  }

  Work allgather_into_tensor_coalesced(
      Tensors& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override {
    auto host_outputs = to_host(outputs), host_inputs = to_host(inputs);
    auto work = gloo_->allgather_into_tensor_coalesced(host_outputs, host_inputs, options);
    return finish(work, host_outputs, outputs);
  }

  Work barrier(const c10d::BarrierOptions& options) override { return gloo_->barrier(options); }

 private:
  Tensors to_host(const Tensors& tensors) const {
    Tensors hosts;
    for (const auto& x : tensors) {
      const auto mine = c10::Device(kDevice, current);
      TORCH_CHECK(x.device() == mine, "the process group ", name_, " takes tensors on ", mine, ", not on ", x.device());
      hosts.push_back(on_cpu(x).clone());
    }
    return hosts;
  }

  static Work finish(const Work& work, const Tensors& hosts, const Tensors& tensors) {
    work->wait();
    for (size_t number = 0; number < tensors.size(); ++number) on_cpu(tensors[number]).copy_(hosts[number]);
    return work;
  }

  c10::intrusive_ptr<c10d::Backend> gloo_;
  std::string name_;
};

}  // namespace

PYBIND11_MODULE(neuron_device, m) {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  m.def("make_group", [](c10::intrusive_ptr<c10d::Backend> gloo, std::string name) -> c10::intrusive_ptr<c10d::Backend> {
    return c10::make_intrusive<Group>(std::move(gloo), std::move(name));
  });
  m.def("set_in_graph", [](bool value) { in_graph = value; });
  m.def("eager", [] { return eager; });
  m.def("current_device", [] { return int(current); });
  m.def("device_count", [] { return int(kDevices); });
}
