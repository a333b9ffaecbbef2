// Flash attention, backward: bitwise reproducible, no atomics.
//
// Three kernels: what is needed of each row; dK and dV, a block for each tile of keys; dQ, a block for each tile of
// queries. Scores and dO V^T are computed in both of the latter: 7 products instead of the 5 of a single kernel that
// adds up dQ with atomics. In return no gradient passes through memory more than once and nothing but the rows'
// numbers is shared. The kernel for dK, dV computes the transposes K Q^T and V dO^T, so that its accumulators are the
// left operands of the next products as they stand: neither P nor dS goes through shared memory.
//
// Formulas: FlashAttention-2 (arXiv 2307.08691), algorithm 2. With P = exp(scale q k - lse), M the dropout mask times
// its scale, delta = rowsum(dO O):
//   dV = (P M)^T dO    dS = P (M (dO V^T) - delta)    dQ = scale dS K    dK = scale dS^T Q
#pragma once

#include "cuda/schedule.cuh"

namespace phi1::cuda {

// Of each row, in AttentionArgs::row_stats: x = lse_to_take_off(lse), y = delta. Bound by memory: 4 head_dim bytes a
// row for 2 head_dim operations. No shared memory, 28 registers.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_row_stats_kernel(const __grid_constant__ AttentionArgs args) {
  constexpr int kLanes = kHeadDim / 8;  // lanes of a row, 16 bytes each
  const int64_t index = int64_t(block_index()) * (kAttentionThreads / kLanes) + thread_index() / kLanes;
  const int64_t i = index % args.seqlen_q, head = index / args.seqlen_q % args.heads,
                b = index / args.seqlen_q / args.heads;
  const bool inside = b < args.batch;
  float delta = 0.0f;
  if (inside) {
    const auto row = [&](const HeadsTensor& x) {
      return ld_global_16(static_cast<const uint16_t*>(x.data) + b * x.batch_stride + i * x.seq_stride +
                          head * x.head_stride + thread_index() % kLanes * 8);
    };
    const Vector4 out = row(args.out), grad = row(args.grad_out);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      delta += to_float(T{uint16_t(out.word[w])}) * to_float(T{uint16_t(grad.word[w])});
      delta += to_float(T{uint16_t(out.word[w] >> 16)}) * to_float(T{uint16_t(grad.word[w] >> 16)});
    }
  }
#pragma unroll
  for (int mask = 1; mask < kLanes; mask *= 2) delta += shfl_xor(delta, mask);
  if (inside && thread_index() % kLanes == 0) {
    const float lse = lse_to_take_off(ld_global(args.lse + index));
    st_global(reinterpret_cast<Float2*>(args.row_stats) + index, Float2{lse, delta});
  }
}

// Tile sizes of dK, dV: 4 warps of 32 keys (16 at head_dim 128: two accumulators of 32 rows would take 256 registers).
//   head_dim   keys x queries   shared memory: K + V + 2 (Q + dO + rows' numbers)
//   32         128 x 32          8 +  8 +  8 + 0.5 = 24.5 KiB
//   64         128 x 32         16 + 16 + 16 + 0.5 = 48.5 KiB
//   128         64 x 32         16 + 16 + 32 + 0.5 = 64.5 KiB
// Per tile and warp at head_dim 64: 128 mma on 48 ldmatrix; 256 operations a byte of Q and dO. Registers on sm_90a:
// 212, 254, 250.
template <int kHeadDim>
struct KeyGradTile {
  static constexpr int kM = kHeadDim == 128 ? 1 : 2, kKeys = 16 * kM * kAttentionWarps, kQueries = 32;
  static constexpr int kKBytes = 2 * kKeys * kHeadDim, kQBytes = 2 * kQueries * kHeadDim, kStatsBytes = 8 * kQueries;
  static constexpr int kStageBytes = 2 * kQBytes, kSharedBytes = 2 * kKBytes + 2 * kStageBytes + 2 * kStatsBytes;
};

