// Errors of a launch, with the kernel's name.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace phi1::cuda {

// gridDim.x holds at most 2^31 - 1 blocks.
inline void check_grid(const char* kernel, const char* what, int64_t blocks) {
  if (blocks < 1 || blocks > 0x7fffffff)
    throw std::invalid_argument(std::string(kernel) + ": " + what + " = " + std::to_string(blocks) +
                                ": must be in 1..2147483647; split the batch");
}

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("CUDA kernel ") + kernel + ": " + cudaGetErrorName(error) + ": " +
                             cudaGetErrorString(error));
}

}  // namespace phi1::cuda
