// From a call's dtype and head_dim to a template's arguments; the memory that an attention kernel may touch.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/attention.cuh"
#include "cuda/launch.h"

namespace phi1::cuda {

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Calls f(element type, Constant<head_dim>).
template <typename F>
void dispatch(const AttentionArgs& args, F f) {
#if defined(PHI1_ONE_INSTANCE)  // builds of mutated kernels: bf16, head_dim 64
  if (args.dtype == DType::bf16 && args.head_dim == 64) return f(bf16{}, Constant<64>{});
#else
  const auto with_dim = [&](auto element) {
    switch (args.head_dim) {
      case 32: return f(element, Constant<32>{});
      case 64: return f(element, Constant<64>{});
      case 128: return f(element, Constant<128>{});
    }
    throw std::invalid_argument("attention: head_dim = " + std::to_string(args.head_dim) + ": must be 32, 64 or 128");
  };
  if (args.dtype == DType::bf16) return with_dim(bf16{});
  if (args.dtype == DType::f16) return with_dim(f16{});
#endif
  throw std::invalid_argument("attention: dtype code " + std::to_string(int(args.dtype)) + ": must be bf16 or fp16");
}

inline Region query_region(const AttentionArgs& args, const HeadsTensor& x) {
  return heads_region(x, args.batch, args.seqlen_q, args.heads, args.head_dim, 2);
}
inline Region key_region(const AttentionArgs& args, const HeadsTensor& x) {
  return heads_region(x, args.batch, args.seqlen_k, args.kv_heads, args.head_dim, 2);
}
// One number of `bytes` bytes for each query and head.
inline Region stats_region(const AttentionArgs& args, const float* x, int64_t bytes) {
  return {x, args.batch * args.heads * args.seqlen_q * bytes};
}
inline Region offsets_region(const AttentionArgs& args, const int32_t* x) {
  return {x, x ? (args.documents + 1) * 4 : 0};
}

}  // namespace phi1::cuda
