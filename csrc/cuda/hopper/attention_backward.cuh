// Flash attention, backward, for compute capability 9.0a: dK and dV, and dQ. The formulas, the rows' numbers and why
// there are two kernels: csrc/cuda/attention_backward.cuh.
//
// Each is a warpgroup that loads and two that compute 64 rows each: rows are keys in the first, queries in the second,
// so that what a product leaves in registers is the left operand of the next. The two products that a tile begins with
// are issued before the last ones of the tile before are waited for; while one warpgroup computes dS the other's
// products run.
#pragma once

#include "cuda/hopper/attention.cuh"

namespace phi1::cuda::hopper {

// What both kernels are launched with: 168 registers a thread, 64,512 in all. The loading warpgroup gives some to the
// others.
struct BackwardThreads {
  static constexpr int kComputing = 2;  // warpgroups
  static constexpr int kThreads = kWarpgroup * (1 + kComputing);
};

// Tile sizes of dK, dV. Shared memory: kPlaces (K + V) + kStages (Q + rows' numbers + dO).
//   head_dim   keys x queries   places   stages   shared memory                     registers of a thread
//   64         128 x 64         2        4        64 + 4 ( 8 + 1 +  8) = 132 KiB    P, dS 64 + 32; dK, dV  64
//   128        128 x 64         1        3        64 + 3 (16 + 1 + 16) = 163 KiB    P, dS 64 + 32; dK, dV 128
// The computing threads take all registers that there are: at head_dim 128 with 232 ptxas serialises wgmma (C7512).
template <int kHeadDim>
struct KeyGradTile : BackwardThreads {
  static constexpr int kLoadingRegisters = kHeadDim == 128 ? 24 : 40, kUnroll = 1;
  static constexpr int kComputingRegisters = kHeadDim == 128 ? 240 : 232;
  static constexpr int kKeys = 64 * kComputing, kQueries = 64;
  static constexpr int kPlaces = kHeadDim == 128 ? 1 : 2, kStages = kHeadDim == 128 ? 3 : 4;
  static constexpr bool kOverlaps = kHeadDim == 64;  // the product into dK with the next tile's first
  using K = Tile<kKeys, kHeadDim>;                   // and V
  using Q = Tile<kQueries, kHeadDim>;                // and dO
  static constexpr int kStatsBytes = 1024;
  static_assert(8 * kQueries <= kStatsBytes && kStatsBytes % Q::kGroupBytes == 0);

