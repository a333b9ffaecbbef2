// What every version of the backward begins with.
#pragma once

#include "cuda/attention_backward.cuh"
#include "cuda/attention_launch.h"

namespace phi1::cuda {

template <typename T, int kHeadDim>
void launch_row_stats(const AttentionArgs& args, void* stream) {
  constexpr int64_t kRows = kAttentionThreads / (kHeadDim / 8);
  launch("attention_row_stats", attention_row_stats_kernel<T, kHeadDim>,
         (args.batch * args.heads * args.seqlen_q + kRows - 1) / kRows, kAttentionThreads, 0, stream,
         {query_region(args, args.out), query_region(args, args.grad_out), stats_region(args, args.lse, 4),
          stats_region(args, args.row_stats, 8)},
         args);
}

}  // namespace phi1::cuda
