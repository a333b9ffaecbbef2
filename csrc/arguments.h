// What one call of a kernel works on, on the CPU and on a GPU. All memory outlives the call. What only one of the two
// has is null or zero for the other.
#pragma once

#include <cstdint>

namespace phi1 {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// The MLP's, in the order of kernels/reference.py's ACTIVATIONS.
enum class Activation : int { gelu_new = 0, relu2 = 1 };

// A (batch, seq, heads, head_dim) tensor: element strides, the last dim contiguous.
struct HeadsTensor {
  void* data;
  int64_t batch_stride, seq_stride, head_stride;
};

// Partial rotary embedding.
struct RotaryArgs {
  HeadsTensor in[2], out[2];  // q and k; out may be in (in place)
  int64_t heads[2];
  int64_t batch, seq, head_dim;
  int64_t half;      // rotary_dim / 2: dim i turns with dim i + half
  const float* cos;  // (positions, half), contiguous
  const float* sin;
  const int64_t* position;  // row of the table per token, or null: the index in the sequence
  int64_t position_batch_stride;
  bool inverse;  // turn by the negative angle: the gradient
  DType dtype;
};

// Flash attention. On a GPU all tensors start at multiples of 16 bytes, their strides are multiples of 8 elements, and
// scale is positive.
struct AttentionArgs {
  HeadsTensor q, k, v, out;                      // the forward pass writes out, the backward reads it
  HeadsTensor grad_out, grad_q, grad_k, grad_v;  // backward only
  float* lse;                                    // (batch, heads, seqlen_q), natural logarithm
  float* row_stats;  // a GPU's backward: scratch, (batch, heads, seqlen_q, 2), see attention_backward.cuh
  int64_t batch, seqlen_q, seqlen_k, heads, kv_heads, head_dim;
  const int32_t *cu_seqlens_q, *cu_seqlens_k;  // (documents + 1) offsets each, batch being 1; or null
  int64_t documents;
  bool causal;  // query i sees key j if j <= i + seqlen_k - seqlen_q, in each document
  float scale;
  uint32_t dropout_threshold;  // elements whose random byte is below it are dropped; 0: no dropout
  float dropout_scale;         // what kept elements are multiplied by
  uint64_t seed;
  const uint64_t* seed_memory;  // a GPU's: where the seed is instead, or null
  DType dtype;
};

// LayerNorm.
struct LayerNormArgs {
  const void *x, *weight, *bias;  // (rows, hidden) with x_stride elements between rows; (hidden,)
  void* y;                        // (rows, hidden), contiguous; the backward's gradient of x
  float* stats;                   // (rows, 2): mean, 1 / sqrt(variance + eps)
  const void* grad_y;             // (rows, hidden), contiguous; backward only
  const void* residual;           // (rows, hidden), contiguous, or null: added to the gradient of x
  void *grad_weight, *grad_bias;  // (hidden,)
  float* partial;                 // a GPU's scratch: (chunks, 2, hidden), sums over a chunk's rows
  int64_t rows, hidden, x_stride, chunks;
  float eps;
  DType dtype;
};

// After the block's product with W_in: z's rows are [q | k | v | u], see kernels/fused_block.py. On a GPU rows start at
// multiples of 16 bytes, and each width, head_dim / 2 and half is a multiple of 8 elements; so in ResidualArgs.
struct AfterInArgs {
  void* z;           // (batch * seq, width)
  const void* bias;  // (width)
  void* activated;   // (batch * seq, inner), rows activated_stride apart: activation(u + bias)
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
  float* partial;   // a GPU's scratch: (chunks, width), sums over a chunk's rows
  int64_t chunks;
  Activation activation;
  DType dtype;
};

// After the block's product with W_out: h = x + dropout(h + bias), in place.
struct ResidualArgs {
  void* h;  // (rows, columns); in the backward pass the gradient of the product, from grad_y
  const void *x, *bias;
  const void* grad_y;
  void* grad_bias;  // (columns)
  float* partial;   // a GPU's scratch: (chunks, columns)
  int64_t rows, columns, chunks;
  uint32_t dropout_threshold;  // as in AttentionArgs
  float dropout_scale;
  uint64_t seed;
  const uint64_t* seed_memory;
  DType dtype;
};

// Cross-entropy of softmax(logits + bias) against targets, plus z_loss times the squared log-sum-exp, of a chunk of
// rows. With gradients logits become softmax (1 + 2 z_loss lse) - one-hot. On a GPU columns is a multiple of 8, logits,
// bias and partial start at multiples of 16 bytes.
struct CrossEntropyArgs {
  void* logits;      // (rows, columns), on a CPU (columns, rows); contiguous
  const void* bias;  // (columns)
  const int64_t*
      targets;  // (rows): a column, or ignore_index; on a GPU any other makes the row's loss and gradient NaN
  float* loss;  // (rows): 0 where the target is ignore_index
  float*
      stats;  // a GPU's: (rows, 2): greatest logit, what exp(logit - greatest) is multiplied with; not of ignored rows
  float*
      bias_sums;  // (chunks, columns), of a CPU one: the gradient's sums over rows are added to it; null: no gradients
  int64_t rows, columns, chunks, ignore_index;
  float z_loss;
  DType dtype;
};

// sum += product, over the chunks of rows whose products make a gradient; on the CPU. The sum has float32's bits and no
// more memory than the gradient and as much again: its upper half stands where the gradient will.
struct AddProductArgs {
  uint16_t *high, *low;  // (count) each; high: in the end the sum rounded to dtype
  const void* product;   // (count)
  int64_t count;
  bool first, last;  // nothing to add to; nothing to come
  DType dtype;       // of 16 bits
};

// y = x W^T for a few rows of x, sums in float32; on the CPU.
struct ProductArgs {
  const void* x;       // (rows, width), rows x_stride apart
  const void* weight;  // (columns, width), rows weight_stride apart
  void* y;             // (rows, columns)
  int64_t rows, columns, width, x_stride, weight_stride;
  DType dtype;  // of all three
};

}  // namespace phi1