  using KRing = Ring<kPlaces, 2 * K::kBytes>;            // K, then V
  using QRing = Ring<kStages, Q::kBytes + kStatsBytes>;  // Q, then the rows' numbers
  using GradRing = Ring<kStages, Q::kBytes>;
  static constexpr int kBarriers = KRing::kSharedBytes + QRing::kSharedBytes + GradRing::kSharedBytes;
  static constexpr int kSharedBytes = kBarriers + KRing::kBarrierBytes + QRing::kBarrierBytes + GradRing::kBarrierBytes;
};

// Tile sizes of dQ. Shared memory: kPlaces (Q + dO) + kStages (K + V).
//   head_dim   queries x keys   places   stages   shared memory         accumulators of a thread
//   64         128 x 128        2        3        64 +  96 = 160 KiB    P, dS 128; dQ 32
//   128        128 x 64         1        3        64 +  96 = 160 KiB    P, dS  64; dQ 64
template <int kHeadDim>
struct QueryGradTile : BackwardThreads {
  static constexpr int kLoadingRegisters = 40, kComputingRegisters = 232, kUnroll = 2;
  static constexpr int kQueries = 64 * kComputing, kKeys = kHeadDim == 128 ? 64 : 128;
  static constexpr int kPlaces = kHeadDim == 128 ? 1 : 2, kStages = 3;
  using Q = Tile<kQueries, kHeadDim>;          // and dO
  using K = Tile<kKeys, kHeadDim>;             // and V
  using QRing = Ring<kPlaces, 2 * Q::kBytes>;  // Q, then dO
  using KRing = Ring<kStages, K::kBytes>;      // of K, and of V
  static constexpr int kBarriers = QRing::kSharedBytes + 2 * KRing::kSharedBytes;
  static constexpr int kSharedBytes = kBarriers + QRing::kBarrierBytes + 2 * KRing::kBarrierBytes;
};

// Three rings one after the other, their barriers behind them all: a, read through a whole work, b and c by the tile.
template <typename A, typename B, typename C>
struct Rings {
  A a;
  B b;
  C c;
  PHI1_DEVICE explicit Rings(uint32_t shared)
      : a{shared, shared + uint32_t(A::kSharedBytes + B::kSharedBytes + C::kSharedBytes)},
        b{shared + uint32_t(A::kSharedBytes), a.barriers + uint32_t(A::kBarrierBytes)},
        c{b.tiles + uint32_t(B::kSharedBytes), b.barriers + uint32_t(B::kBarrierBytes)} {}
  PHI1_DEVICE void init(int readers) const { a.init(readers), b.init(readers), c.init(readers); }
};

// ---------------------------------------------------------------------------------------- dK and dV

// The query tiles that see a key of this work, for each query head of the group.
template <typename Sizes>
struct QueryTiles {
  int first, end, heads;
  PHI1_DEVICE QueryTiles(const AttentionArgs& args, const Work& work)
      : first(maximum(work.first - visible_keys(args, work) + 1, 0) / Sizes::kQueries),
        end(ceil_div(work.seqlen_q, Sizes::kQueries)),
        heads(int(args.heads / args.kv_heads)) {}
  PHI1_DEVICE bool empty() const { return first >= end; }
};

template <int kHeadDim, typename R>
PHI1_DEVICE void load_key_grad(const ScheduledArgs& scheduled, const R& rings, int thread) {
  using Sizes = KeyGradTile<kHeadDim>;
  const AttentionArgs& args = scheduled.attention;
  Loader loader{thread};
  Turn<Sizes::kPlaces> k_turn;
  Turn<Sizes::kStages> q_turn, grad_turn;
  for_each_work<false, Sizes::kKeys>(scheduled, [&](const Work& work) {
    const QueryTiles<Sizes> tiles(args, work);
    if (tiles.empty()) return;
    const Rows k{head_data(args, args.k, work, work.head, work.k_row), args.k.seq_stride};
    const Rows v{head_data(args, args.v, work, work.head, work.k_row), args.v.seq_stride};
    loader.load(rings.a, k_turn, [&](uint32_t to) {
      Sizes::K::template load<Sizes::kUnroll>(to, k, work.first, work.seqlen_k, thread);
      Sizes::K::template load<Sizes::kUnroll>(to + uint32_t(Sizes::K::kBytes), v, work.first, work.seqlen_k, thread);
    });
    for (int head = work.head * tiles.heads; head < (work.head + 1) * tiles.heads; ++head) {
      const Rows q{head_data(args, args.q, work, head, work.q_row), args.q.seq_stride};
      const Rows grad{head_data(args, args.grad_out, work, head, work.q_row), args.grad_out.seq_stride};
      const float* stats = args.row_stats + 2 * stats_row(args, work, head);
      for (int tile = tiles.first; tile < tiles.end; ++tile) {
        const int query = tile * Sizes::kQueries;
        loader.load(rings.b, q_turn, [&](uint32_t to) {
          Sizes::Q::template load<Sizes::kUnroll>(to, q, query, work.seqlen_q, thread);
          const bool inside = query + thread < work.seqlen_q;
          if (thread < Sizes::kQueries)
            cp_async_8(to + uint32_t(Sizes::Q::kBytes + 8 * thread), inside ? stats + 2 * (query + thread) : stats,
                       inside ? 8 : 0);
        });
        loader.load(rings.c, grad_turn, [&](uint32_t to) {
          Sizes::Q::template load<Sizes::kUnroll>(to, grad, query, work.seqlen_q, thread);
        });
      }
    }
    // With one place the next K waits until this one was read, for which the last tile must be there.
    if (Sizes::kPlaces == 1) loader.finish();
  });
  loader.finish();
}

// Computing warpgroup number `group`: 64 keys of each work's tile.
template <typename T, int kHeadDim, typename R>
PHI1_DEVICE void compute_key_grad(const ScheduledArgs& scheduled, const R& rings, int group) {
  using Sizes = KeyGradTile<kHeadDim>;
  constexpr int kN = Sizes::kQueries / 8;
  const AttentionArgs& args = scheduled.attention;
  const int g = lane_index() / 4, t = lane_index() % 4;
  const int warp_row = 64 * group + warp_index() % 4 * 16;
  const float scale = args.scale * kLog2e;
  Turn<Sizes::kPlaces> k_turn;
  Turn<Sizes::kStages> turn;    // of Q and of dO
  Turn<Sizes::kStages> before;  // the tile whose product into dK is in flight
  bool in_flight = false;

  for_each_work<false, Sizes::kKeys>(scheduled, [&](const Work& work) {
    const QueryTiles<Sizes> tiles(args, work);
    const int visible = visible_keys(args, work), row = work.first + warp_row;
    float grad_k[kHeadDim / 8][4], grad_v[kHeadDim / 8][4], p[kN][4], ds[kN][4];
    uint32_t left[kN / 2][4];
    clear(as_tiles(grad_k));
    clear(as_tiles(grad_v));

    const uint32_t k_tile = rings.a.tile(k_turn), v_tile = k_tile + uint32_t(Sizes::K::kBytes);
    const auto add = [&](int plane, int query) {
      const uint32_t q_tile = rings.b.tile(turn), grad_tile = rings.c.tile(turn);
      Float2 stats[2];  // of queries 8 n + 2 t and the next
      const auto read_stats = [&](int n) {
        ld_shared_float2x2(q_tile + uint32_t(Sizes::Q::kBytes + 16 * t + 64 * n), stats[0], stats[1]);
      };
      rings.b.wait_full(turn);
      wgmma_fence();
      product_rows<T, typename Sizes::K, typename Sizes::Q, kHeadDim>(p, k_tile, 64 * group, q_tile);
      wgmma_commit();
      rings.c.wait_full(turn);
      wgmma_fence();
      product_rows<T, typename Sizes::K, typename Sizes::Q, kHeadDim>(ds, v_tile, 64 * group, grad_tile);
      wgmma_commit();
      if constexpr (Sizes::kOverlaps) {
        wgmma_wait<2>(grad_k);
        if (in_flight) rings.b.release(before);
      }

      // P^T. Queries past the end are rows of zeros in Q: with a key of infinities their scores are NaN.
      wgmma_wait<1>(p);
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        read_stats(n);
        for_each_in(as_tiles(p), n, 0, 0,
                    [&](float& x, const Element& at) { x = probability(x * scale, stats[at.i % 2].x); });
      }
      if (row + 15 >= query + visible) {          // some query does not see some key
        const int first = row + g - visible + 1;  // the first query that sees this lane's first key
        const int limit[2] = {first - query - 2 * t, first + 8 - query - 2 * t};
        hide_before(limit, 0.0f, p);
      }
      if (query + Sizes::kQueries > work.seqlen_q) {
        const int end = work.seqlen_q - query - 2 * t;
        const int limit[2] = {end, end};
        hide_from(limit, 0.0f, p);
      }

      // P^T, rounded and dropped, for dV, whose scale is applied at the end; dO V^T dropped.
      wgmma_wait<0>(ds);
      round_to<T>(left, p);
      if (args.dropout_threshold)
        for_kept<true, 1, kN>(args, plane, row, query, [&](int, int n, int i, bool keep) {
          if (keep) return;
          left[n / 2][n % 2 * 2 + i / 2] &= i % 2 ? 0x0000ffffu : 0xffff0000u;
          ds[n][i] = 0.0f;
        });
      wgmma_fence();
      product_columns<T, typename Sizes::Q>(grad_v, left, grad_tile);
      wgmma_commit();

      // dS^T, in the same registers as P^T
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        read_stats(n);
        for_each_in(as_tiles(ds), n, 0, 0, [&](float& x, const Element& at) {
          x = p[at.n][at.i] * (x * args.dropout_scale - stats[at.i % 2].y);
        });
      }
      wgmma_wait<0>(grad_v);
      rings.c.release(turn);
      round_to<T>(left, ds);
      wgmma_fence();
      product_columns<T, typename Sizes::Q>(grad_k, left, q_tile);
      wgmma_commit();
      if constexpr (Sizes::kOverlaps) {
        before = turn, in_flight = true;
      } else {
        wgmma_wait<0>(grad_k);
        rings.b.release(turn);
      }
      turn.next();
    };

    if (!tiles.empty()) {
      rings.a.wait_full(k_turn);
      int plane = work.batch * int(args.heads) + work.head * tiles.heads;
      for (const int end = plane + tiles.heads; plane < end; ++plane)
        for (int tile = tiles.first; tile < tiles.end; ++tile) add(plane, tile * Sizes::kQueries);
      if constexpr (Sizes::kOverlaps) {
        wgmma_wait<0>(grad_k);
        rings.b.release(before);
        in_flight = false;
      }
      rings.a.release(k_turn);
      k_turn.next();
    }

    const auto store = [&](const float (&grad)[kHeadDim / 8][4], float factor, const HeadsTensor& to) {
      const float factors[2] = {factor, factor};
      store_rows<T>(grad, factors, head_data(args, to, work, work.head, work.k_row) + row * to.seq_stride,
                    to.seq_stride, work.seqlen_k - row);
    };
    store(grad_k, args.scale, args.grad_k);
    store(grad_v, args.dropout_scale, args.grad_v);
  });
}

