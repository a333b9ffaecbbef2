#include "cuda/hopper/attention_backward.cuh"
#include "cuda/hopper/launch.h"
#include "cuda/kernels.h"

namespace phi1::cuda::hopper {

void attention_backward(const AttentionArgs& args, void* stream) {
  attention_row_stats(args, stream);
  hopper::dispatch(args, [&](auto element, auto head_dim) {
    using T = decltype(element);
    constexpr int kHeadDim = decltype(head_dim)::value;
    launch_keys<hopper::KeyGradTile<kHeadDim>>(
        "hopper_attention_key_grad", hopper::attention_key_grad_kernel<T, kHeadDim>, args, stream,
        {query_region(args, args.q), key_region(args, args.k), key_region(args, args.v),
         query_region(args, args.grad_out), stats_region(args, args.row_stats, 8), key_region(args, args.grad_k),
         key_region(args, args.grad_v), offsets_region(args, args.cu_seqlens_q),
         offsets_region(args, args.cu_seqlens_k), seed_region(args)});
    launch_queries<hopper::QueryGradTile<kHeadDim>>(
        "hopper_attention_query_grad", hopper::attention_query_grad_kernel<T, kHeadDim>, args, stream,
        {query_region(args, args.q), key_region(args, args.k), key_region(args, args.v),
         query_region(args, args.grad_out), stats_region(args, args.row_stats, 8), query_region(args, args.grad_q),
         offsets_region(args, args.cu_seqlens_q), offsets_region(args, args.cu_seqlens_k), seed_region(args)});
  });
}

}  // namespace phi1::cuda::hopper
