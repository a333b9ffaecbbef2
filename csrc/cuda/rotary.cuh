// Partial rotary embedding, q and k in one launch.
//
// A warp turns one head: half <= 64 lanes' worth of pairs, 32 at a time; a block of 8 warps takes 8 heads of
// q and k of one token after another, so that cos and sin of the token (half floats each) come from L1.
// Traffic for phi-1 (32 + 32 heads of 64, bf16): 16 KiB a token in and out, against 128 B of tables: bound by
// memory, 0.75 floating-point operations a byte. In place only 2 * half of head_dim elements move: 8 KiB.
// No shared memory; registers in bench/results/ptxas.md.
#pragma once

#include "cuda/ptx.cuh"
#include "rotary.h"

namespace phi1::cuda {

constexpr int kRotaryWarps = 8;

// grid: (batch * seq); block: 32 * kRotaryWarps threads.
template <typename T>
__global__ void __launch_bounds__(32 * kRotaryWarps) rotary_kernel(const __grid_constant__ RotaryArgs args) {
  const int64_t b = block_index() / args.seq, t = block_index() % args.seq;
  const int64_t row = args.position ? ld_global(args.position + b * args.position_batch_stride + t) : t;
  const float *cos = args.cos + row * args.half, *sin = args.sin + row * args.half;
  const float sign = args.inverse ? -1.0f : 1.0f;
  for (int64_t head = warp_index(); head < args.heads[0] + args.heads[1]; head += kRotaryWarps) {
    const int which = head >= args.heads[0];
    const int64_t h = which ? head - args.heads[0] : head;
    const HeadsTensor &from = args.in[which], &to = args.out[which];
    const T* in = static_cast<const T*>(from.data) + b * from.batch_stride + t * from.seq_stride + h * from.head_stride;
    T* out = static_cast<T*>(to.data) + b * to.batch_stride + t * to.seq_stride + h * to.head_stride;
    for (int i = lane_index(); i < args.half; i += 32) {
      const float x = to_float(ld_global(in + i)), y = to_float(ld_global(in + i + args.half));
      const float c = ld_global(cos + i), s = sign * ld_global(sin + i);
      st_global(out + i, from_float<T>(x * c - y * s));
      st_global(out + i + args.half, from_float<T>(y * c + x * s));
    }
    if (in != out)
      for (int64_t i = 2 * args.half + lane_index(); i < args.head_dim; i += 32) st_global(out + i, ld_global(in + i));
  }
}

}  // namespace phi1::cuda
