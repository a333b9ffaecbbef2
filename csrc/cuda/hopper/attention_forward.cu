#include "cuda/hopper/attention_forward.cuh"
#include "cuda/hopper/launch.h"
#include "cuda/kernels.h"

namespace phi1::cuda::hopper {

namespace {

template <typename T, int kHeadDim, int kGroups>
void launch_forward(const AttentionArgs& args, void* stream) {
  launch_queries<ForwardTile<kHeadDim, kGroups>>(
      "hopper_attention_forward", attention_forward_kernel<T, kHeadDim, kGroups>, args, stream,
      {query_region(args, args.q), key_region(args, args.k), key_region(args, args.v), query_region(args, args.out),
       stats_region(args, args.lse, 4), offsets_region(args, args.cu_seqlens_q),
       offsets_region(args, args.cu_seqlens_k), seed_region(args)});
}

}  // namespace

void attention_forward(const AttentionArgs& args, void* stream) {
  hopper::dispatch(args, [&](auto element, auto head_dim) {
    launch_forward<decltype(element), decltype(head_dim)::value, 2>(args, stream);
  });
}

void attention_forward_wide(const AttentionArgs& args, void* stream) {
  hopper::dispatch(args, [&](auto element, auto head_dim) {
    constexpr int kHeadDim = decltype(head_dim)::value;
    // At head_dim 128 the registers are too few, with dropout three are slower than two.
    if (kHeadDim == 64 && !args.dropout_threshold)
      launch_forward<decltype(element), 64, 3>(args, stream);
    else
      launch_forward<decltype(element), kHeadDim, 2>(args, stream);
  });
}

}  // namespace phi1::cuda::hopper
