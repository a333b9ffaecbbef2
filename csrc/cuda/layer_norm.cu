#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/layer_norm.cuh"

namespace phi1::cuda {

void layer_norm_forward(const LayerNormArgs& args, void* stream) {
  with_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t row = args.hidden * int64_t(sizeof(T)), all = args.rows * row;
    launch("layer_norm", layer_norm_kernel<T>, blocks_for(args.rows, kNormWarps), kNormThreads, 0, stream,
           {{args.x, ((args.rows - 1) * args.x_stride + args.hidden) * int64_t(sizeof(T))},
            {args.weight, row},
            {args.bias, row},
            {args.y, all},
            {args.stats, args.rows * 8}},
           args);
  });
}

void layer_norm_backward(const LayerNormArgs& args, void* stream) {
  with_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t row = args.hidden * int64_t(sizeof(T)), all = args.rows * row;
    const Region x{args.x, ((args.rows - 1) * args.x_stride + args.hidden) * int64_t(sizeof(T))};
    const Region grad{args.grad_y, all}, stats{args.stats, args.rows * 8};
    const Region partial{args.partial, args.chunks * 2 * args.hidden * 4};
    launch("layer_norm_grad", layer_norm_grad_kernel<T>, blocks_for(args.rows, kNormWarps), kNormThreads, 0, stream,
           {x, grad, stats, {args.weight, row}, {args.residual, args.residual ? all : 0}, {args.y, all}}, args);
    launch("layer_norm_partial", layer_norm_partial_kernel<T>, blocks_for(args.hidden, kNormColumns) * args.chunks,
           kNormThreads, kNormSharedBytes, stream, {x, grad, stats, partial}, args);
    launch("layer_norm_sum", layer_norm_sum_kernel<T>, blocks_for(2 * args.hidden, kNormThreads), kNormThreads, 0,
           stream, {partial, {args.grad_weight, row}, {args.grad_bias, row}}, args);
  });
}

}  // namespace phi1::cuda
