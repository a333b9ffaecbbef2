// Flash attention, forward (FlashAttention-2, arXiv 2307.08691, algorithm 1).
#pragma once

#include "cuda/schedule.cuh"

namespace phi1::cuda {

// Tile sizes: 4 warps of 32 query rows, so that a fragment of K or V read from shared memory (512 bytes) serves 4 mma.
//   head_dim   rows x keys   shared memory: Q + 2 (K + V)    operations per byte read from global memory (bf16)
//   32         128 x 64       8 + 16 = 24 KiB                128 a byte of K and V, whatever head_dim
//   64         128 x 64      16 + 32 = 48 KiB
//   128        128 x 32      32 + 32 = 64 KiB                32 keys: the accumulators take 128 registers a thread
// Per tile and warp at head_dim 64: 128 mma (262,144 multiply-adds) on 40 ldmatrix. Registers on
// sm_90a: 168, 232, 244 (bench/results/ptxas.md).
template <int kHeadDim>
struct ForwardTile {
  static constexpr int kM = 2, kRows = 16 * kM * kAttentionWarps, kKeys = kHeadDim == 128 ? 32 : 64;
  static constexpr int kQBytes = 2 * kRows * kHeadDim, kKBytes = 2 * kKeys * kHeadDim;
  static constexpr int kSharedBytes = kQBytes + 4 * kKBytes;
};

// grid: a block for each tile of queries and head; block: kAttentionThreads. At head_dim 32 three fit a multiprocessor:
// of 168 registers, where ptxas takes 169 for sm_80 if it is not asked.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kAttentionThreads, kHeadDim == 32 ? 3 : 2)
    attention_forward_kernel(const __grid_constant__ ScheduledArgs scheduled) {
  using Sizes = ForwardTile<kHeadDim>;
  constexpr int kM = Sizes::kM, kN = Sizes::kKeys / 8;
  using Tile = SwizzledTile<kHeadDim>;

  const AttentionArgs& args = scheduled.attention;
  Work work;
  if (!find_work<true, Sizes::kRows>(scheduled, block_index(), work)) return;
  const int kv_head = int(work.head / (args.heads / args.kv_heads));
  const Rows q{head_data(args, args.q, work, work.head, work.q_row), args.q.seq_stride};
  const Rows k{head_data(args, args.k, work, kv_head, work.k_row), args.k.seq_stride};
  const Rows v{head_data(args, args.v, work, kv_head, work.k_row), args.v.seq_stride};
  const int plane = int(work.batch * args.heads) + work.head;

  const uint32_t q_tile = shared_base();
  const auto k_tile = [&](int stage) { return q_tile + uint32_t(Sizes::kQBytes + 2 * stage * Sizes::kKBytes); };
  const auto v_tile = [&](int stage) { return k_tile(stage) + uint32_t(Sizes::kKBytes); };
  using KeyCopy = typename Tile::template Copy<Sizes::kKeys, kAttentionThreads>;
  KeyCopy k_copy(k, 0), v_copy(v, 0);
  const auto load_keys = [&](int tile) {
    const int left = work.seqlen_k - tile * Sizes::kKeys;
    k_copy.start(k_tile(tile % 2), left, args.k.data);
    v_copy.start(v_tile(tile % 2), left, args.v.data);
  };

  // Keys that the block's last query sees.
  const int visible = visible_keys(args, work), last = minimum(work.first + Sizes::kRows, work.seqlen_q) - 1;
  const int keys = minimum(last + visible, work.seqlen_k);
  const int tiles = keys > 0 ? ceil_div(keys, Sizes::kKeys) : 0;

  const int g = lane_index() / 4, t = lane_index() % 4;
  const int warp_row = warp_index() * 16 * kM, row = work.first + warp_row;  // in the tile, in the sequence
  const float scale = args.scale * kLog2e;  // so that exp(scale x) = 2^(scale kLog2e x)

  float out[kM][kHeadDim / 8][4], most[kM][2], sum[kM][2];  // most: of the raw products
  clear(out);
  for (int m = 0; m < kM; ++m)
    for (int half = 0; half < 2; ++half) most[m][half] = -kInfinity, sum[m][half] = 0.0f;

  typename Tile::template Copy<Sizes::kRows, kAttentionThreads>(q, work.first)
      .start(q_tile, work.seqlen_q - work.first, args.q.data);
  if (tiles > 0) load_keys(0);
  cp_async_commit();

  for (int tile = 0; tile < tiles; ++tile) {
    cp_async_wait<0>();
    bar_sync();  // this tile has come, and all are done with the one before, whose place the next one takes
    if (tile + 1 < tiles) load_keys(tile + 1);
    cp_async_commit();

    float p[kM][kN][4];
    product_rows<T, kHeadDim>(p, q_tile, warp_row, k_tile(tile % 2));

    const int column = tile * Sizes::kKeys;
    // Only tiles on the diagonal, or over the end of the keys, have something to hide.
    if (column + Sizes::kKeys > minimum(work.seqlen_k, row + visible)) {
      for_each(p, row, column, [&](float& score, const Element& at) {
        if (at.column >= minimum(work.seqlen_k, at.row + visible)) score = -kInfinity;
      });
    }

#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float highest = most[m][half];
#pragma unroll
        for (int n = 0; n < kN; ++n) highest = max_f32(highest, max_f32(p[m][n][2 * half], p[m][n][2 * half + 1]));
        highest = max_f32(highest, shfl_xor(highest, 1));
        highest = max_f32(highest, shfl_xor(highest, 2));
        // The highest is taken off first, so that it gives 2^0 however large it is: after a product that rounds it
        // would give 2^(the rounding). Each ex2 here is of at most 0. A row with no score above -inf: any finite shift,
        // for 2^(-inf - shift) is 0 and 2^(-inf + inf) is not.
        const float shift = highest == -kInfinity ? 0.0f : highest;
        const float correction = ex2((most[m][half] - shift) * scale);
        most[m][half] = highest;
        float total = sum[m][half] * correction;
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) total += p[m][n][i] = ex2((p[m][n][i] - shift) * scale);
        sum[m][half] = total;  // of this lane's columns
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) out[m][n][2 * half] *= correction, out[m][n][2 * half + 1] *= correction;
      }

    if (args.dropout_threshold) drop(args, plane, row, column, p);  // the scale is applied at the end
    product_columns<T, kHeadDim>(out, p, v_tile(tile % 2));
  }
  if (tiles == 0) {  // the copy of Q is still on its way to where the results go
    cp_async_wait<0>();
    bar_sync();
  }

  float* const lse = args.lse + stats_row(args, work, work.head);
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = sum[m][half];
      total += shfl_xor(total, 1);
      total += shfl_xor(total, 2);
      const float factor = total == 0.0f ? 0.0f : args.dropout_scale / total;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) out[m][n][2 * half] *= factor, out[m][n][2 * half + 1] *= factor;
      const int query = row + 16 * m + 8 * half + g;
      if (t == 0 && query < work.seqlen_q) st_global(lse + query, log_sum_exp(most[m][half] * args.scale, total));
    }
  uint16_t* const to = head_data(args, args.out, work, work.head, work.q_row) + work.first * args.out.seq_stride;
  Tile::template store<T>(out, 1.0f, q_tile, warp_row, to, args.out.seq_stride, work.seqlen_q - work.first);
}

}  // namespace phi1::cuda
