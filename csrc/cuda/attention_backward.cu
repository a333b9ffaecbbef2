#include "cuda/attention_backward.cuh"
#include "cuda/attention_launch.h"
#include "cuda/kernels.h"

namespace phi1::cuda {

void attention_row_stats(const AttentionArgs& args, void* stream) {
  dispatch(args, [&](auto element, auto head_dim) {
    using T = decltype(element);
    constexpr int kHeadDim = decltype(head_dim)::value;
    constexpr int64_t kRows = kAttentionThreads / (kHeadDim / 8);
    launch("attention_row_stats", attention_row_stats_kernel<T, kHeadDim>,
           (args.batch * args.heads * args.seqlen_q + kRows - 1) / kRows, kAttentionThreads, 0, stream,
           {query_region(args, args.out), query_region(args, args.grad_out), stats_region(args, args.lse, 4),
            stats_region(args, args.row_stats, 8)},
           args);
  });
}

void attention_backward(const AttentionArgs& args, void* stream) {
  attention_row_stats(args, stream);
  dispatch(args, [&](auto element, auto head_dim) {
    using T = decltype(element);
    constexpr int kHeadDim = decltype(head_dim)::value;
    using Keys = KeyGradTile<kHeadDim>;
    const ScheduledArgs keys = schedule_keys("attention_key_grad", args, Keys::kKeys);
    launch("attention_key_grad", attention_key_grad_kernel<T, kHeadDim>, keys.works, kAttentionThreads,
           Keys::kSharedBytes, stream,
           {query_region(args, args.q), key_region(args, args.k), key_region(args, args.v),
            query_region(args, args.grad_out), stats_region(args, args.row_stats, 8), key_region(args, args.grad_k),
            key_region(args, args.grad_v), offsets_region(args, args.cu_seqlens_q),
            offsets_region(args, args.cu_seqlens_k), seed_region(args)},
           keys);
    using Queries = QueryGradTile<kHeadDim>;
    const ScheduledArgs queries = schedule_queries("attention_query_grad", args, Queries::kQueries);
    launch("attention_query_grad", attention_query_grad_kernel<T, kHeadDim>, queries.works, kAttentionThreads,
           Queries::kSharedBytes, stream,
           {query_region(args, args.q), key_region(args, args.k), key_region(args, args.v),
            query_region(args, args.grad_out), stats_region(args, args.row_stats, 8), query_region(args, args.grad_q),
            offsets_region(args, args.cu_seqlens_q), offsets_region(args, args.cu_seqlens_k), seed_region(args)},
           queries);
  });
}

}  // namespace phi1::cuda
