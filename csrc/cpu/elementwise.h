// What the CPU kernels beside the matrix products work on. All pointers outlive the call; rows are contiguous.
#pragma once

#include <cstdint>

#include "rotary.h"

namespace phi1::cpu {

// LayerNorm of `rows` rows, x_stride elements apart. stats: of each row (mean, 1 / sqrt(variance + eps)).
struct LayerNormArgs {
  const void *x, *weight, *bias;
  void* y;  // (rows, hidden); in the backward pass the gradient of x
  float* stats;
  int64_t rows, hidden, x_stride;
  float eps;
  // The backward pass:
  const void* grad_y;    // (rows, hidden)
  const void* residual;  // (rows, hidden) or null: added to the gradient of x
  void *grad_weight, *grad_bias;
  DType dtype;
};

// After the product with W_in: z's rows are [q | k | v | u], see kernels/block.py.
struct AfterInArgs {
  void* z;           // (batch * seq, width)
  const void* bias;  // (width)
  void* activated;   // (batch * seq, inner), rows activated_stride apart: gelu(u + bias)
  int64_t activated_stride;
  int64_t batch, seq, turned_heads, head_dim, half;  // turned_heads: of q and k
  int64_t width, inner;
  const float *cos, *sin;
  const int64_t* position;  // null, or the row of the table for each token
  int64_t position_batch_stride;
  // The backward pass: the gradient of the turned q, k and of v becomes that of z, activated's gradient becomes
  // activated.
  void* grad_z;     // (batch * seq, width)
  void* grad_bias;  // (width)
  DType dtype;
};

// After the product with W_out: h = x + dropout(h + bias), in place.
struct ResidualArgs {
  void* h;  // (rows, columns); in the backward pass the gradient of the product, from grad_y
  const void *x, *bias;
  const void* grad_y;
  void* grad_bias;  // (columns)
  int64_t rows, columns;
  uint32_t dropout_threshold;  // an element is dropped if its random byte is below: 0 is no dropout
  float dropout_scale;
  uint64_t seed;
  DType dtype;
};

// Cross-entropy of softmax(logits + bias) against targets, plus z_loss times the squared log-sum-exp; with gradients,
// logits become their gradient, softmax (1 + 2 z_loss lse) - one-hot.
struct CrossEntropyArgs {
  void* logits;      // (rows, columns)
  const void* bias;  // (columns)
  const int64_t* targets;
  int64_t rows, columns, ignore_index;
  float z_loss;
  float* loss;       // (rows): 0 where the target is ignore_index
  float* grad_bias;  // (columns), added to; null: no gradients
  DType dtype;
};

// sum += product, over the chunks of rows whose products make a gradient. The sum has float32's bits and no more memory
// than the gradient and as much again: its upper half stands where the gradient will.
struct AddProductArgs {
  uint16_t *high, *low;  // (count) each; high: in the end the sum rounded to dtype
  const void* product;   // (count)
  int64_t count;
  bool first, last;  // nothing to add to; nothing to come
  DType dtype;       // of 16 bits
};

}  // namespace phi1::cpu
