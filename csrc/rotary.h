// Partial rotary embedding: what one call works on, shared by the CPU and the CUDA kernel.
#pragma once

#include <cstdint>

namespace phi1 {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// A (batch, seq, heads, head_dim) tensor: element strides, the last dim contiguous.
struct HeadsTensor {
  void* data;
  int64_t batch_stride, seq_stride, head_stride;
};

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

}  // namespace phi1
