// LayerNorm on a GPU: what one call works on.
#pragma once

#include <cstdint>

#include "rotary.h"

namespace phi1::cuda {

struct LayerNormArgs {
  const void *x, *weight, *bias;  // (rows, hidden) with x_stride elements between rows; (hidden,)
  void* y;                        // (rows, hidden), contiguous; the backward's gradient of x
  float* stats;                   // (rows, 2): mean, 1 / sqrt(variance + eps)
  const void* grad_y;             // (rows, hidden), contiguous; backward only
  const void* residual;           // (rows, hidden), contiguous, or null: added to the gradient of x
  void *grad_weight, *grad_bias;  // (hidden,)
  float* partial;                 // scratch: (chunks, 2, hidden), sums over a chunk's rows
  int64_t rows, hidden, x_stride, chunks;
  float eps;
  DType dtype;
};

}  // namespace phi1::cuda