// grid: a block for each multiprocessor; block: BackwardThreads::kThreads.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(BackwardThreads::kThreads, 1)
    attention_key_grad_kernel(const __grid_constant__ ScheduledArgs scheduled) {
  using Sizes = KeyGradTile<kHeadDim>;
  const Rings<typename Sizes::KRing, typename Sizes::QRing, typename Sizes::GradRing> rings(shared_base());
  if (thread_index() == 0) rings.init(Sizes::kComputing);
  bar_sync();
  const int warpgroup = warpgroup_index();
  if (warpgroup == 0) {
    setmaxnreg_dec<Sizes::kLoadingRegisters>();
    load_key_grad<kHeadDim>(scheduled, rings, thread_index() % kWarpgroup);
  } else {
    setmaxnreg_inc<Sizes::kComputingRegisters>();
    compute_key_grad<T, kHeadDim>(scheduled, rings, warpgroup - 1);
  }
}

// ----------------------------------------------------------------------------------------------- dQ

template <int kHeadDim, typename R>
PHI1_DEVICE void load_query_grad(const ScheduledArgs& scheduled, const R& rings, int thread) {
  using Sizes = QueryGradTile<kHeadDim>;
  const AttentionArgs& args = scheduled.attention;
  Loader loader{thread};
  Turn<Sizes::kPlaces> q_turn;
  Turn<Sizes::kStages> k_turn, v_turn;
  for_each_work<true, Sizes::kQueries>(scheduled, [&](const Work& work) {
    const int tiles = key_tiles<Sizes::kQueries, Sizes::kKeys>(args, work);
    if (tiles == 0) return;
    const int kv_head = int(work.head / (args.heads / args.kv_heads));
    const Rows q{head_data(args, args.q, work, work.head, work.q_row), args.q.seq_stride};
    const Rows grad{head_data(args, args.grad_out, work, work.head, work.q_row), args.grad_out.seq_stride};
    const Rows k{head_data(args, args.k, work, kv_head, work.k_row), args.k.seq_stride};
    const Rows v{head_data(args, args.v, work, kv_head, work.k_row), args.v.seq_stride};
    loader.load(rings.a, q_turn, [&](uint32_t to) {
      Sizes::Q::template load<Sizes::kUnroll>(to, q, work.first, work.seqlen_q, thread);
      Sizes::Q::template load<Sizes::kUnroll>(to + uint32_t(Sizes::Q::kBytes), grad, work.first, work.seqlen_q, thread);
    });
    for (int tile = tiles - 1; tile >= 0; --tile) {
      const int key = tile * Sizes::kKeys;
      loader.load(rings.b, k_turn,
                  [&](uint32_t to) { Sizes::K::template load<Sizes::kUnroll>(to, k, key, work.seqlen_k, thread); });
      loader.load(rings.c, v_turn,
                  [&](uint32_t to) { Sizes::K::template load<Sizes::kUnroll>(to, v, key, work.seqlen_k, thread); });
    }
    if (Sizes::kPlaces == 1) loader.finish();
  });
  loader.finish();
}

