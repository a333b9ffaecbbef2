// What one call of flash attention on the CPU works on. All pointers outlive the call.
#pragma once

#include <cstdint>

#include "rotary.h"

namespace phi1::cpu {

struct AttentionArgs {
  // (batch, seq, heads, head_dim). The forward pass writes out, the backward reads it and writes the grad_*.
  HeadsTensor q, k, v, out, grad_out, grad_q, grad_k, grad_v;
  float* lse;  // (batch, heads, seqlen_q), contiguous
  int64_t batch, seqlen_q, seqlen_k, heads, kv_heads, head_dim;
  const int32_t* starts_q;  // documents + 1 offsets into the sequence of batch entry 0, or null
  const int32_t* starts_k;
  int64_t documents;
  bool causal;  // query i sees key j if j <= i + seqlen_k - seqlen_q, in each document
  float scale;
  uint32_t dropout_threshold;  // an element is dropped if its random byte is below: 0 is no dropout
  float dropout_scale;
  uint64_t seed;
  DType dtype;
};

}  // namespace phi1::cpu
