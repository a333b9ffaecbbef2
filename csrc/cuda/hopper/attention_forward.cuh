// Flash attention, forward, for compute capability 9.0a.
//
// As FlashAttention-3 (arXiv 2407.08608) lays it out: a warpgroup that loads, two or three that compute 64 query rows
// each. A computing warpgroup issues Q K^T of the next tile before P V of this one, so that the softmax of the one runs
// under the product of the other; the warpgroups take turns at issuing, so that the softmax of the one runs under the
// products of another, too.
#pragma once

#include "cuda/hopper/attention.cuh"

namespace phi1::cuda::hopper {

// Tile sizes for kGroups computing warpgroups. Shared memory: 2 Q + kStages (K + V): the next work's first tiles are
// loaded under the end of this one.
//   head_dim   groups   queries x keys   stages   shared memory
//   64         2        128 x 128        3        32 +  96 = 128 KiB
//   64         3        192 x 128        3        48 +  96 = 144 KiB
//   128        2        128 x 128        2        64 + 128 = 192 KiB
// Registers of a computing thread at head_dim 64 / 128: scores 64, P 32, out 32 / 64.
template <int kHeadDim, int kGroups>
struct ForwardTile {
  static constexpr int kQueries = 64 * kGroups, kKeys = 128, kStages = kHeadDim == 128 ? 2 : 3;
  static constexpr int kThreads = kWarpgroup * (1 + kGroups);
  // Launched with 168 each, 64,512 in all (2 groups), or 128 each, 65,536 (3); the loading warpgroup gives some to the
  // others.
  static constexpr int kLoadingRegisters = kGroups == 2 ? 40 : 32, kComputingRegisters = kGroups == 2 ? 232 : 160;
  static constexpr bool kLeftInRegisters = kHeadDim == 64 && kGroups == 2;  // Q, which is read for every tile

  using Q = Tile<kQueries, kHeadDim>;
  using K = Tile<kKeys, kHeadDim>;  // and V
  using QRing = Ring<2, Q::kBytes>;
  using KRing = Ring<kStages, K::kBytes>;
  static constexpr int kBarriers = QRing::kSharedBytes + 2 * KRing::kSharedBytes;  // where they start
  static constexpr int kSharedBytes = kBarriers + QRing::kBarrierBytes + 2 * KRing::kBarrierBytes;
};

// What the two sides of the kernel must agree on.
template <typename Sizes>
struct Forward {
  typename Sizes::QRing q_ring;
  typename Sizes::KRing k_ring, v_ring;

  PHI1_DEVICE explicit Forward(uint32_t shared)
      : q_ring{shared, shared + uint32_t(Sizes::kBarriers)},
        k_ring{shared + uint32_t(Sizes::QRing::kSharedBytes), q_ring.barriers + uint32_t(Sizes::QRing::kBarrierBytes)},
        v_ring{k_ring.tiles + uint32_t(Sizes::KRing::kSharedBytes),
               k_ring.barriers + uint32_t(Sizes::KRing::kBarrierBytes)} {}
};

// The running softmax of a lane's two rows.
struct Softmax {
  float scale;                               // times log2(e), so that exp(scale x) = 2^(scale log2(e) x)
  float most[2] = {-kInfinity, -kInfinity};  // of the raw products
  float sum[2] = {0.0f, 0.0f};               // of this lane's columns

  // s becomes exp(scale (s - most)); correction: what sums made so far must be multiplied by.
  template <int kN>
  PHI1_DEVICE void update(float (&s)[kN][4], float (&correction)[2]) {
    float shift[2], scaled[2];
    bool large = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float highest = most[half];
#pragma unroll
      for (int n = 0; n < kN; ++n) highest = max_f32(highest, max_f32(s[n][2 * half], s[n][2 * half + 1]));
      highest = max_f32(highest, shfl_xor(highest, 1));
      highest = max_f32(highest, shfl_xor(highest, 2));
      // A row with no score above -inf: any finite shift, for 2^(-inf - shift) is 0 and 2^(-inf + inf) is not.
      shift[half] = highest == -kInfinity ? 0.0f : highest;
      correction[half] = ex2((most[half] - shift[half]) * scale);
      most[half] = highest;
      scaled[half] = shift[half] * scale;
      large |= is_large(scaled[half]);
    }
    // One multiply-add an exponent. Its shift is rounded, by which all of a row are off alike. If it is large the
    // highest is taken off first, so that it gives 2^0 however large it is.
    if (large) take_off(s, shift, scaled);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = sum[half] * correction[half];
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) total += s[n][i] = ex2(s[n][i] * scale - scaled[half]);
      sum[half] = total;
    }
  }

  template <int kN>
  static PHI1_DEVICE void take_off(float (&s)[kN][4], const float (&shift)[2], float (&scaled)[2]) {
    for_each(as_tiles(s), 0, 0, [&](float& x, const Element& at) { x -= shift[at.i / 2]; });
    scaled[0] = scaled[1] = 0.0f;
  }
};

