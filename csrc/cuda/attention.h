// Flash attention on a GPU: what one call works on.
#pragma once

#include <cstdint>

#include "rotary.h"

namespace phi1::cuda {

struct AttentionArgs {
  HeadsTensor q, k, v, out;                      // all 16-byte aligned, strides multiples of 8 elements
  HeadsTensor grad_out, grad_q, grad_k, grad_v;  // backward only
  float* lse;                                    // (batch, heads, seqlen_q), natural logarithm
  float* row_stats;  // backward's scratch: (batch, heads, seqlen_q, 2), see attention_backward.cuh
  int64_t batch, seqlen_q, seqlen_k, heads, kv_heads, head_dim;
  const int32_t *cu_seqlens_q, *cu_seqlens_k;  // (documents + 1) offsets each, batch being 1; or null
  int64_t documents;
  float scale;                 // > 0
  uint32_t dropout_threshold;  // elements whose random byte is below it are dropped; 0: no dropout
  float dropout_scale;         // what kept elements are multiplied by
  uint64_t dropout_seed;
  bool causal;
  DType dtype;
};

}  // namespace phi1::cuda
