// What the attention kernels share: a block's share of the work, and what a query sees.
#pragma once

#include "arguments.h"
#include "cuda/dropout.cuh"
#include "cuda/tile.cuh"

namespace phi1::cuda {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_huge_valf();
constexpr int kAttentionWarps = 4, kAttentionThreads = 32 * kAttentionWarps;

// One block's share of the work.
struct Work {
  int batch;             // batch entry, or document
  int head;              // of q, or of k and v
  int first;             // row of the tile's first row (query or key) in this entry
  int64_t q_row, k_row;  // where the entry's rows start in the tensors
  int seqlen_q, seqlen_k;
};

PHI1_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }
PHI1_DEVICE int minimum(int a, int b) { return a < b ? a : b; }
PHI1_DEVICE int maximum(int a, int b) { return a > b ? a : b; }

// Blocks that cover every tile of kRows rows: of packed documents there are at most total / kRows + documents.
inline int64_t count_tiles(const AttentionArgs& args, int64_t seqlen, int rows) {
  return args.cu_seqlens_q ? seqlen / rows + args.documents : (seqlen + rows - 1) / rows * args.batch;
}

// A document's end: its offset, no smaller than its start and no greater than the sequence's length. Of wrong offsets,
// which nobody on the host has looked at, the documents are others, but inside the sequence and apart.
PHI1_DEVICE int document_end(const int32_t* offset, int64_t start, int64_t length) {
  return minimum(maximum(ld_global(offset), int(start)), int(length));
}

// Which of the packed documents holds tile number `tile` of them all, which becomes the number in it of its `tiles`,
// and where its rows are. False: a document's tiles were fewer than the bound.
template <bool kQueries, int kRows>
PHI1_DEVICE bool find_document(const AttentionArgs& args, Work& work, int& tile, int& tiles) {
  int q_end = document_end(args.cu_seqlens_q, 0, args.seqlen_q);
  int k_end = document_end(args.cu_seqlens_k, 0, args.seqlen_k);
  for (work.batch = 0; work.batch < args.documents; ++work.batch, tile -= tiles) {
    work.q_row = q_end, work.k_row = k_end;
    q_end = document_end(args.cu_seqlens_q + work.batch + 1, q_end, args.seqlen_q);
    k_end = document_end(args.cu_seqlens_k + work.batch + 1, k_end, args.seqlen_k);
    work.seqlen_q = q_end - int(work.q_row), work.seqlen_k = k_end - int(work.k_row);
    tiles = ceil_div(kQueries ? work.seqlen_q : work.seqlen_k, kRows);
    if (tile < tiles) return true;
  }
  return false;
}

// Row 0 of this entry's `head` in a (batch, seq, heads, head_dim) tensor.
PHI1_DEVICE uint16_t* head_data(const AttentionArgs& args, const HeadsTensor& x, const Work& work, int head,
                                int64_t row) {
  const int64_t batch = args.cu_seqlens_q ? 0 : work.batch;
  return static_cast<uint16_t*>(x.data) + batch * x.batch_stride + row * x.seq_stride + head * x.head_stride;
}

// Index in lse of query row 0 of this entry.
PHI1_DEVICE int64_t stats_row(const AttentionArgs& args, const Work& work, int head) {
  const int64_t batch = args.cu_seqlens_q ? 0 : work.batch;
  return (batch * args.heads + head) * args.seqlen_q + work.q_row;
}

// Query i sees keys j < min(i + visible_keys, seqlen_k). Causal: the last query sees the last key.
PHI1_DEVICE int visible_keys(const AttentionArgs& args, const Work& work) {
  return args.causal ? work.seqlen_k - work.seqlen_q + 1 : work.seqlen_k;
}

// log(total exp(greatest)), of a row without a score above -inf: -inf, of one with +inf, whose total is NaN: +inf.
PHI1_DEVICE float log_sum_exp(float greatest, float total) {
  if (greatest == kInfinity) return greatest;
  return total == 0.0f ? -kInfinity : greatest + lg2(total) * kLn2;
}

// What P = 2^(scale S - lse) takes for lse, in units of log2. +inf, which makes P = 0, for a row without a score above
// -inf. P is known to a factor of e^(the rounding of lse): from 2^24 on that says nothing any more. There lse is
// lowered by more than it and the products have been rounded by, and with P <= 1, as it is in truth, a lone greatest
// score has P = 1 and its gradient.
PHI1_DEVICE float lse_to_take_off(float lse) {
  if (lse == -kInfinity) return kInfinity;
  const float x = lse * kLog2e;
  if ((x < 0.0f ? -x : x) < 0x1p24f) return x;
  return x * (x > 0.0f ? 1.0f - 0x1p-21f : 1.0f + 0x1p-21f);
}

// P of a score times log2(e) scale: at most 1, where rounding would make it more.
PHI1_DEVICE float probability(float score, float lse) { return ex2(min_nan(score - lse, 0.0f)); }

// Calls kept(m, n, i, keep) for each element x[m][n][i] of a warp's kM x kN accumulators from row `row`, a multiple of
// 16, and column `column`, a multiple of 32. Rows are queries and columns keys, or, kTransposed, the other way round.
template <bool kTransposed, int kM, int kN, class F>
PHI1_DEVICE void for_kept(const AttentionArgs& args, int plane, int row, int column, F&& kept) {
  static_assert(kN % 4 == 0);
  const uint64_t seed = seed_of(args);
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int group = 0; group < kN / 4; ++group) {
      uint32_t word[2][2];
      attention_random<kTransposed>(word, seed, plane, row + 16 * m, column + 32 * group);
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          bool keep[4];
          keep_bytes(keep, word[i][j], args.dropout_threshold);
#pragma unroll
          for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int next = 0; next < 2; ++next)
              kept(m, 4 * group + 2 * i + next, 2 * half + j, keep[kTransposed ? 2 * next + half : 2 * half + next]);
        }
    }
}

// Makes zeros of what is dropped of a warp's accumulators, whose rows are queries from `row` and columns keys from
// `column`. The caller multiplies by dropout_scale.
template <int kM, int kN>
PHI1_DEVICE void drop(const AttentionArgs& args, int plane, int row, int column, float (&x)[kM][kN][4]) {
  for_kept<false, kM, kN>(args, plane, row, column,
                          [&](int m, int n, int i, bool keep) { x[m][n][i] = keep ? x[m][n][i] : 0.0f; });
}

// The same for two matrices whose rows are keys from `row` and columns queries from `column`.
template <int kM, int kN>
PHI1_DEVICE void drop_transposed(const AttentionArgs& args, int plane, int row, int column, float (&p)[kM][kN][4],
                                 float (&dp)[kM][kN][4]) {
  for_kept<true, kM, kN>(args, plane, row, column, [&](int m, int n, int i, bool keep) {
    p[m][n][i] = keep ? p[m][n][i] : 0.0f;
    dp[m][n][i] = keep ? dp[m][n][i] : 0.0f;
  });
}

}  // namespace phi1::cuda
