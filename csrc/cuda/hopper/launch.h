// From a call to the launch of a kernel with as many blocks as there are multiprocessors.
#pragma once

#include "cuda/attention_launch.h"

namespace phi1::cuda::hopper {

// Calls f(element type, Constant<head_dim>).
template <typename F>
void dispatch(const AttentionArgs& args, F f) {
#if defined(PHI1_ONE_INSTANCE)  // builds of mutated kernels: bf16, head_dim 64
  if (args.dtype == DType::bf16 && args.head_dim == 64) return f(bf16{}, Constant<64>{});
#else
  const auto with_dim = [&](auto element) {
    switch (args.head_dim) {
      case 64: return f(element, Constant<64>{});
      case 128: return f(element, Constant<128>{});
    }
    throw std::invalid_argument("attention: head_dim = " + std::to_string(args.head_dim) +
                                ": the hopper kernels are made for 64 and 128; take the mma kernels");
  };
  if (args.dtype == DType::bf16) return with_dim(bf16{});
  if (args.dtype == DType::f16) return with_dim(f16{});
#endif
  throw std::invalid_argument("attention: dtype code " + std::to_string(int(args.dtype)) + ": must be bf16 or fp16");
}

// Of the current device. Under the emulator few, so that a block works on several tiles.
inline int multiprocessors() {
#if defined(PHI1_EMULATOR)
  return 3;
#else
  int device = 0, count = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
  return count;
#endif
}

// Runs a kernel over a list of tiles.
inline void launch_list(const char* name, void (*kernel)(ScheduledArgs), const ScheduledArgs& scheduled, int threads,
                        int shared, void* stream, std::initializer_list<Region> regions) {
  launch(name, kernel, scheduled.works < multiprocessors() ? scheduled.works : multiprocessors(), threads, shared,
         stream, regions, scheduled);
}

template <typename Sizes>
void launch_queries(const char* name, void (*kernel)(ScheduledArgs), const AttentionArgs& args, void* stream,
                    std::initializer_list<Region> regions) {
  launch_list(name, kernel, schedule_queries(name, args, Sizes::kQueries), Sizes::kThreads, Sizes::kSharedBytes, stream,
              regions);
}
template <typename Sizes>
void launch_keys(const char* name, void (*kernel)(ScheduledArgs), const AttentionArgs& args, void* stream,
                 std::initializer_list<Region> regions) {
  launch_list(name, kernel, schedule_keys(name, args, Sizes::kKeys), Sizes::kThreads, Sizes::kSharedBytes, stream,
              regions);
}

}  // namespace phi1::cuda::hopper
