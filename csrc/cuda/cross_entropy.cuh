// Cross-entropy over the logits that the product has just written, and its gradient in their place.
//
// Two passes, every access 16 bytes a lane (32 in float32). Pass 1: a block of 512 threads a row, each with the maximum
// of its columns so far and the sum of exponentials to it, corrected once for 8 columns (9 ex2 for 8); 128 bytes of
// shared memory join the 16 warps. phi-1's chunk of 256 rows x 51,200 columns is 256 blocks of 12.5 turns a thread.
// Pass 2: a block of 128 threads takes 1,024 columns of a part of the rows (16 of those 256, 800 blocks) down the
// rows as block.cuh does: the bias is loaded once and the sums for its gradient stay in registers, so that the gradient
// is not read again for them. The parts are added up after the last chunk: no atomics, a fixed order.
// Bytes moved an element, in bf16: 2 in pass 1, 4 in pass 2, 0.5 for the sums; phi-1: 100 KiB a row for the loss, 325
// KiB with gradients. The chunk's 25 MiB are fewer than the 40 or 50 MB of an A100's or H100's L2 cache, which the
// product leaves them in. Registers in bench/results/ptxas.md.
// (logit - greatest) log2(e) in this order: logits of 1,000 lose nothing.
#pragma once

#include "arguments.h"
#include "cuda/block.cuh"
#include "cuda/eight.cuh"
#include "cuda/ptx.cuh"

namespace phi1::cuda {

constexpr int kLossThreads = 512, kLossWarps = kLossThreads / 32;
constexpr int kLossSharedBytes = kLossWarps * 8;

// e^x.
PHI1_DEVICE float exp_f32(float x) { return ex2(x * 1.44269504088896f); }

// The greatest of some logits and the sum of exp(logit - top) over them; of none the least float and 0, so that logits
// of -inf add nothing and never meet -inf - -inf.
struct Softmax {
  float top = -3.40282347e38f, total = 0.0f;

  PHI1_DEVICE void add(const float (&x)[8]) {
    float highest = top;
#pragma unroll
    for (int j = 0; j < 8; ++j) highest = max_f32(highest, x[j]);
    total *= exp_f32(top - highest);
#pragma unroll
    for (int j = 0; j < 8; ++j) total += exp_f32(x[j] - highest);
    top = highest;
  }

  PHI1_DEVICE void add(float other_top, float other_total) {
    const float highest = max_f32(top, other_top);
    total = total * exp_f32(top - highest) + other_total * exp_f32(other_top - highest);
    top = highest;
  }
};

// Pass 1: loss and stats. grid: rows; block: kLossThreads.
template <typename T>
__global__ void __launch_bounds__(kLossThreads) cross_entropy_kernel(const __grid_constant__ CrossEntropyArgs args) {
  const int64_t row = block_index(), target = ld_global(args.targets + row);
  if (target == args.ignore_index) {  // the whole block
    if (thread_index() == 0) st_global(args.loss + row, 0.0f);
    return;
  }
  const T *logits = static_cast<const T*>(args.logits) + row * args.columns, *bias = static_cast<const T*>(args.bias);
  const int columns = int(args.columns);
  Softmax softmax;
  for (int i = 8 * thread_index(); i < columns; i += 8 * kLossThreads) {
    float x[8], shift[8];
    ld_global_8(x, logits + i);
    ld_global_8(shift, bias + i);
#pragma unroll
    for (int j = 0; j < 8; ++j) x[j] += shift[j];
    softmax.add(x);
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) softmax.add(shfl_xor(softmax.top, mask), shfl_xor(softmax.total, mask));
  const auto place = [](int warp) { return shared_base() + uint32_t(warp * 8); };
  if (lane_index() == 0) {
    st_shared_4(place(warp_index()), float_to_bits(softmax.top));
    st_shared_4(place(warp_index()) + 4, float_to_bits(softmax.total));
  }
  bar_sync();
  if (thread_index() > 0) return;
#pragma unroll
  for (int warp = 1; warp < kLossWarps; ++warp)
    softmax.add(bits_to_float(ld_shared_4(place(warp))), bits_to_float(ld_shared_4(place(warp) + 4)));
  float loss = bits_to_float(0x7fc00000), scale = loss;  // NaN
  if (target >= 0 && target < args.columns) {
    const float logit = to_float(ld_global(logits + target)) + to_float(ld_global(bias + target));
    const float log_total = lg2(softmax.total) * 0.693147180559945f, lse = softmax.top + log_total;
    loss = log_total + (softmax.top - logit) + args.z_loss * lse * lse;
    scale = (1.0f + 2.0f * args.z_loss * lse) / softmax.total;
  }
  st_global(args.loss + row, loss);
  st_global(reinterpret_cast<Float2*>(args.stats) + row, Float2{softmax.top, scale});
}

// Pass 2: softmax - one-hot, and its sums. grid: strips of a row, times chunks; block: kBlockThreads.
template <typename T>
__global__ void __launch_bounds__(kBlockThreads)
    cross_entropy_grad_kernel(const __grid_constant__ CrossEntropyArgs args) {
  const int strips = int((args.columns / 8 + kBlockThreads - 1) / kBlockThreads);
  const int strip = block_index() % strips, index = block_index() / strips;
  const Chunk chunk(args.rows, args.chunks, index);
  const int column = 8 * (strip * kBlockThreads + thread_index());
  if (column >= args.columns) return;
  float shift[8], sum[8];
  ld_global_8(shift, static_cast<const T*>(args.bias) + column);
  float* partial = args.bias_sums + index * args.columns + column;
  ld_global_8(sum, partial);
  for (int row = chunk.begin; row < chunk.end; ++row) {
    T* at = static_cast<T*>(args.logits) + row * args.columns + column;
    const int64_t target = ld_global(args.targets + row);
    float d[8] = {};
    if (target != args.ignore_index) {
      const Float2 stats = ld_global(reinterpret_cast<const Float2*>(args.stats) + row);
      const int hot = int(target - column);
      ld_global_8(d, at);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        d[j] = exp_f32(d[j] + shift[j] - stats.x) * stats.y - (j == hot ? 1.0f : 0.0f);
        sum[j] += d[j];
      }
    }
    st_global_8(at, d);
  }
  st_global_8(partial, sum);
}

}  // namespace phi1::cuda
