// In which order attention's tiles are worked on.
//
// Their list goes through sections of heads whose keys and values (or queries and gradients) fit the L2 cache together,
// in each section by the tile's number with all heads side by side, the tiles with most work under a causal mask first:
// the last rows of queries, which see most keys; the first keys, which are seen by most queries. Simulated makespan
// over ideal on 132 multiprocessors, causal, head_dim 64, 128 rows a tile, for batch x sequence x heads:
//                                 8 x 2,048 x 32   8 x 2,048 x 16   1 x 2,048 x 32   1 x 16,384 x 32
//   two blocks at a time, mma          1.01             1.02             1.03              1.00
//   the same, head by head             1.07-1.08        1.14-1.15        1.60-1.63         1.06-1.08
//   one block, hopper                  1.03             1.09                               1.04
#pragma once

#include "cuda/attention.cuh"

namespace phi1::cuda {

// Of keys and values, or of queries and gradients. Under the emulator little, so that there are several sections.
#if defined(PHI1_EMULATOR)
constexpr int64_t kSectionBytes = int64_t(64) << 10;
#else
constexpr int64_t kSectionBytes = int64_t(32) << 20;
#endif

struct ScheduledArgs {
  AttentionArgs attention;
  int works;    // length of the list; of packed documents a bound
  int section;  // heads in a section
};

// Finds number `index` of the list; false: a document's tiles were fewer than the bound. kQueries: tiles of query rows,
// else of key rows.
template <bool kQueries, int kRows>
PHI1_DEVICE bool find_work(const ScheduledArgs& scheduled, int index, Work& work) {
  const AttentionArgs& args = scheduled.attention;
  const int heads = int(kQueries ? args.heads : args.kv_heads);
  work.q_row = work.k_row = 0;
  work.seqlen_q = int(args.seqlen_q), work.seqlen_k = int(args.seqlen_k);
  int tile, tiles;
  if (args.cu_seqlens_q == nullptr) {
    tiles = ceil_div(kQueries ? work.seqlen_q : work.seqlen_k, kRows);
    const int first = index / (scheduled.section * tiles) * scheduled.section;  // head of the section, over the batch
    const int together = minimum(scheduled.section, int(args.batch) * heads - first);
    const int in_section = index - first * tiles, head = first + in_section % together;
    tile = in_section / together;
    work.batch = head / heads, work.head = head % heads;
  } else {
    tile = index / heads;
    work.head = index % heads;
    if (!find_document<kQueries, kRows>(args, work, tile, tiles)) return false;
  }
  work.first = (kQueries ? tiles - 1 - tile : tile) * kRows;
  return true;
}

// Calls f(work) for each of this block's tiles, where a grid is as many blocks as there are multiprocessors: block b
// takes numbers b, b + blocks, ..., so that the loads of its next tile run under the end of this one.
template <bool kQueries, int kRows, typename F>
PHI1_DEVICE void for_each_work(const ScheduledArgs& scheduled, F f) {
  for (int index = block_index(); index < scheduled.works; index += block_count()) {
    Work work;
    if (find_work<kQueries, kRows>(scheduled, index, work)) f(work);
  }
}

}  // namespace phi1::cuda
