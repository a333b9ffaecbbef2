// The parallel block's elementwise parts, one pass over memory each: after the product with W_in (bias, rotary of q and
// k, the activation of u) and after the product with W_out (bias, dropout, residual).
//
// A thread holds 8 columns, of q, k and v twice 8 (a pair of runs that turn together), and goes down the rows: 4 tokens
// forward, one chunk of the rows backward. What belongs to a column is loaded once (the bias) or stays in registers
// (the sum for the bias's gradient), every access is 16 bytes a lane (32 in float32), and a warp reads 512 bytes in a
// run. Bytes moved an element, in bf16: q, k, v 4 forward and q, k 4, v 2 backward; u 4 forward, 8 backward; residual 6
// forward, 4 backward (2 without dropout). phi-1 (width 14,336): 56 KiB a token forward, 84 KiB backward, against about
// 10 instructions for each GELU forward (two of them on the special-function unit): 1.4 a byte, bound by memory.
// Dropout: Philox once for 16 elements, eight columns of two rows.
// Column sums: at most 2^20 partial sums (4 MiB, less than an L2 cache), which is 131,072 threads of 8 columns at the
// most; then a block of 256 threads adds up 32 columns, 8 chunks at a time, through 1 KiB of shared memory. The order
// is fixed: the result is the same each time. Registers in bench/results/ptxas.md.
#pragma once

#include "arguments.h"
#include "cuda/activation.cuh"
#include "cuda/dropout.cuh"
#include "cuda/eight.cuh"
#include "cuda/ptx.cuh"
#include "cuda/rotary.cuh"

namespace phi1::cuda {

constexpr int kBlockThreads = 128, kBlockRows = 4;
constexpr int kSumColumns = 32, kSumParts = 8, kSumThreads = kSumColumns * kSumParts;
constexpr int kSumSharedBytes = kSumThreads * 4;

// Sixteen columns of q, k or v: two runs of eight.
struct HeadRuns {
  int first, second;  // columns of z
  int angle;          // of the table, for first's elements; -1: not turned
};

PHI1_DEVICE HeadRuns head_runs(const AfterInArgs& args, int index) {
  const int dim = int(args.head_dim), half = int(args.half), per_head = dim / 16;
  const int head = index / per_head, i = index % per_head * 8, start = head * dim;
  if (head >= args.turned_heads) return {start + i, start + i + dim / 2, -1};
  if (i < half) return {start + i, start + i + half, i};
  // The rest of a turned head: its two halves.
  const int rest = start + half + i;
  return {rest, rest + (dim - 2 * half) / 2, -1};
}

// Where the angles of a token are in the table.
PHI1_DEVICE int64_t table_offset(const AfterInArgs& args, int token) {
  const int b = token / int(args.seq), t = token % int(args.seq);
  return (args.position ? ld_global(args.position + b * args.position_batch_stride + t) : t) * args.half;
}

// The strips of a row: a block's threads take q, k and v by 16 columns each, or u by 8.
struct Strips {
  int heads, all;

