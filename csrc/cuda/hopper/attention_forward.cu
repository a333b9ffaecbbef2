#include "cuda/hopper/attention_forward.cuh"
#include "cuda/hopper/launch.h"

namespace phi1::cuda::hopper {

void attention_forward(const AttentionArgs& args, void* stream) {
  hopper::dispatch(args, [&](auto element, auto head_dim) {
    using T = decltype(element);
    constexpr int kHeadDim = decltype(head_dim)::value;
    launch_queries<ForwardTile<kHeadDim>>(
        "hopper_attention_forward", attention_forward_kernel<T, kHeadDim>, args, stream,
        {query_region(args, args.q), key_region(args, args.k), key_region(args, args.v), query_region(args, args.out),
         stats_region(args, args.lse, 4), offsets_region(args, args.cu_seqlens_q),
         offsets_region(args, args.cu_seqlens_k), seed_region(args)});
  });
}

}  // namespace phi1::cuda::hopper
