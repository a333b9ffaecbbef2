// From a call's dtype and head_dim to a template's arguments; its tiles; the memory that an attention kernel may touch.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/attention.cuh"
#include "cuda/launch.h"
#include "cuda/schedule.cuh"

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

// Heads whose tensors fit in a section of the L2 cache together: bytes for each `together` of them, `heads` in all.
inline int section_of(int64_t bytes, int64_t together, int64_t heads) {
  const int64_t fit = kSectionBytes / (bytes > 0 ? bytes : 1);
  const int64_t section = (fit > 1 ? fit : 1) * together;
  return int(section < heads ? section : heads);
}

// works: tiles over all heads.
inline ScheduledArgs schedule(const char* name, const AttentionArgs& args, int64_t works, int section) {
  if (works > 0x7fffffff)
    throw std::invalid_argument(std::string("CUDA kernel ") + name + ": " + std::to_string(works) +
                                " tiles: must be in 1..2147483647; split the batch");
  return {args, int(works), section};
}

// Tiles of `rows` queries, over which keys and values are read; of keys, over which queries and gradients are.
inline ScheduledArgs schedule_queries(const char* name, const AttentionArgs& args, int rows) {
  return schedule(name, args, count_tiles(args, args.seqlen_q, rows) * args.heads,
                  section_of(4 * args.seqlen_k * args.head_dim, args.heads / args.kv_heads, args.batch * args.heads));
}
inline ScheduledArgs schedule_keys(const char* name, const AttentionArgs& args, int rows) {
  return schedule(
      name, args, count_tiles(args, args.seqlen_k, rows) * args.kv_heads,
      section_of(4 * args.seqlen_q * args.head_dim * args.heads / args.kv_heads, 1, args.batch * args.kv_heads));
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
