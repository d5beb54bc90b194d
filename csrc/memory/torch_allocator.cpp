// PyTorch's large blocks on a CPU from our heap. A library of its own, because it is compiled for one version of PyTorch.
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

namespace {

void* (*get)(size_t);
bool (*put)(void*);

void release(void* block) {
  c10::profiledCPUMemoryReporter().Delete(block);
  if (!put(block)) c10::free_cpu(block);
}

// As PyTorch's own, but for where a block comes from.
class LargeBlocks final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t n) override {
    void* block = get(n);
    if (block == nullptr) {
      try {
        block = c10::alloc_cpu(n);
      } catch (c10::Error&) {
        c10::profiledCPUMemoryReporter().OutOfMemory(n);
        throw;
      }
    }
    c10::profiledCPUMemoryReporter().New(block, n);
    return {block, block, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t n) const override { default_copy_data(to, from, n); }
};

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED const char neox_torch_version[] = TORCH_VERSION;

EXPORTED void neox_use_heap(void* (*get_block)(size_t), bool (*put_block)(void*)) {
  get = get_block, put = put_block;
  c10::SetCPUAllocator(new LargeBlocks);
}