// The loading warpgroup: Q of each work, and its keys and values from the last tile to the first, K a tile ahead of V.
template <typename Sizes>
PHI1_DEVICE void load_forward(const ScheduledArgs& scheduled, const Forward<Sizes>& shared, int thread) {
  const AttentionArgs& args = scheduled.attention;
  Loader loader{thread};
  Turn<2> q_turn;
  Turn<Sizes::kStages> k_turn, v_turn;
  for_each_work<true, Sizes::kQueries>(scheduled, [&](const Work& work) {
    const int tiles = key_tiles<Sizes::kQueries, Sizes::kKeys>(args, work);
    if (tiles == 0) return;
    const int kv_head = int(work.head / (args.heads / args.kv_heads));
    const Rows q{head_data(args, args.q, work, work.head, work.q_row), args.q.seq_stride};
    const Rows k{head_data(args, args.k, work, kv_head, work.k_row), args.k.seq_stride};
    const Rows v{head_data(args, args.v, work, kv_head, work.k_row), args.v.seq_stride};
    const auto load_k = [&](int tile) {
      loader.load(shared.k_ring, k_turn,
                  [&](uint32_t to) { Sizes::K::load(to, k, tile * Sizes::kKeys, work.seqlen_k, thread); });
    };
    const auto load_v = [&](int tile) {
      loader.load(shared.v_ring, v_turn,
                  [&](uint32_t to) { Sizes::K::load(to, v, tile * Sizes::kKeys, work.seqlen_k, thread); });
    };
    loader.load(shared.q_ring, q_turn, [&](uint32_t to) { Sizes::Q::load(to, q, work.first, work.seqlen_q, thread); });
    load_k(tiles - 1);
    for (int tile = tiles - 2; tile >= 0; --tile) load_k(tile), load_v(tile + 1);
    load_v(0);
  });
  loader.finish();
}

