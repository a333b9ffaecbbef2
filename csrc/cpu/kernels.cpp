// All CPU kernels, compiled once per instruction set with PHI1_ISA naming it (CMakeLists.txt, add_isa).
#include "cpu/kernels.h"

#include <omp.h>

#include <atomic>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <thread>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace phi1::cpu::PHI1_ISA {

// Everything below has internal linkage: no inline function of one instruction set can stand in for another's.
namespace {

#include "cpu/numeric.h"
#include "cpu/rotary.inl"
#include "cpu/vector.h"
//
#include "cpu/half.inl"
//
#include "cpu/attention.inl"
#include "cpu/attention_backward.inl"
#include "cpu/attention_decode.inl"
#include "cpu/attention_forward.inl"
#include "cpu/elementwise.inl"
//
#include "cpu/activation.inl"
#include "cpu/add_product.inl"
#include "cpu/cross_entropy.inl"
#include "cpu/dropout.inl"
#include "cpu/layer_norm.inl"
//
#include "cpu/block.inl"
#include "cpu/product.inl"

#if defined(__AMX_BF16__)
using RoundedDot = DotTiles;
#elif defined(__AVX512BF16__)
using RoundedDot = DotBf16;
#else
using RoundedDot = DotF32;  // products of bf16 are float32's
#endif

void exp2_array(const float* in, float* out, int64_t count, Exp2 form) {
  [[maybe_unused]] const RoundedDot::Setup setup;
  for_lanes(count, [&](int64_t i, auto n) {
    const vfloat x = vload(in + i, n);
#if defined(__AMX_BF16__)
    if (form == Exp2::beside_tiles) return vstore(out + i, exp2_beside_tiles(x), n);
#endif
    vstore(out + i, form == Exp2::full ? exp2(x) : RoundedDot::exp2(x), n);
  });
}

}  // namespace

extern const Kernels table;
const Kernels table = {rotary,      attention_forward, attention_backward, layer_norm_forward, layer_norm_backward,
                       after_in,    after_in_backward, residual,           residual_backward,  cross_entropy,
                       add_product, product,           residual_keep,      exp2_array};

}  // namespace phi1::cpu::PHI1_ISA
