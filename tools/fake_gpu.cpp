// Answers what torch asks a GPU before it computes a gradient. fake_gpu.py compiles this file and
// loads it before torch: then tensors without content can be "on cuda".

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

// Autograd runs each step of the backward pass on the stream of its forward pass.
struct FakeGuard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Stream getStream(c10::Device device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
};

namespace at {

// torch asks these hooks whether there is an accelerator. It finds them by this name.
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  bool isBuilt() const override {
    return true;
  }
  bool hasPrimaryContext(DeviceIndex) const override {
    return true;
  }
};

REGISTER_CUDA_HOOKS(CUDAHooks);

}  // namespace at

static FakeGuard guard;

extern "C" void install() {
  c10::impl::device_guard_impl_registry[static_cast<size_t>(c10::DeviceType::CUDA)].store(&guard);
}
