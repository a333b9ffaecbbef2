#include "cuda/block.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace phi1::cuda {

namespace {

template <typename T>
int64_t bytes(int64_t elements) {
  return elements * int64_t(sizeof(T));
}

int64_t strips(const AfterInArgs& args) {
  return blocks_for((args.width - args.inner) / 16, kBlockThreads) + blocks_for(args.inner / 8, kBlockThreads);
}

// What both passes of AfterInArgs touch, and one more.
template <typename T>
void launch_after_in(const char* name, void (*kernel)(AfterInArgs), int64_t blocks, void* stream, Region more,
                     const AfterInArgs& args) {
  const int64_t tokens = args.batch * args.seq, table = args.table_rows * args.half * 4;
  launch(name, kernel, blocks, kBlockThreads, 0, stream,
         {{args.z, bytes<T>(tokens * args.width)},
          {args.bias, bytes<T>(args.width)},
          {args.activated, bytes<T>((tokens - 1) * args.activated_stride + args.inner)},
          {args.cos, table},
          {args.sin, table},
          {args.position, args.position ? ((args.batch - 1) * args.position_batch_stride + args.seq) * 8 : 0},
          {args.partial, args.chunks * args.width * 4},
          more},
         args);
}

template <typename T>
void launch_sum(const BlockSumArgs& args, void* stream) {
  launch("block_sum", block_sum_kernel<T>, blocks_for(args.columns, kSumColumns), kSumThreads, kSumSharedBytes, stream,
         {{args.partial, args.chunks * args.columns * 4}, {args.sum, bytes<T>(args.columns)}}, args);
}

// Calls f with a value of the element type and the activation's functor.
template <typename F>
void with_type_and_activation(const AfterInArgs& args, F f) {
  with_type(args.dtype,
            [&](auto element) { with_activation(args.activation, [&](auto activation) { f(element, activation); }); });
}

}  // namespace

void after_in(const AfterInArgs& args, void* stream) {
  with_type_and_activation(args, [&](auto element, auto activation) {
    using T = decltype(element);
    launch_after_in<T>("after_in", after_in_kernel<T, decltype(activation)>,
                       strips(args) * blocks_for(args.batch * args.seq, kBlockRows), stream, {nullptr, 0}, args);
  });
}

void after_in_backward(const AfterInArgs& args, void* stream) {
  with_type_and_activation(args, [&](auto element, auto activation) {
    using T = decltype(element);
    launch_after_in<T>("after_in_grad", after_in_grad_kernel<T, decltype(activation)>, strips(args) * args.chunks,
                       stream, {args.grad_z, bytes<T>(args.batch * args.seq * args.width)}, args);
    launch_sum<T>({args.partial, args.grad_bias, args.chunks, args.width}, stream);
  });
}

void residual(const ResidualArgs& args, void* stream) {
  with_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t all = bytes<T>(args.rows * args.columns);
    launch("residual", args.dropout_threshold ? residual_kernel<T, true> : residual_kernel<T, false>,
           blocks_for(args.columns / 8, kBlockThreads) * blocks_for(args.rows, kBlockRows), kBlockThreads, 0, stream,
           {{args.h, all}, {args.x, all}, {args.bias, bytes<T>(args.columns)}, seed_region(args)}, args);
  });
}

void residual_backward(const ResidualArgs& args, void* stream) {
  with_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t all = bytes<T>(args.rows * args.columns);
    launch("residual_grad", args.dropout_threshold ? residual_grad_kernel<T, true> : residual_grad_kernel<T, false>,
           blocks_for(args.columns / 8, kBlockThreads) * args.chunks, kBlockThreads, 0, stream,
           {{args.grad_y, all},
            {args.h, args.dropout_threshold ? all : 0},
            {args.partial, args.chunks * args.columns * 4},
            seed_region(args)},
           args);
    launch_sum<T>({args.partial, args.grad_bias, args.chunks, args.columns}, stream);
  });
}

}  // namespace phi1::cuda
