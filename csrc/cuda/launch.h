// Launches a kernel, on the GPU or under the emulator, and raises its errors with the kernel's name.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#if defined(PHI1_EMULATOR)
#include "emulator/emulator.h"
#else
#include <cuda_runtime.h>
#endif

#include "arguments.h"
#include "cuda/ptx.cuh"

namespace phi1::cuda {

// Global memory that a kernel may touch: the emulator holds the kernel to it.
struct Region {
  const void* begin;
  int64_t bytes;
};

// The bytes from the first to the last element of a (batch, seq, heads, head_dim) tensor.
inline Region heads_region(const HeadsTensor& x, int64_t batch, int64_t seq, int64_t heads, int64_t head_dim,
                           int64_t element) {
  if (batch * seq * heads == 0) return {x.data, 0};
  const int64_t last = (batch - 1) * x.batch_stride + (seq - 1) * x.seq_stride + (heads - 1) * x.head_stride;
  return {x.data, (last + head_dim) * element};
}

// Of attention's arguments, or the residual's.
template <typename Args>
Region seed_region(const Args& args) {
  return {args.seed_memory, args.seed_memory ? 8 : 0};
}

inline int64_t blocks_for(int64_t work, int64_t per_block) { return (work + per_block - 1) / per_block; }

// Calls f with a value of the C++ type that dtype names.
template <typename F>
void with_type(DType dtype, F f) {
#if defined(PHI1_ONE_INSTANCE)  // builds of mutated kernels
  if (dtype != DType::bf16) throw std::invalid_argument("this build has bfloat16 only");
  f(bf16{});
#else
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::bf16: return f(bf16{});
    case DType::f16: return f(f16{});
  }
#endif
}

// Runs kernel(args) on `blocks` blocks of `threads` threads with `shared` bytes of dynamic shared memory.
template <typename Args>
void launch(const char* name, void (*kernel)(Args), int64_t blocks, int threads, int shared, void* stream,
            std::initializer_list<Region> regions, const Args& args) {
  if (blocks < 1 || blocks > 0x7fffffff)  // the limit of gridDim.x
    throw std::invalid_argument(std::string("CUDA kernel ") + name + ": " + std::to_string(blocks) +
                                " blocks: must be in 1..2147483647; split the batch");
#if defined(PHI1_EMULATOR)
  (void)stream;
  emulator::Launch launch{name, int(blocks), threads, shared, {}};
  for (const Region& region : regions) launch.regions.push_back({region.begin, region.bytes});
  emulator::run(launch, [&] { kernel(args); });
#else
  (void)regions;
  cudaError_t error = cudaSuccess;
  if (shared > 48 * 1024)  // more than 48 KiB must be asked for
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 shared);
  if (error == cudaSuccess) {
    void* parameters[] = {const_cast<Args*>(&args)};
    error = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(unsigned(blocks)), dim3(unsigned(threads)),
                             parameters, size_t(shared), static_cast<cudaStream_t>(stream));
  }
  if (error != cudaSuccess) {
    cudaGetLastError();  // not sticky: leave a clean state behind
    throw std::runtime_error(std::string("CUDA kernel ") + name + ": " + cudaGetErrorName(error) + ": " +
                             cudaGetErrorString(error));
  }
#endif
}

}  // namespace phi1::cuda