// grid: a block for each tile of keys and key/value head. The query heads of a group are added up in the accumulators.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_key_grad_kernel(const __grid_constant__ ScheduledArgs scheduled) {
  using Sizes = KeyGradTile<kHeadDim>;
  using Tile = SwizzledTile<kHeadDim>;
  constexpr int kM = Sizes::kM, kN = Sizes::kQueries / 8;

  const AttentionArgs& args = scheduled.attention;
  Work work;
  if (!find_work<false, Sizes::kKeys>(scheduled, block_index(), work)) return;
  const Rows k{head_data(args, args.k, work, work.head, work.k_row), args.k.seq_stride};
  const Rows v{head_data(args, args.v, work, work.head, work.k_row), args.v.seq_stride};

  const uint32_t k_tile = shared_base(), v_tile = k_tile + uint32_t(Sizes::kKBytes);
  const auto q_tile = [&](int stage) { return v_tile + uint32_t(Sizes::kKBytes + stage * Sizes::kStageBytes); };
  const auto grad_tile = [&](int stage) { return q_tile(stage) + uint32_t(Sizes::kQBytes); };
  const auto stats_tile = [&](int stage) { return q_tile(2) + uint32_t(stage * Sizes::kStatsBytes); };

  // Query tiles that see a key of this block, for each query head of the group.
  const int visible = visible_keys(args, work), group = int(args.heads / args.kv_heads);
  const int first_query = maximum(work.first - visible + 1, 0) / Sizes::kQueries * Sizes::kQueries;
  const bool seen = first_query < work.seqlen_q;
  using QueryCopy = typename Tile::template Copy<Sizes::kQueries, kAttentionThreads>;
  const auto load_queries = [&](int head, int query, int stage) {
    // Pointers that run along from tile to tile would spill 8 bytes at head_dim 64.
    const auto load = [&](const HeadsTensor& x, uint32_t tile) {
      const Rows rows{head_data(args, x, work, head, work.q_row), x.seq_stride};
      QueryCopy(rows, query).start(tile, work.seqlen_q - query, x.data);
    };
    load(args.q, q_tile(stage));
    load(args.grad_out, grad_tile(stage));
    if (thread_index() < Sizes::kQueries) {
      const int i = query + thread_index();
      const bool inside = i < work.seqlen_q;
      const float* from = args.row_stats + 2 * (stats_row(args, work, head) + (inside ? i : 0));
      cp_async_8(stats_tile(stage) + uint32_t(8 * thread_index()), from, inside ? 8 : 0);
    }
  };

  const int t = lane_index() % 4;
  const int warp_row = warp_index() * 16 * kM, row = work.first + warp_row;
  const float scale = args.scale * kLog2e;

  float grad_k[kM][kHeadDim / 8][4], grad_v[kM][kHeadDim / 8][4];
  clear(grad_k);
  clear(grad_v);

  using KeyCopy = typename Tile::template Copy<Sizes::kKeys, kAttentionThreads>;
  const int end = work.seqlen_k - work.first;
  KeyCopy(k, work.first).start(k_tile, end, args.k.data);
  KeyCopy(v, work.first).start(v_tile, end, args.v.data);
  if (seen) load_queries(work.head * group, first_query, 0);
  cp_async_commit();

  const int end_head = (work.head + 1) * group;
  int query = first_query, stage = 0;
  for (int head = seen ? work.head * group : end_head; head < end_head; stage ^= 1) {
    cp_async_wait<0>();
    bar_sync();  // this step's tiles have come, and all are done with the step before
    const bool last = query + Sizes::kQueries >= work.seqlen_q;  // of this head
    const int next_query = last ? first_query : query + Sizes::kQueries;
    if (head + last < end_head) load_queries(head + last, next_query, stage ^ 1);
    cp_async_commit();
    // Numbers of the queries 8 n + 2 t and the next.
    const auto stats = [&](int n, Float2& even, Float2& odd) {
      ld_shared_float2x2(stats_tile(stage) + uint32_t(8 * (8 * n + 2 * t)), even, odd);
    };

    // P^T. Queries past the end are rows of zeros in Q, dO and delta; but zero times an infinite key is no number.
    float p[kM][kN][4];
    product_rows<T, kHeadDim>(p, k_tile, warp_row, q_tile(stage));
    const bool edge = row + 16 * kM > query + visible || query + Sizes::kQueries > work.seqlen_q;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      Float2 even, odd;
      stats(n, even, odd);
      for_each_in(p, n, row, query,
                  [&](float& x, const Element& at) { x = probability(x * scale, at.i % 2 ? odd.x : even.x); });
    }
    if (edge)
      for_each(p, row, query, [&](float& x, const Element& at) {
        if (at.row >= at.column + visible || at.column >= work.seqlen_q) x = 0.0f;
      });

    // dS^T
    float ds[kM][kN][4];
    product_rows<T, kHeadDim>(ds, v_tile, warp_row, grad_tile(stage));
    if (args.dropout_threshold) {
      float dropped[kM][kN][4];
      for_each(dropped, row, query, [&](float& x, const Element& at) { x = at.of(p); });
      drop_transposed(args, int(work.batch * args.heads) + head, row, query, dropped, ds);
      product_columns<T, kHeadDim>(grad_v, dropped, grad_tile(stage));  // times the mask's scale, at the end
    } else {
      product_columns<T, kHeadDim>(grad_v, p, grad_tile(stage));
    }
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      Float2 even, odd;
      stats(n, even, odd);
      for_each_in(ds, n, row, query, [&](float& x, const Element& at) {
        x = at.of(p) * (x * args.dropout_scale - (at.i % 2 ? odd.y : even.y));
      });
    }
    product_columns<T, kHeadDim>(grad_k, ds, q_tile(stage));
    query = next_query, head += last;
  }
  if (!seen) {  // the copies of K and V are still on their way to where the results go
    cp_async_wait<0>();
    bar_sync();
  }

  const auto to = [&](const HeadsTensor& x) {
    return head_data(args, x, work, work.head, work.k_row) + work.first * x.seq_stride;
  };
  Tile::template store<T>(grad_k, args.scale, k_tile, warp_row, to(args.grad_k), args.grad_k.seq_stride, end);
  Tile::template store<T>(grad_v, args.dropout_scale, v_tile, warp_row, to(args.grad_v), args.grad_v.seq_stride, end);
}