  PHI1_DEVICE explicit Strips(const AfterInArgs& args)
      : heads(int(((args.width - args.inner) / 16 + kBlockThreads - 1) / kBlockThreads)),
        all(heads + int((args.inner / 8 + kBlockThreads - 1) / kBlockThreads)) {}
};

PHI1_DEVICE int smaller(int a, int b) { return a < b ? a : b; }

// grid: strips of a row, times tokens / kBlockRows rounded up; block: kBlockThreads.
template <typename T, typename A>
__global__ void __launch_bounds__(kBlockThreads) after_in_kernel(const __grid_constant__ AfterInArgs args) {
  const Strips strips(args);
  const int strip = block_index() % strips.all, tokens = int(args.batch * args.seq);
  const int begin = block_index() / strips.all * kBlockRows, end = smaller(begin + kBlockRows, tokens);
  const T* bias = static_cast<const T*>(args.bias);
  const int first_u = int(args.width - args.inner);
  if (strip < strips.heads) {
    const int index = strip * kBlockThreads + thread_index();
    if (16 * index >= first_u) return;
    const HeadRuns runs = head_runs(args, index);
    float bias_a[8], bias_b[8];
    ld_global_8(bias_a, bias + runs.first);
    ld_global_8(bias_b, bias + runs.second);
    for (int token = begin; token < end; ++token) {
      T* z = static_cast<T*>(args.z) + token * args.width;
      float a[8], b[8];
      ld_global_8(a, z + runs.first);
      ld_global_8(b, z + runs.second);
#pragma unroll
      for (int j = 0; j < 8; ++j) a[j] += bias_a[j], b[j] += bias_b[j];
      if (runs.angle >= 0) {
        const int64_t at = table_offset(args, token) + runs.angle;
        turn(a, b, args.cos + at, args.sin + at, 1.0f);
      }
      st_global_8(z + runs.first, a);
      st_global_8(z + runs.second, b);
    }
  } else {
    const int column = 8 * ((strip - strips.heads) * kBlockThreads + thread_index());
    if (column >= args.inner) return;
    float shift[8];
    ld_global_8(shift, bias + first_u + column);
    for (int token = begin; token < end; ++token) {
      float u[8];
      ld_global_8(u, static_cast<const T*>(args.z) + token * args.width + first_u + column);
#pragma unroll
      for (int j = 0; j < 8; ++j) u[j] = A::of(u[j] + shift[j]).value;
      st_global_8(static_cast<T*>(args.activated) + token * args.activated_stride + column, u);
    }
  }
}

// The rows of one chunk.
struct Chunk {
  int begin, end;

  PHI1_DEVICE Chunk(int64_t rows, int64_t chunks, int index) {
    const int each = int((rows + chunks - 1) / chunks);
    begin = smaller(index * each, int(rows)), end = smaller(begin + each, int(rows));
  }
};

// grid: strips of a row, times chunks.
template <typename T, typename A>
__global__ void __launch_bounds__(kBlockThreads) after_in_grad_kernel(const __grid_constant__ AfterInArgs args) {
  const Strips strips(args);
  const int strip = block_index() % strips.all, index = block_index() / strips.all;
  const Chunk chunk(args.batch * args.seq, args.chunks, index);
  const int first_u = int(args.width - args.inner);
  float* partial = args.partial + index * args.width;
  if (strip < strips.heads) {
    const int unit = strip * kBlockThreads + thread_index();
    if (16 * unit >= first_u) return;
    const HeadRuns runs = head_runs(args, unit);
    float sum_a[8] = {}, sum_b[8] = {};
    for (int token = chunk.begin; token < chunk.end; ++token) {
      T* grad = static_cast<T*>(args.grad_z) + token * args.width;
      float a[8], b[8];
      ld_global_8(a, grad + runs.first);
      ld_global_8(b, grad + runs.second);
      if (runs.angle >= 0) {
        const int64_t at = table_offset(args, token) + runs.angle;
        turn(a, b, args.cos + at, args.sin + at, -1.0f);
        st_global_8(grad + runs.first, a);
        st_global_8(grad + runs.second, b);
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) sum_a[j] += a[j], sum_b[j] += b[j];
    }
    st_global_8(partial + runs.first, sum_a);
    st_global_8(partial + runs.second, sum_b);
  } else {
    const int column = 8 * ((strip - strips.heads) * kBlockThreads + thread_index());
    if (column >= args.inner) return;
    float shift[8], sum[8] = {};
    ld_global_8(shift, static_cast<const T*>(args.bias) + first_u + column);
    for (int token = chunk.begin; token < chunk.end; ++token) {
      const int64_t at = token * args.width + first_u + column;
      T* activated = static_cast<T*>(args.activated) + token * args.activated_stride + column;
      float u[8], d[8];
      ld_global_8(u, static_cast<const T*>(args.z) + at);
      ld_global_8(d, activated);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const Activated y = A::of(u[j] + shift[j]);
        u[j] = y.value, d[j] *= y.slope, sum[j] += d[j];
      }
      st_global_8(static_cast<T*>(args.grad_z) + at, d);
      st_global_8(activated, u);
    }
    st_global_8(partial + first_u + column, sum);
  }
}

