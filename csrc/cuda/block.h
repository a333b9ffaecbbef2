// What the parallel block's kernels beside the matrix products work on. Rows start at multiples of 16 bytes, and each
// width, head_dim / 2 and half is a multiple of 8 elements.
#pragma once

#include <cstdint>

#include "rotary.h"

namespace phi1::cuda {

// After the product with W_in: z's rows are [q | k | v | u], see kernels/fused_block.py.
struct AfterInArgs {
  void* z;           // (batch * seq, width)
  const void* bias;  // (width)
  void* activated;   // (batch * seq, inner), rows activated_stride apart: gelu(u + bias)
  int64_t activated_stride;
  int64_t batch, seq, turned_heads, head_dim, half;  // turned_heads: of q and k
  int64_t width, inner;
  const float *cos, *sin;   // (table_rows, half)
  const int64_t* position;  // null, or the row of the table for each token
  int64_t position_batch_stride, table_rows;
  // The backward pass: the gradient of the turned q, k and of v becomes that of z, activated's gradient becomes
  // activated.
  void* grad_z;     // (batch * seq, width)
  void* grad_bias;  // (width)
  float* partial;   // scratch: (chunks, width), sums over a chunk's rows
  int64_t chunks;
  DType dtype;
};

// After the product with W_out: h = x + dropout(h + bias), in place.
struct ResidualArgs {
  void* h;  // (rows, columns); in the backward pass the gradient of the product, from grad_y
  const void *x, *bias;
  const void* grad_y;
  void* grad_bias;  // (columns)
  float* partial;   // scratch: (chunks, columns)
  int64_t rows, columns, chunks;
  uint32_t dropout_threshold;  // an element is dropped if its random byte is below: 0 is no dropout
  float dropout_scale;
  uint64_t seed;
  DType dtype;
};

// Adds up the chunks of either, or of the cross-entropy.
struct BlockSumArgs {
  const float* partial;  // (chunks, columns)
  void* sum;             // (columns)
  int64_t chunks, columns;
};

}  // namespace phi1::cuda