// Tile sizes of dQ: 4 warps of 32 queries (16 at head_dim 128: with 32, sm_90a spills 28 bytes a thread).
//   head_dim   queries x keys   shared memory: Q + dO + 2 (K + V)
//   32         128 x 32          8 +  8 +  8 = 24 KiB
//   64         128 x 32         16 + 16 + 16 = 48 KiB
//   128         64 x 32         16 + 16 + 32 = 64 KiB
// Per tile and warp at head_dim 64: 96 mma on 40 ldmatrix; 192 operations a byte of K and V. Registers on sm_90a:
// 157, 223, 164.
template <int kHeadDim>
struct QueryGradTile {
  static constexpr int kM = kHeadDim == 128 ? 1 : 2, kQueries = 16 * kM * kAttentionWarps, kKeys = 32;
  static constexpr int kQBytes = 2 * kQueries * kHeadDim, kKBytes = 2 * kKeys * kHeadDim;
  static constexpr int kSharedBytes = 2 * kQBytes + 4 * kKBytes;
};

// grid: a block for each tile of queries and head.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_query_grad_kernel(const __grid_constant__ ScheduledArgs scheduled) {
  using Sizes = QueryGradTile<kHeadDim>;
  using Tile = SwizzledTile<kHeadDim>;
  constexpr int kM = Sizes::kM, kN = Sizes::kKeys / 8;

  const AttentionArgs& args = scheduled.attention;
  Work work;
  if (!find_work<true, Sizes::kQueries>(scheduled, block_index(), work)) return;
  const int kv_head = int(work.head / (args.heads / args.kv_heads));
  const Rows q{head_data(args, args.q, work, work.head, work.q_row), args.q.seq_stride};
  const Rows grad{head_data(args, args.grad_out, work, work.head, work.q_row), args.grad_out.seq_stride};
  const Rows k{head_data(args, args.k, work, kv_head, work.k_row), args.k.seq_stride};
  const Rows v{head_data(args, args.v, work, kv_head, work.k_row), args.v.seq_stride};

  const uint32_t q_tile = shared_base(), grad_tile = q_tile + uint32_t(Sizes::kQBytes);
  const auto k_tile = [&](int stage) { return grad_tile + uint32_t(Sizes::kQBytes + 2 * stage * Sizes::kKBytes); };
  const auto v_tile = [&](int stage) { return k_tile(stage) + uint32_t(Sizes::kKBytes); };
  using KeyCopy = typename Tile::template Copy<Sizes::kKeys, kAttentionThreads>;
  KeyCopy k_copy(k, 0), v_copy(v, 0);
  const auto load_keys = [&](int tile) {
    const int left = work.seqlen_k - tile * Sizes::kKeys;
    k_copy.start(k_tile(tile % 2), left, args.k.data);
    v_copy.start(v_tile(tile % 2), left, args.v.data);
  };

  const int visible = visible_keys(args, work), last = minimum(work.first + Sizes::kQueries, work.seqlen_q) - 1;
  const int keys = minimum(last + visible, work.seqlen_k);
  const int tiles = keys > 0 ? ceil_div(keys, Sizes::kKeys) : 0;

  const int g = lane_index() / 4;
  const int warp_row = warp_index() * 16 * kM, row = work.first + warp_row;
  const float scale = args.scale * kLog2e;

  float grad_q[kM][kHeadDim / 8][4];
  clear(grad_q);
  Float2 stats[kM][2];  // of this lane's rows; rows past the end are computed, but not stored
  const auto* const all_stats = reinterpret_cast<const Float2*>(args.row_stats) + stats_row(args, work, work.head);
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      stats[m][half] = ld_global(all_stats + minimum(row + 16 * m + 8 * half + g, work.seqlen_q - 1));

  using QueryCopy = typename Tile::template Copy<Sizes::kQueries, kAttentionThreads>;
  const int queries = work.seqlen_q - work.first;
  QueryCopy(q, work.first).start(q_tile, queries, args.q.data);
  QueryCopy(grad, work.first).start(grad_tile, queries, args.grad_out.data);
  if (tiles > 0) load_keys(0);
  cp_async_commit();

  for (int tile = 0; tile < tiles; ++tile) {
    cp_async_wait<0>();
    bar_sync();  // this tile has come, and all are done with the one before
    if (tile + 1 < tiles) load_keys(tile + 1);
    cp_async_commit();
    const int column = tile * Sizes::kKeys;

    float p[kM][kN][4];
    product_rows<T, kHeadDim>(p, q_tile, warp_row, k_tile(tile % 2));
    const bool edge = column + Sizes::kKeys > minimum(work.seqlen_k, row + visible);
    for_each(p, row, column, [&](float& x, const Element& at) { x = probability(x * scale, stats[at.m][at.i / 2].x); });
    if (edge)
      for_each(p, row, column, [&](float& x, const Element& at) {
        if (at.column >= minimum(work.seqlen_k, at.row + visible)) x = 0.0f;
      });

    float ds[kM][kN][4];
    product_rows<T, kHeadDim>(ds, grad_tile, warp_row, v_tile(tile % 2));
    if (args.dropout_threshold) drop(args, int(work.batch * args.heads) + work.head, row, column, ds);
    for_each(ds, row, column,
             [&](float& x, const Element& at) { x = at.of(p) * (x * args.dropout_scale - stats[at.m][at.i / 2].y); });
    product_columns<T, kHeadDim>(grad_q, ds, k_tile(tile % 2));
  }
  if (tiles == 0) {
    cp_async_wait<0>();
    bar_sync();
  }
  uint16_t* const to = head_data(args, args.grad_q, work, work.head, work.q_row) + work.first * args.grad_q.seq_stride;
  Tile::template store<T>(grad_q, args.scale, q_tile, warp_row, to, args.grad_q.seq_stride, work.seqlen_q - work.first);
}

}  // namespace phi1::cuda
