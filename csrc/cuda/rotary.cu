#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/rotary.cuh"

namespace phi1::cuda {

namespace {
template <typename T>
void launch(const RotaryArgs& args, cudaStream_t stream) {
  rotary_kernel<T><<<unsigned(args.batch * args.seq), 32 * kRotaryWarps, 0, stream>>>(args);
}
}  // namespace

void rotary(const RotaryArgs& args, void* stream) {
  check_grid("rotary", "batch * seq", args.batch * args.seq);
  const auto s = static_cast<cudaStream_t>(stream);
  switch (args.dtype) {
    case DType::f32: launch<float>(args, s); break;
    case DType::bf16: launch<__nv_bfloat16>(args, s); break;
    case DType::f16: launch<__half>(args, s); break;
  }
  check_launch("rotary");
}

}  // namespace phi1::cuda
