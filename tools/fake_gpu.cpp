// Answers what torch asks a GPU before it computes a gradient. fake_gpu.py compiles this file and
// loads it before torch: then tensors without content can be "on cuda".

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

// Autograd runs each step of the backward pass on the stream of its forward pass.
struct FakeGuard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  static c10::Device device() {
    return c10::Device(c10::DeviceType::CUDA, 0);
  }
  static c10::Stream stream() {
    return c10::Stream(c10::Stream::DEFAULT, device());
  }
  c10::Device getDevice() const override {
    return device();
  }
  c10::Device exchangeDevice(c10::Device) const override {
    return device();
  }
  c10::Stream getStream(c10::Device) const noexcept override {
    return stream();
  }
  c10::Stream exchangeStream(c10::Stream) const noexcept override {
    return stream();
  }
};

namespace at {

// torch asks these hooks whether there is an accelerator, and which device is current. It finds
// them by this name.
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  bool hasCUDA() const override {
    return true;
  }
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  void init() const override {}
  bool hasPrimaryContext(DeviceIndex) const override {
    return true;
  }
  int getNumGPUs() const override {
    return 1;
  }
  DeviceIndex deviceCount() const override {
    return 1;
  }
  DeviceIndex current_device() const override {
    return 0;
  }
  DeviceIndex getCurrentDevice() const override {
    return 0;
  }
  DeviceIndex exchangeDevice(DeviceIndex) const override {
    return 0;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override {
    return 0;
  }
  void setCurrentDevice(DeviceIndex) const override {}
};

REGISTER_CUDA_HOOKS(CUDAHooks);

}  // namespace at

static FakeGuard guard;

extern "C" void install() {
  c10::impl::device_guard_impl_registry[static_cast<size_t>(c10::DeviceType::CUDA)].store(&guard);
}
