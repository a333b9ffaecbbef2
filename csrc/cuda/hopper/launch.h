// From a call to the launch of a kernel with as many blocks as there are multiprocessors.
#pragma once

#include "cuda/attention_launch.h"
#include "cuda/hopper/schedule.cuh"

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

// Heads whose tensors fit in a section of the L2 cache together: bytes for each `together` of them, `heads` in all.
inline int section_of(int64_t bytes, int64_t together, int64_t heads) {
  const int64_t fit = kSectionBytes / (bytes > 0 ? bytes : 1);
  const int64_t section = (fit > 1 ? fit : 1) * together;
  return int(section < heads ? section : heads);
}

// works: tiles over all heads.
inline void launch_scheduled(const char* name, void (*kernel)(ScheduledArgs), const AttentionArgs& args, int64_t works,
                             int section, int threads, int shared, void* stream,
                             std::initializer_list<Region> regions) {
  if (works > 0x7fffffff)
    throw std::invalid_argument(std::string("CUDA kernel ") + name + ": " + std::to_string(works) +
                                " tiles: must be in 1..2147483647; split the batch");
  const int64_t blocks = works < multiprocessors() ? works : multiprocessors();
  launch(name, kernel, blocks, threads, shared, stream, regions, ScheduledArgs{args, int(works), section});
}

// A list of tiles of queries, over which keys and values are read; of tiles of keys, over which q and grad_out are.
template <typename Sizes>
void launch_queries(const char* name, void (*kernel)(ScheduledArgs), const AttentionArgs& args, void* stream,
                    std::initializer_list<Region> regions) {
  launch_scheduled(name, kernel, args, count_tiles(args, args.seqlen_q, Sizes::kQueries) * args.heads,
                   section_of(4 * args.seqlen_k * args.head_dim, args.heads / args.kv_heads, args.batch * args.heads),
                   Sizes::kThreads, Sizes::kSharedBytes, stream, regions);
}
template <typename Sizes>
void launch_keys(const char* name, void (*kernel)(ScheduledArgs), const AttentionArgs& args, void* stream,
                 std::initializer_list<Region> regions) {
  launch_scheduled(
      name, kernel, args, count_tiles(args, args.seqlen_k, Sizes::kKeys) * args.kv_heads,
      section_of(4 * args.seqlen_q * args.head_dim * args.heads / args.kv_heads, 1, args.batch * args.kv_heads),
      Sizes::kThreads, Sizes::kSharedBytes, stream, regions);
}

}  // namespace phi1::cuda::hopper