// Multiplies x by dropout's factor, 0 or the scale (a NaN stays one). A draw serves an even row and the next: `word`
// keeps it from one row to the next of a thread that starts at row `begin`.
PHI1_DEVICE void drop_residual(float (&x)[8], uint32_t (&word)[4], const ResidualArgs& args, uint64_t seed, int row,
                               int begin, int column) {
  if (row == begin || row % 2 == 0) residual_random(word, seed, row, column);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    bool keep[4];
    keep_bytes(keep, row % 2 ? word[2 + i] : word[i], args.dropout_threshold);
#pragma unroll
    for (int j = 0; j < 4; ++j) x[4 * i + j] *= keep[j] ? args.dropout_scale : 0.0f;
  }
}

PHI1_DEVICE int residual_strips(const ResidualArgs& args) {
  return int((args.columns / 8 + kBlockThreads - 1) / kBlockThreads);
}

// grid: strips of a row, times rows / kBlockRows rounded up.
template <typename T, bool kDropout>
__global__ void __launch_bounds__(kBlockThreads) residual_kernel(const __grid_constant__ ResidualArgs args) {
  const int strips = residual_strips(args), strip = block_index() % strips;
  const int begin = block_index() / strips * kBlockRows, end = smaller(begin + kBlockRows, int(args.rows));
  const int column = 8 * (strip * kBlockThreads + thread_index());
  if (column >= args.columns) return;
  float bias[8];
  uint32_t word[4];
  const uint64_t seed = kDropout ? seed_of(args) : 0;
  ld_global_8(bias, static_cast<const T*>(args.bias) + column);
  for (int row = begin; row < end; ++row) {
    const int64_t at = row * args.columns + column;
    float y[8], x[8];
    ld_global_8(y, static_cast<const T*>(args.h) + at);
#pragma unroll
    for (int j = 0; j < 8; ++j) y[j] += bias[j];
    if constexpr (kDropout) drop_residual(y, word, args, seed, row, begin, column);
    ld_global_8(x, static_cast<const T*>(args.x) + at);
#pragma unroll
    for (int j = 0; j < 8; ++j) y[j] += x[j];
    st_global_8(static_cast<T*>(args.h) + at, y);
  }
}

// grid: strips of a row, times chunks.
template <typename T, bool kDropout>
__global__ void __launch_bounds__(kBlockThreads) residual_grad_kernel(const __grid_constant__ ResidualArgs args) {
  const int strips = residual_strips(args), strip = block_index() % strips, index = block_index() / strips;
  const Chunk chunk(args.rows, args.chunks, index);
  const int column = 8 * (strip * kBlockThreads + thread_index());
  if (column >= args.columns) return;
  float sum[8] = {};
  uint32_t word[4];
  const uint64_t seed = kDropout ? seed_of(args) : 0;
  for (int row = chunk.begin; row < chunk.end; ++row) {
    const int64_t at = row * args.columns + column;
    float d[8];
    ld_global_8(d, static_cast<const T*>(args.grad_y) + at);
    if constexpr (kDropout) {
      drop_residual(d, word, args, seed, row, chunk.begin, column);
      st_global_8(static_cast<T*>(args.h) + at, d);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) sum[j] += d[j];
  }
  st_global_8(args.partial + index * args.columns + column, sum);
}

struct BlockSumArgs {
  const float* partial;  // (chunks, columns): of either kernel, or of the cross-entropy
  void* sum;             // (columns)
  int64_t chunks, columns;
};

// Adds up the chunks. grid: columns / kSumColumns, rounded up; block: kSumThreads.
template <typename T>
__global__ void __launch_bounds__(kSumThreads) block_sum_kernel(const __grid_constant__ BlockSumArgs args) {
  const int lane = thread_index() % kSumColumns, part = thread_index() / kSumColumns;
  const int64_t column = int64_t(block_index()) * kSumColumns + lane;
  float total = 0.0f;
  if (column < args.columns)
    for (int64_t chunk = part; chunk < args.chunks; chunk += kSumParts)
      total += ld_global(args.partial + chunk * args.columns + column);
  st_shared_4(shared_base() + uint32_t(thread_index() * 4), float_to_bits(total));
  bar_sync();
  if (part > 0 || column >= args.columns) return;
#pragma unroll
  for (int p = 1; p < kSumParts; ++p)
    total += bits_to_float(ld_shared_4(shared_base() + uint32_t((p * kSumColumns + lane) * 4)));
  st_global(static_cast<T*>(args.sum) + column, from_float<T>(total));
}

}  // namespace phi1::cuda
