#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/rotary.cuh"

namespace phi1::cuda {

namespace {

// Whether every row can be moved in runs of eight elements, 16 bytes a lane.
template <typename T>
bool in_runs(const RotaryArgs& args) {
  const auto aligned = [](const HeadsTensor& x) {
    const int64_t together = x.batch_stride | x.seq_stride | x.head_stride;
    return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && together % (16 / int64_t(sizeof(T))) == 0;
  };
  const auto table = [](const float* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; };
  return args.half % 8 == 0 && args.head_dim % 16 == 0 && aligned(args.in[0]) && aligned(args.in[1]) &&
         aligned(args.out[0]) && aligned(args.out[1]) && table(args.cos) && table(args.sin);
}

template <typename T>
void launch_rotary(const RotaryArgs& args, void* stream) {
  const auto region = [&](const HeadsTensor& x, int which) {
    return heads_region(x, args.batch, args.seq, args.heads[which], args.head_dim, sizeof(T));
  };
  // The kernel trusts the caller that positions are rows of the table.
  const int64_t table = args.position ? INT64_MAX / 8 : args.seq * args.half * 4;
  const bool runs = in_runs<T>(args);
  const int64_t tokens = args.batch * args.seq, units = (args.heads[0] + args.heads[1]) * (args.head_dim / 16);
  launch("rotary", runs ? rotary_runs_kernel<T> : rotary_kernel<T>,
         runs ? blocks_for(tokens * units, kRotaryThreads) : tokens, kRotaryThreads, 0, stream,
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
