// Every PTX instruction and special register that the kernels use, one inline function each.
//
// Kernels touch memory, other lanes and barriers through these functions only. In the emulated build (PHI1_EMULATOR, no
// CUDA toolkit) each calls its twin in csrc/emulator, which checks what the hardware leaves undefined: alignment,
// bounds, copies that have not landed, races, divergence.
//
// A shared address is a byte offset in the shared window (32 bits), as in PTX.
#pragma once

#include <cstdint>

#if defined(PHI1_EMULATOR)
#include "emulator/emulator.h"
#define PHI1_DEVICE inline
#define PHI1_PTX(twin, ...) emulator::twin
#else
#define PHI1_DEVICE __device__ __forceinline__
#define PHI1_PTX(twin, ...) __VA_ARGS__
#endif

namespace phi1::cuda {

// 16-bit floating-point numbers as bits. pack_pair, mma and to_float are overloaded on them.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// 16 bytes.
struct alignas(16) Vector4 {
  uint32_t word[4];
};
struct alignas(8) Float2 {
  float x, y;
};

// ------------------------------------------------------------------------------------------ who am I

PHI1_DEVICE int thread_index() { return PHI1_PTX(thread_index(), int(threadIdx.x)); }  // %tid.x
PHI1_DEVICE int block_index() { return PHI1_PTX(block_index(), int(blockIdx.x)); }     // %ctaid.x
PHI1_DEVICE int block_count() { return PHI1_PTX(block_count(), int(gridDim.x)); }      // %nctaid.x
PHI1_DEVICE int lane_index() { return thread_index() % 32; }
PHI1_DEVICE int warp_index() { return thread_index() / 32; }

// The block's dynamic shared memory: its first byte, aligned to 1,024.
PHI1_DEVICE uint32_t shared_base() {
#if defined(PHI1_EMULATOR)
  return emulator::shared_base();
#else
  extern __shared__ __align__(1024) unsigned char phi1_shared[];
  return uint32_t(__cvta_generic_to_shared(phi1_shared));
#endif
}

// ---------------------------------------------------------------------------------------- barriers

PHI1_DEVICE void bar_sync() { PHI1_PTX(bar_sync(), __syncthreads()); }         // bar.sync 0
PHI1_DEVICE void bar_warp_sync() { PHI1_PTX(bar_warp_sync(), __syncwarp()); }  // bar.warp.sync

// -------------------------------------------------------------------------------------- global memory

template <typename V>
PHI1_DEVICE V ld_global(const V* from) {
#if defined(PHI1_EMULATOR)
  V value;
  emulator::ld_global(&value, from, sizeof(V));
  return value;
#else
  return *from;
#endif
}

template <typename V>
PHI1_DEVICE void st_global(V* to, const V& value) {
#if defined(PHI1_EMULATOR)
  emulator::st_global(to, &value, sizeof(V));
#else
  *to = value;
#endif
}

PHI1_DEVICE Vector4 ld_global_16(const void* from) { return ld_global(static_cast<const Vector4*>(from)); }
PHI1_DEVICE void st_global_16(void* to, const Vector4& value) { st_global(static_cast<Vector4*>(to), value); }

// -------------------------------------------------------------------------------------- shared memory

PHI1_DEVICE void st_shared_4(uint32_t to, uint32_t value) {
#if defined(PHI1_EMULATOR)
  emulator::st_shared(to, &value, 4);
#else
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
#endif
}

PHI1_DEVICE uint32_t ld_shared_4(uint32_t from) {
  uint32_t v;
#if defined(PHI1_EMULATOR)
  emulator::ld_shared(&v, from, 4);
#else
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(from) : "memory");
#endif
  return v;
}

PHI1_DEVICE Vector4 ld_shared_16(uint32_t from) {
  Vector4 v;
#if defined(PHI1_EMULATOR)
  emulator::ld_shared(&v, from, 16);
#else
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "r"(from)
               : "memory");
#endif
  return v;
}

