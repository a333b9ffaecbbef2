#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/rotary.cuh"

namespace phi1::cuda {

namespace {

template <typename T>
void launch_rotary(const RotaryArgs& args, void* stream) {
  const auto region = [&](const HeadsTensor& x, int which) {
    return heads_region(x, args.batch, args.seq, args.heads[which], args.head_dim, sizeof(T));
  };
  // The kernel trusts the caller that positions are rows of the table.
  const int64_t table = args.position ? INT64_MAX / 8 : args.seq * args.half * 4;
  launch("rotary", rotary_kernel<T>, args.batch * args.seq, 32 * kRotaryWarps, 0, stream,
         {region(args.in[0], 0),
          region(args.in[1], 1),
          region(args.out[0], 0),
          region(args.out[1], 1),
          {args.cos, table},
          {args.sin, table},
          {args.position, args.position ? ((args.batch - 1) * args.position_batch_stride + args.seq) * 8 : 0}},
         args);
}

}  // namespace

void rotary(const RotaryArgs& args, void* stream) {
  switch (args.dtype) {
    case DType::f32: return launch_rotary<float>(args, stream);
    case DType::bf16: return launch_rotary<bf16>(args, stream);
    case DType::f16: return launch_rotary<f16>(args, stream);
  }
}

}  // namespace phi1::cuda