// Computing warpgroup number `group`: 64 rows of each work's tile.
template <typename T, int kHeadDim, int kGroups, typename Sizes>
PHI1_DEVICE void compute_forward(const ScheduledArgs& scheduled, const Forward<Sizes>& shared, int group) {
  constexpr int kN = Sizes::kKeys / 8;
  const AttentionArgs& args = scheduled.attention;
  const int g = lane_index() / 4, t = lane_index() % 4;
  const int warp_row = 64 * group + warp_index() % 4 * 16;  // in the tile
  Turn<2> q_turn;
  Turn<Sizes::kStages> k_turn, v_turn;

  // Named barrier 1 + i: warpgroup i may issue. Warpgroup 0 starts, and the last one to have issued hands on to it.
  constexpr int kTurnThreads = 2 * kWarpgroup;
  const auto my_turn = [&] { bar_sync_named(1 + group, kTurnThreads); };
  const auto next_turn = [&] { bar_arrive_named(1 + (group + 1) % kGroups, kTurnThreads); };
  if (group == kGroups - 1) next_turn();

  for_each_work<true, Sizes::kQueries>(scheduled, [&](const Work& work) {
    const int tiles = key_tiles<Sizes::kQueries, Sizes::kKeys>(args, work), visible = visible_keys(args, work);
    const int row = work.first + warp_row;  // the warp's first, in the sequence
    float out[kHeadDim / 8][4], s[kN][4], correction[2];
    uint32_t p[kN / 2][4], q[kHeadDim / 16][4];
    const uint32_t q_tile = shared.q_ring.tile(q_turn);
    Softmax softmax{args.scale * kLog2e};
    clear(as_tiles(out));

    // The raw scores of a tile become exponentials, hidden and dropped.
    const auto exponentials = [&](int tile) {
      const int column = tile * Sizes::kKeys;
      // Only tiles on the diagonal, or over the end of the keys, have something to hide.
      if (column + Sizes::kKeys > minimum(work.seqlen_k, row + visible)) {
        const int first = row + g + visible;
        const int limit[2] = {minimum(work.seqlen_k, first) - column - 2 * t,
                              minimum(work.seqlen_k, first + 8) - column - 2 * t};
        hide_from(limit, -kInfinity, s);
      }
      softmax.update(s, correction);
      if (args.dropout_threshold)  // the scale is applied at the end
        drop(args, work.batch * int(args.heads) + work.head, row, column, as_tiles<kN>(s));
    };
    const auto issue_scores = [&] {
      shared.k_ring.wait_full(k_turn);
      wgmma_fence();
      const uint32_t k_tile = shared.k_ring.tile(k_turn);
      if constexpr (Sizes::kLeftInRegisters)
        product_rows<T, typename Sizes::K>(s, q, k_tile);
      else
        product_rows<T, typename Sizes::Q, typename Sizes::K, kHeadDim>(s, q_tile, 64 * group, k_tile);
      wgmma_commit();
    };
    const auto issue_out = [&] {
      shared.v_ring.wait_full(v_turn);
      wgmma_fence();
      product_columns<T, typename Sizes::K>(out, p, shared.v_ring.tile(v_turn));
      wgmma_commit();
    };

    if (tiles > 0) {
      shared.q_ring.wait_full(q_turn);
      if constexpr (Sizes::kLeftInRegisters) {
        Sizes::Q::read_rows(q, q_tile, warp_row);
        shared.q_ring.release(q_turn);
      }
      my_turn();
      issue_scores();
      next_turn();
      wgmma_wait<0>(s);
      shared.k_ring.release(k_turn);
      k_turn.next();
      exponentials(tiles - 1);
      round_to<T>(p, s);
      for (int tile = tiles - 2; tile >= 0; --tile) {
        my_turn();
        issue_scores();  // of this tile
        issue_out();     // of the tile before
        next_turn();
        wgmma_wait<1>(s);
        shared.k_ring.release(k_turn);
        k_turn.next();
        exponentials(tile);
        wgmma_wait<0>(out);
        shared.v_ring.release(v_turn);
        v_turn.next();
        if (any_lane(correction[0] != 1.0f || correction[1] != 1.0f))
          for_each(as_tiles(out), 0, 0, [&](float& x, const Element& at) { x *= correction[at.i / 2]; });
        round_to<T>(p, s);
      }
      if constexpr (!Sizes::kLeftInRegisters) shared.q_ring.release(q_turn);
      q_turn.next();
      issue_out();
      wgmma_wait<0>(out);
      shared.v_ring.release(v_turn);
      v_turn.next();
    }

    float* const lse = args.lse + stats_row(args, work, work.head);
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = softmax.sum[half];
      total += shfl_xor(total, 1);
      total += shfl_xor(total, 2);
      factor[half] = total == 0.0f ? 0.0f : args.dropout_scale / total;
      const int query = row + 8 * half + g;
      if (t == 0 && query < work.seqlen_q) st_global(lse + query, log_sum_exp(softmax.most[half] * args.scale, total));
    }
    uint16_t* const to = head_data(args, args.out, work, work.head, work.q_row) + row * args.out.seq_stride;
    store_rows<T>(out, factor, to, args.out.seq_stride, work.seqlen_q - row);
  });
  if (group == 0) my_turn();  // the last one handed on is taken
}

// grid: a block for each multiprocessor; block: ForwardTile::kThreads.
template <typename T, int kHeadDim, int kGroups>
__global__ void __launch_bounds__(ForwardTile<kHeadDim, kGroups>::kThreads, 1)
    attention_forward_kernel(const __grid_constant__ ScheduledArgs scheduled) {
  using Sizes = ForwardTile<kHeadDim, kGroups>;
  const Forward<Sizes> shared(shared_base());
  if (thread_index() == 0) {
    shared.q_ring.init(kGroups);
    shared.k_ring.init(kGroups);
    shared.v_ring.init(kGroups);
  }
  bar_sync();
  const int warpgroup = warpgroup_index();
  if (warpgroup == 0) {
    setmaxnreg_dec<Sizes::kLoadingRegisters>();
    load_forward(scheduled, shared, thread_index() % kWarpgroup);
  } else {
    setmaxnreg_inc<Sizes::kComputingRegisters>();
    compute_forward<T, kHeadDim, kGroups>(scheduled, shared, warpgroup - 1);
  }
}

}  // namespace phi1::cuda::hopper