// Two adjacent Float2.
PHI1_DEVICE void ld_shared_float2x2(uint32_t from, Float2& first, Float2& second) {
#if defined(PHI1_EMULATOR)
  Float2 pair[2];
  emulator::ld_shared(pair, from, 16);
  first = pair[0], second = pair[1];
#else
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(first.x), "=f"(first.y), "=f"(second.x), "=f"(second.y)
               : "r"(from)
               : "memory");
#endif
}

// Four 8x8 matrices of 16-bit elements. Lane 8i + r gives the address of row r of matrix i (16 bytes); word i of lane l
// receives elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of matrix i.
PHI1_DEVICE void ldmatrix_x4(uint32_t (&d)[4], uint32_t row) {
#if defined(PHI1_EMULATOR)
  emulator::ldmatrix_x4(d, row, false);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(row)
               : "memory");
#endif
}

// The same, each matrix transposed: word i of lane l receives elements l / 4 of rows 2 (l % 4) and 2 (l % 4) + 1.
PHI1_DEVICE void ldmatrix_x4_trans(uint32_t (&d)[4], uint32_t row) {
#if defined(PHI1_EMULATOR)
  emulator::ldmatrix_x4(d, row, true);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(row)
               : "memory");
#endif
}

// Copies 16 bytes global -> shared behind the program's back; `bytes` (0 or 16) come from `from`, the rest is zeros.
PHI1_DEVICE void cp_async_16(uint32_t to, const void* from, int bytes) {
#if defined(PHI1_EMULATOR)
  emulator::cp_async(to, from, 16, bytes);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)),
               "r"(bytes)
               : "memory");
#endif
}

// The same for 8 bytes.
PHI1_DEVICE void cp_async_8(uint32_t to, const void* from, int bytes) {
#if defined(PHI1_EMULATOR)
  emulator::cp_async(to, from, 8, bytes);
#else
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)), "r"(bytes)
               : "memory");
#endif
}

// Closes this thread's group of copies.
PHI1_DEVICE void cp_async_commit() {
  PHI1_PTX(cp_async_commit(), asm volatile("cp.async.commit_group;" :: : "memory"));
}

