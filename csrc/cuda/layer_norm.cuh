// LayerNorm, forward and backward; the gradients of weight and bias without atomics.
//
// Forward and the gradient of x: a warp for each row, 16 bytes a lane, three (two) passes over the row. At hidden 2,048
// in bf16 a row is 4 KiB and stays in the L1 cache between passes, so that global memory sees it once: 8 bytes moved
// for 9 operations an element forward, bound by memory. Blocks of 4 warps, no shared memory.
// Gradients of weight and bias: a block sums 64 columns over one chunk of the rows, 16 rows at a time, lanes of 8
// columns each (runs of 128 bytes); its 16 sums of a column are added up in shared memory, 9 KiB. A second kernel adds
// up the chunks, in order: the result is the same each time.
#pragma once

#include "arguments.h"
#include "cuda/eight.cuh"
#include "cuda/ptx.cuh"

namespace phi1::cuda {

constexpr int kNormThreads = 128, kNormWarps = kNormThreads / 32;
constexpr int kNormColumns = 64, kNormRows = kNormThreads / (kNormColumns / 8);
constexpr int kNormPitch = kNormColumns + 8;  // words between rows of sums: 4 rows of 8 lanes lie in 32 banks
constexpr int kNormSharedBytes = 2 * kNormRows * kNormPitch * 4;

PHI1_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += shfl_xor(x, mask);
  return x;
}

// grid: rows / kNormWarps, rounded up; block: kNormThreads.
template <typename T>
__global__ void __launch_bounds__(kNormThreads) layer_norm_kernel(const __grid_constant__ LayerNormArgs args) {
  const int64_t row = int64_t(block_index()) * kNormWarps + warp_index();
  if (row >= args.rows) return;  // a whole warp
  const T *x = static_cast<const T*>(args.x) + row * args.x_stride, *weight = static_cast<const T*>(args.weight),
          *bias = static_cast<const T*>(args.bias);
  T* y = static_cast<T*>(args.y) + row * args.hidden;
  const int first = 8 * lane_index(), hidden = int(args.hidden);

  float sum = 0.0f, squares = 0.0f, v[8];
  for (int i = first; i < hidden; i += 256) {
    ld_global_8(v, x + i);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum += v[j];
  }
  const float mean = warp_sum(sum) / float(hidden);
  for (int i = first; i < hidden; i += 256) {
    ld_global_8(v, x + i);
#pragma unroll
    for (int j = 0; j < 8; ++j) squares += (v[j] - mean) * (v[j] - mean);
  }
  const float factor = 1.0f / sqrt_f32(warp_sum(squares) / float(hidden) + args.eps);
  for (int i = first; i < hidden; i += 256) {
    float w[8], b[8];
    ld_global_8(v, x + i);
    ld_global_8(w, weight + i);
    ld_global_8(b, bias + i);
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = (v[j] - mean) * factor * w[j] + b[j];
    st_global_8(y + i, v);
  }
  if (lane_index() == 0) st_global(reinterpret_cast<Float2*>(args.stats) + row, Float2{mean, factor});
}

// Gradient of x, into args.y: with n = (x - mean) factor and d = grad_y weight, factor (d - mean(d) - n mean(d n)),
// plus args.residual where there is one.
template <typename T>
__global__ void __launch_bounds__(kNormThreads) layer_norm_grad_kernel(const __grid_constant__ LayerNormArgs args) {
  const int64_t row = int64_t(block_index()) * kNormWarps + warp_index();
  if (row >= args.rows) return;
  const T *x = static_cast<const T*>(args.x) + row * args.x_stride, *weight = static_cast<const T*>(args.weight);
  const T* grad = static_cast<const T*>(args.grad_y) + row * args.hidden;
  const T* residual = args.residual ? static_cast<const T*>(args.residual) + row * args.hidden : nullptr;
  T* to = static_cast<T*>(args.y) + row * args.hidden;
  const Float2 stats = ld_global(reinterpret_cast<const Float2*>(args.stats) + row);
  const int first = 8 * lane_index(), hidden = int(args.hidden);

  float v[8], d[8], w[8], sum = 0.0f, sum_n = 0.0f;
  const auto load = [&](int i) {  // v: n, d: grad_y weight
    ld_global_8(v, x + i);
    ld_global_8(d, grad + i);
    ld_global_8(w, weight + i);
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = (v[j] - stats.x) * stats.y, d[j] *= w[j];
  };
  for (int i = first; i < hidden; i += 256) {
    load(i);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum += d[j], sum_n += d[j] * v[j];
  }
  const float mean_d = warp_sum(sum) / float(hidden), mean_dn = warp_sum(sum_n) / float(hidden);
  for (int i = first; i < hidden; i += 256) {
    load(i);
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = stats.y * (d[j] - mean_d - v[j] * mean_dn);
    if (residual) {
      ld_global_8(d, residual + i);
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] += d[j];
    }
    st_global_8(to + i, v);
  }
}