// Computing warpgroup number `group`: 64 query rows of each work's tile.
template <typename T, int kHeadDim, typename R>
PHI1_DEVICE void compute_query_grad(const ScheduledArgs& scheduled, const R& rings, int group) {
  using Sizes = QueryGradTile<kHeadDim>;
  constexpr int kN = Sizes::kKeys / 8;
  const AttentionArgs& args = scheduled.attention;
  const int g = lane_index() / 4, t = lane_index() % 4;
  const int warp_row = 64 * group + warp_index() % 4 * 16;
  const float scale = args.scale * kLog2e;
  Turn<Sizes::kPlaces> q_turn;
  Turn<Sizes::kStages> turn;    // of K and of V
  Turn<Sizes::kStages> before;  // the tile whose product into dQ is in flight
  bool in_flight = false;

  for_each_work<true, Sizes::kQueries>(scheduled, [&](const Work& work) {
    const int tiles = key_tiles<Sizes::kQueries, Sizes::kKeys>(args, work), visible = visible_keys(args, work);
    const int row = work.first + warp_row;
    float grad_q[kHeadDim / 8][4], p[kN][4], ds[kN][4];
    uint32_t left[kN / 2][4];
    clear(as_tiles(grad_q));
    Float2 stats[2];  // of this lane's rows; rows past the end are computed, but not stored
    const auto* const all_stats = reinterpret_cast<const Float2*>(args.row_stats) + stats_row(args, work, work.head);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      stats[half] = ld_global(all_stats + minimum(row + 8 * half + g, work.seqlen_q - 1));
    const bool bounded = any_lane(is_large(stats[0].x) || is_large(stats[1].x));  // see `probability`

    const uint32_t q_tile = rings.a.tile(q_turn), grad_tile = q_tile + uint32_t(Sizes::Q::kBytes);
    const auto add = [&](int column) {
      const uint32_t k_tile = rings.b.tile(turn);
      rings.b.wait_full(turn);
      wgmma_fence();
      product_rows<T, typename Sizes::Q, typename Sizes::K, kHeadDim>(p, q_tile, 64 * group, k_tile);
      wgmma_commit();
      rings.c.wait_full(turn);
      wgmma_fence();
      product_rows<T, typename Sizes::Q, typename Sizes::K, kHeadDim>(ds, grad_tile, 64 * group, rings.c.tile(turn));
      wgmma_commit();
      wgmma_wait<2>(grad_q);
      if (in_flight) rings.b.release(before);

      wgmma_wait<1>(p);
      for_each(as_tiles(p), 0, 0, [&](float& x, const Element& at) { x = x * scale - stats[at.i / 2].x; });
      if (bounded) for_each(as_tiles(p), 0, 0, [](float& x, const Element&) { x = min_nan(x, 0.0f); });
      for_each(as_tiles(p), 0, 0, [](float& x, const Element&) { x = ex2(x); });
      if (column + Sizes::kKeys > minimum(work.seqlen_k, row + visible)) {
        const int first = row + g + visible;
        const int limit[2] = {minimum(work.seqlen_k, first) - column - 2 * t,
                              minimum(work.seqlen_k, first + 8) - column - 2 * t};
        hide_from(limit, 0.0f, p);
      }
      wgmma_wait<0>(ds);
      rings.c.release(turn);
      if (args.dropout_threshold) drop(args, work.batch * int(args.heads) + work.head, row, column, as_tiles<kN>(ds));
      for_each(as_tiles(ds), 0, 0,
               [&](float& x, const Element& at) { x = p[at.n][at.i] * (x * args.dropout_scale - stats[at.i / 2].y); });
      round_to<T>(left, ds);
      wgmma_fence();
      product_columns<T, typename Sizes::K>(grad_q, left, k_tile);
      wgmma_commit();
      before = turn, in_flight = true;
      turn.next();
    };

    if (tiles > 0) {
      rings.a.wait_full(q_turn);
      for (int tile = tiles - 1; tile >= 0; --tile) add(tile * Sizes::kKeys);
      wgmma_wait<0>(grad_q);
      rings.b.release(before);
      in_flight = false;
      rings.a.release(q_turn);
      q_turn.next();
    }

    const float factor[2] = {args.scale, args.scale};
    uint16_t* const to = head_data(args, args.grad_q, work, work.head, work.q_row) + row * args.grad_q.seq_stride;
    store_rows<T>(grad_q, factor, to, args.grad_q.seq_stride, work.seqlen_q - row);
  });
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(BackwardThreads::kThreads, 1)
    attention_query_grad_kernel(const __grid_constant__ ScheduledArgs scheduled) {
  using Sizes = QueryGradTile<kHeadDim>;
  const Rings<typename Sizes::QRing, typename Sizes::KRing, typename Sizes::KRing> rings(shared_base());
  if (thread_index() == 0) rings.init(Sizes::kComputing);
  bar_sync();
  const int warpgroup = warpgroup_index();
  if (warpgroup == 0) {
    setmaxnreg_dec<Sizes::kLoadingRegisters>();
    load_query_grad<kHeadDim>(scheduled, rings, thread_index() % kWarpgroup);
  } else {
    setmaxnreg_inc<Sizes::kComputingRegisters>();
    compute_query_grad<T, kHeadDim>(scheduled, rings, warpgroup - 1);
  }
}

}  // namespace phi1::cuda::hopper
