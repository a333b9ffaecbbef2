#include "cuda/cross_entropy.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace phi1::cuda {

namespace {

template <typename T>
void launch_cross_entropy(const char* name, void (*kernel)(CrossEntropyArgs), int64_t blocks, int threads, int shared,
                          void* stream, Region more, const CrossEntropyArgs& args) {
  const int64_t row = args.columns * int64_t(sizeof(T));
  launch(name, kernel, blocks, threads, shared, stream,
         {{args.logits, args.rows * row},
          {args.bias, row},
          {args.targets, args.rows * 8},
          {args.stats, args.rows * 8},
          more},
         args);
}

}  // namespace

void cross_entropy(const CrossEntropyArgs& args, void* stream) {
  with_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    launch_cross_entropy<T>("cross_entropy", cross_entropy_kernel<T>, args.rows, kLossThreads, kLossSharedBytes, stream,
                            {args.loss, args.rows * 4}, args);
  });
}

void cross_entropy_backward(const CrossEntropyArgs& args, void* stream) {
  with_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    launch_cross_entropy<T>("cross_entropy_grad", cross_entropy_grad_kernel<T>,
                            blocks_for(args.columns / 8, kBlockThreads) * args.chunks, kBlockThreads, 0, stream,
                            {args.bias_sums, args.chunks * args.columns * 4}, args);
  });
}

}  // namespace phi1::cuda
