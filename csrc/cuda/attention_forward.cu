#include "cuda/attention_forward.cuh"
#include "cuda/attention_launch.h"
#include "cuda/kernels.h"

namespace phi1::cuda {

void attention_forward(const AttentionArgs& args, void* stream) {
  dispatch(args, [&](auto element, auto head_dim) {
    using T = decltype(element);
    constexpr int kHeadDim = decltype(head_dim)::value;
    using Sizes = ForwardTile<kHeadDim>;
    const ScheduledArgs scheduled = schedule_queries("attention_forward", args, Sizes::kRows);
    launch("attention_forward", attention_forward_kernel<T, kHeadDim>, scheduled.works, kAttentionThreads,
           Sizes::kSharedBytes, stream,
           {query_region(args, args.q), key_region(args, args.k), key_region(args, args.v),
            query_region(args, args.out), stats_region(args, args.lse, 4), offsets_region(args, args.cu_seqlens_q),
            offsets_region(args, args.cu_seqlens_k), seed_region(args)},
           scheduled);
  });
}

}  // namespace phi1::cuda
