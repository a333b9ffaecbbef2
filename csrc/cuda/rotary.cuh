// Partial rotary embedding, q and k in one launch.
//
// Traffic for phi-1 (32 + 32 heads of 64, bf16): 16 KiB a token in and out, against 128 B of tables: bound by
// memory, 0.75 floating-point operations a byte. In place only 2 * half of head_dim elements move: 8 KiB.
// Two kernels: one moves 16 bytes a lane, where rows allow it; the other takes what remains (an odd half, rows that
// start anywhere) element by element, at a quarter of the speed (18% of a copy's rate at phi-1's shape on an H200).
// No shared memory; registers in bench/results/ptxas.md.
#pragma once

#include "arguments.h"
#include "cuda/eight.cuh"
#include "cuda/ptx.cuh"

namespace phi1::cuda {

constexpr int kRotaryWarps = 8, kRotaryThreads = 32 * kRotaryWarps;

// Turns the pairs (a, b) by the angles of cos and sin, with sign -1 back.
PHI1_DEVICE void turn(float (&a)[8], float (&b)[8], const float* cos, const float* sin, float sign) {
  float c[8], s[8];
  ld_global_8(c, cos);
  ld_global_8(s, sin);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float x = a[j], y = b[j], z = sign * s[j];
    a[j] = x * c[j] - y * z;
    b[j] = y * c[j] + x * z;
  }
}

PHI1_DEVICE float sign_of(const RotaryArgs& args) { return args.inverse ? -1.0f : 1.0f; }

PHI1_DEVICE int64_t table_row(const RotaryArgs& args, int64_t b, int64_t t) {
  return args.position ? ld_global(args.position + b * args.position_batch_stride + t) : t;
}

// A thread has two runs of eight elements of a head, which turn together, or are both past the turned ones: half is a
// multiple of 8, head_dim of 16, every row starts at a multiple of 16 bytes.
// grid: batch * seq * heads * head_dim / 16 threads in blocks of kRotaryThreads; a token's heads are neighbours, so
// that its cos and sin come from L1.
template <typename T>
__global__ void __launch_bounds__(kRotaryThreads) rotary_runs_kernel(const __grid_constant__ RotaryArgs args) {
  const int per_head = int(args.head_dim) / 16, per_token = int(args.heads[0] + args.heads[1]) * per_head;
  const int64_t index = int64_t(block_index()) * kRotaryThreads + thread_index(), token = index / per_token;
  const int unit = int(index - token * per_token), head = unit / per_head, i = unit % per_head * 8;
  const int64_t b = token / args.seq, t = token - b * args.seq;
  if (b >= args.batch) return;
  const int which = head >= args.heads[0], h = which ? head - int(args.heads[0]) : head, half = int(args.half);
  const HeadsTensor &from = args.in[which], &to = args.out[which];
  const T* in = static_cast<const T*>(from.data) + b * from.batch_stride + t * from.seq_stride + h * from.head_stride;
  T* out = static_cast<T*>(to.data) + b * to.batch_stride + t * to.seq_stride + h * to.head_stride;
  const bool turned = i < half;
  if (!turned && in == out) return;
  const int first = turned ? i : half + i, second = first + (turned ? half : (int(args.head_dim) - 2 * half) / 2);
  float x[8], y[8];
  ld_global_8(x, in + first);
  ld_global_8(y, in + second);
  if (turned) {
    const int64_t at = table_row(args, b, t) * half + i;
    turn(x, y, args.cos + at, args.sin + at, sign_of(args));
  }
  st_global_8(out + first, x);
  st_global_8(out + second, y);
}

// A warp turns one head, 32 pairs at a time; a block takes 8 heads of one token after another.
// grid: (batch * seq); block: kRotaryThreads.
template <typename T>
__global__ void __launch_bounds__(kRotaryThreads) rotary_kernel(const __grid_constant__ RotaryArgs args) {
  const int64_t b = block_index() / args.seq, t = block_index() % args.seq;
  const int64_t row = table_row(args, b, t);
  const float *cos = args.cos + row * args.half, *sin = args.sin + row * args.half;
  const float sign = sign_of(args);
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