// Sums of grad_y n and grad_y over the rows of one chunk. grid: hidden / kNormColumns rounded up, times chunks.
template <typename T>
__global__ void __launch_bounds__(kNormThreads) layer_norm_partial_kernel(const __grid_constant__ LayerNormArgs args) {
  const int strips = int((args.hidden + kNormColumns - 1) / kNormColumns);
  const int strip = block_index() % strips, chunk = block_index() / strips;
  const int64_t per_chunk = (args.rows + args.chunks - 1) / args.chunks, begin = chunk * per_chunk;
  const int64_t end = begin + per_chunk < args.rows ? begin + per_chunk : args.rows;
  const int lane = thread_index() % (kNormColumns / 8), part = thread_index() / (kNormColumns / 8);
  const int64_t column = strip * kNormColumns + 8 * lane;

  float sums[2][8] = {};
  if (column < args.hidden)
    for (int64_t row = begin + part; row < end; row += kNormRows) {
      const Float2 stats = ld_global(reinterpret_cast<const Float2*>(args.stats) + row);
      float v[8], d[8];
      ld_global_8(v, static_cast<const T*>(args.x) + row * args.x_stride + column);
      ld_global_8(d, static_cast<const T*>(args.grad_y) + row * args.hidden + column);
#pragma unroll
      for (int j = 0; j < 8; ++j) sums[0][j] += d[j] * (v[j] - stats.x) * stats.y, sums[1][j] += d[j];
    }
  const auto place = [](int which, int part, int lane, int j) {
    return shared_base() + uint32_t(((which * kNormRows + part) * kNormPitch + 8 * j + lane) * 4);
  };
#pragma unroll
  for (int which = 0; which < 2; ++which)
#pragma unroll
    for (int j = 0; j < 8; ++j) st_shared_4(place(which, part, lane, j), float_to_bits(sums[which][j]));
  bar_sync();
  // Now a thread adds up one column of one of the two.
  const int which = thread_index() / kNormColumns, at = thread_index() % kNormColumns;
  float total = 0.0f;
#pragma unroll
  for (int p = 0; p < kNormRows; ++p) total += bits_to_float(ld_shared_4(place(which, p, at / 8, at % 8)));
  if (strip * kNormColumns + at < args.hidden)
    st_global(args.partial + (int64_t(chunk) * 2 + which) * args.hidden + strip * kNormColumns + at, total);
}

// Adds up the chunks. grid: 2 hidden / kNormThreads, rounded up.
template <typename T>
__global__ void __launch_bounds__(kNormThreads) layer_norm_sum_kernel(const __grid_constant__ LayerNormArgs args) {
  const int64_t i = int64_t(block_index()) * kNormThreads + thread_index();
  if (i >= 2 * args.hidden) return;
  float total = 0.0f;
  for (int64_t chunk = 0; chunk < args.chunks; ++chunk) total += ld_global(args.partial + chunk * 2 * args.hidden + i);
  T* to = static_cast<T*>(i < args.hidden ? args.grad_weight : args.grad_bias);
  st_global(to + i % args.hidden, from_float<T>(total));
}

}  // namespace phi1::cuda