// Waits for this thread's groups but the newest kPending. Other threads see the data after the next barrier.
template <int kPending>
PHI1_DEVICE void cp_async_wait() {
  PHI1_PTX(cp_async_wait(kPending), asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory"));
}

// ----------------------------------------------------------------------------------------- arithmetic

// d += a b for a 16x16 (row-major), b 16x8 (column-major), d 16x8. With g = lane / 4 and t = lane % 4:
//   a[0..3]: rows g, g + 8, g, g + 8; columns 2t, 2t + 1 (a[0], a[1]) and 2t + 8, 2t + 9 (a[2], a[3])
//   b[0..1]: rows 2t, 2t + 1 and 2t + 8, 2t + 9; column g
//   d[0..3]: row g columns 2t, 2t + 1; row g + 8 columns 2t, 2t + 1
PHI1_DEVICE void mma_m16n8k16(bf16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(PHI1_EMULATOR)
  emulator::mma_m16n8k16(d, a, b, false);
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

PHI1_DEVICE void mma_m16n8k16(f16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(PHI1_EMULATOR)
  emulator::mma_m16n8k16(d, a, b, true);
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// The greater; of a number and NaN the number.
PHI1_DEVICE float max_f32(float x, float y) { return PHI1_PTX(max_f32(x, y), fmaxf(x, y)); }

// The lesser, NaN where either is NaN.
PHI1_DEVICE float min_nan(float x, float y) {
#if defined(PHI1_EMULATOR)
  return x != x || x < y ? x : y;
#else
  float least;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(least) : "f"(x), "f"(y));
  return least;
#endif
}

// sqrt(x), rounded to nearest.
PHI1_DEVICE float sqrt_f32(float x) { return PHI1_PTX(sqrt_f32(x), __fsqrt_rn(x)); }

PHI1_DEVICE float bits_to_float(uint32_t x) { return PHI1_PTX(bits_to_float(x), __uint_as_float(x)); }
PHI1_DEVICE uint32_t float_to_bits(float x) { return PHI1_PTX(float_to_bits(x), __float_as_uint(x)); }

// The 64-bit product a b. In C++, nvcc 13.0 adds 0 to the high half: an instruction more for each.
PHI1_DEVICE void mul_wide(uint32_t& low, uint32_t& high, uint32_t a, uint32_t b) {
#if defined(PHI1_EMULATOR)
  emulator::mul_wide(low, high, a, b);
#else
  asm("{\n .reg .b64 d;\n mul.wide.u32 d, %2, %3;\n mov.b64 {%0, %1}, d;\n}" : "=r"(low), "=r"(high) : "r"(a), "r"(b));
#endif
}

// Bytes of the eight of (low, high), low's first: nibble i of `selector` numbers the one that becomes byte i.
PHI1_DEVICE uint32_t prmt(uint32_t low, uint32_t high, uint32_t selector) {
  return PHI1_PTX(prmt(low, high, selector), __byte_perm(low, high, selector));
}

// Of each half, as half-precision numbers: is a's at least b's. Subnormal numbers are compared as they are.
PHI1_DEVICE void setp_ge_f16x2(bool& low, bool& high, uint32_t a, uint32_t b) {
#if defined(PHI1_EMULATOR)
  emulator::setp_ge_f16x2(low, high, a, b);
#else
  uint32_t x, y;
  asm("{\n .reg .pred p, q;\n setp.ge.f16x2 p|q, %2, %3;\n selp.b32 %0, 1, 0, p;\n selp.b32 %1, 1, 0, q;\n}"
      : "=r"(x), "=r"(y)
      : "r"(a), "r"(b));
  low = x, high = y;
#endif
}

// 2^x; subnormal results are flushed to zero.
PHI1_DEVICE float ex2(float x) {
#if defined(PHI1_EMULATOR)
  return emulator::ex2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// log2(x).
PHI1_DEVICE float lg2(float x) {
#if defined(PHI1_EMULATOR)
  return emulator::lg2(x);
#else
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// 1 / x to one unit in the last place; subnormal results are flushed to zero.
PHI1_DEVICE float rcp(float x) {
#if defined(PHI1_EMULATOR)
  return emulator::rcp(x);
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// Two floats rounded to nearest even, `low` in the low half.
PHI1_DEVICE uint32_t pack_pair(bf16, float low, float high) {
#if defined(PHI1_EMULATOR)
  return emulator::pack_pair(low, high, false);
#else
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
#endif
}

PHI1_DEVICE uint32_t pack_pair(f16, float low, float high) {
#if defined(PHI1_EMULATOR)
  return emulator::pack_pair(low, high, true);
#else
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
#endif
}

PHI1_DEVICE float to_float(float x) { return x; }

PHI1_DEVICE float to_float(bf16 x) {
#if defined(PHI1_EMULATOR)
  return emulator::to_float(x.bits, false);
#else
  return __uint_as_float(uint32_t(x.bits) << 16);
#endif
}

PHI1_DEVICE float to_float(f16 x) {
#if defined(PHI1_EMULATOR)
  return emulator::to_float(x.bits, true);
#else
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#endif
}

// x rounded to nearest even.
template <typename T>
PHI1_DEVICE T from_float(float x) {
  return T{uint16_t(pack_pair(T{}, x, 0.0f))};
}
template <>
PHI1_DEVICE float from_float<float>(float x) {
  return x;
}

// --------------------------------------------------------------------------------------- other lanes

// The value of lane (lane ^ mask). All 32 lanes take part.
PHI1_DEVICE uint32_t shfl_xor(uint32_t value, int mask) {
  return PHI1_PTX(shfl_xor(value, mask), __shfl_xor_sync(0xffffffffu, value, mask));
}
PHI1_DEVICE float shfl_xor(float value, int mask) {
#if defined(PHI1_EMULATOR)
  return emulator::shfl_xor(value, mask);
#else
  return __shfl_xor_sync(0xffffffffu, value, mask);
#endif
}

// Whether x holds for any lane of the warp.
PHI1_DEVICE bool any_lane(bool x) {
#if defined(PHI1_EMULATOR)
  uint32_t any = x;
  for (int mask = 1; mask < 32; mask *= 2) any |= emulator::shfl_xor(any, mask);
  return any;
#else
  return __any_sync(0xffffffffu, x);
#endif
}

}  // namespace phi1::cuda
