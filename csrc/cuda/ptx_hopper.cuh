// The PTX instructions of compute capability 9.0a that the kernels in csrc/cuda/hopper use, one inline function each.
//
// As in ptx.cuh each has a twin in csrc/emulator, which refuses what the hardware leaves undefined; csrc/emulator/
// hopper.h says what.
#pragma once

#include <type_traits>

#include "cuda/ptx.cuh"

#if defined(PHI1_EMULATOR)
#include "emulator/hopper.h"
#endif

namespace phi1::cuda {

// Index of this thread's warpgroup (128 threads), known to the compiler to be the same for the whole warp: what is
// computed from it, descriptors and addresses of barriers, goes to uniform registers.
PHI1_DEVICE int warpgroup_index() {
  return PHI1_PTX(thread_index() / 128, int(__shfl_sync(0xffffffffu, threadIdx.x / 128, 0)));
}

// ------------------------------------------------------------------------------------------ mbarriers
//
// An mbarrier is 8 bytes of shared memory. It counts arrivals; the last one of `count` completes a phase and the next
// begins. Phases are numbered from 0; the instruction takes the number's parity.

PHI1_DEVICE void mbarrier_init(uint32_t barrier, int count) {
  PHI1_PTX(mbarrier_init(barrier, count),
           asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory"));
}

// Releases what this thread did, and what it knows of others, to those who wait for the phase.
PHI1_DEVICE void mbarrier_arrive(uint32_t barrier) {
  PHI1_PTX(mbarrier_arrive(barrier),
           asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"));
}

// Waits until `phase` is complete. It must be the one that runs or the one before; phase -1 is complete from the start.
PHI1_DEVICE void mbarrier_wait(uint32_t barrier, int phase) {
#if defined(PHI1_EMULATOR)
  emulator::mbarrier_wait(barrier, phase);
#else
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "wait:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
      "@complete bra done;\n"
      "bra wait;\n"
      "done:\n"
      "}" ::"r"(barrier),
      "r"(phase & 1)
      : "memory");
#endif
}

// ------------------------------------------------------------------------------------- other barriers

// Named barriers: `threads` in all arrive; sync waits for the rest, arrive does not. Number 0 is bar_sync's.
PHI1_DEVICE void bar_sync_named(int number, int threads) {
  PHI1_PTX(bar_named(number, threads, true), asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory"));
}
PHI1_DEVICE void bar_arrive_named(int number, int threads) {
  PHI1_PTX(bar_named(number, threads, false),
           asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory"));
}

// Makes this thread's writes to shared memory visible to wgmma, which reads through the async proxy.
PHI1_DEVICE void fence_proxy_async() {
  PHI1_PTX(fence_proxy_async(), asm volatile("fence.proxy.async.shared::cta;" :: : "memory"));
}

// Registers a thread of this warpgroup: fewer, and more again out of what others gave back.
template <int kRegisters>
PHI1_DEVICE void setmaxnreg_dec() {
  PHI1_PTX(setmaxnreg(kRegisters, false), asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters)));
}
template <int kRegisters>
PHI1_DEVICE void setmaxnreg_inc() {
  PHI1_PTX(setmaxnreg(kRegisters, true), asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters)));
}

// ---------------------------------------------------------------------------------------------- wgmma
//
// d (64 x 8 kN) = or += a (64 x 16) b (16 x 8 kN) by the 128 threads of a warpgroup, while they go on. Warp w of it
// holds rows 16 w to 16 w + 15 of d and of an `a` in registers, distributed as by mma_m16n8k16. Until the wait that
// covers it, d, `a` and the operands in shared memory must be left alone.
//
// An operand in shared memory is named by a descriptor: offsets in units of 16 bytes,
//   bits 0-13 start, 16-29 leading offset, 32-45 stride offset, 62-63 the swizzle: 1 for 128 bytes.
// With that swizzle an operand is made of rows of 128 bytes in groups of 8 (1,024 bytes, so aligned), chunk c of 16
// bytes of row r being at c ^ r % 8:
//   K-major   a row is one m (or n), its 64 elements are k; the stride offset leads to the next 8 rows; a step of 16 k
//             is 32 bytes of the start. The leading offset is not used.
//   MN-major  a row is one k, its 64 elements are m (or n); the stride offset leads to the next 8 k, the leading offset
//             to the next 64 m (or n).
constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;

PHI1_DEVICE uint64_t descriptor(uint32_t start, int leading_offset, int stride_offset) {
  return kSwizzle128 | uint64_t(stride_offset / 16) << 32 | uint64_t(leading_offset / 16) << 16 |
         (start & 0x3ffff) >> 4;
}

// Before the first wgmma, and whenever d or `a` were touched by another instruction.
PHI1_DEVICE void wgmma_fence() { PHI1_PTX(wgmma_fence(), asm volatile("wgmma.fence.sync.aligned;" :: : "memory")); }

// Closes this warp's group of wgmma.
PHI1_DEVICE void wgmma_commit() {
  PHI1_PTX(wgmma_commit(), asm volatile("wgmma.commit_group.sync.aligned;" :: : "memory"));
}

#if !defined(PHI1_EMULATOR)
#define PHI1_D4(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define PHI1_D32 PHI1_D4(0), PHI1_D4(1), PHI1_D4(2), PHI1_D4(3), PHI1_D4(4), PHI1_D4(5), PHI1_D4(6), PHI1_D4(7)
#define PHI1_D64 \
  PHI1_D32, PHI1_D4(8), PHI1_D4(9), PHI1_D4(10), PHI1_D4(11), PHI1_D4(12), PHI1_D4(13), PHI1_D4(14), PHI1_D4(15)
#define PHI1_LIST32                                                                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define PHI1_LIST64                                                                                                  \
  PHI1_LIST32                                                                                                        \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
  "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// Both operands in shared memory; operands A, B, P of the text: numbers of a, b and the predicate's source.
#define PHI1_WGMMA_SHARED(N, LIST, D, TYPE, A, B, P)                                                   \
  asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, " P                                 \
               ", 0;\n"                                                                                \
               "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" LIST "}, " A ", " B \
               ", accumulate, 1, 1, 0, 0;\n}"                                                          \
               : D                                                                                     \
               : "l"(a), "l"(b), "r"(int(accumulate)))
// a in registers, b K-major.
#define PHI1_WGMMA_LEFT(N, LIST, D, TYPE, A0, A1, A2, A3, B, P)                                                   \
  asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, " P                                            \
               ", 0;\n"                                                                                           \
               "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" LIST "}, {" A0 ", " A1 ", " A2 \
               ", " A3 "}, " B ", accumulate, 1, 1, 0;\n}"                                                        \
               : D                                                                                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)))
// a in registers, b MN-major.
#define PHI1_WGMMA_REGISTERS(N, LIST, D, TYPE, A0, A1, A2, A3, B)                                                 \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" LIST "}, {" A0 ", " A1 ", " A2 \
               ", " A3 "}, " B ", 1, 1, 1, 1;"                                                                    \
               : D                                                                                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#endif

// Waits for this warp's groups but the newest kPending. d: accumulators of a group that is waited for; the compiler
// moves no use of them across.
template <int kPending, int kN>
PHI1_DEVICE void wgmma_wait(float (&d)[kN][4]) {
  static_assert(kN == 8 || kN == 16);
#if defined(PHI1_EMULATOR)
  emulator::wgmma_wait(kPending, &d[0][0]);
#else
  if constexpr (kN == 8)
    asm volatile("wgmma.wait_group.sync.aligned %32;" : PHI1_D32 : "n"(kPending) : "memory");
  else
    asm volatile("wgmma.wait_group.sync.aligned %64;" : PHI1_D64 : "n"(kPending) : "memory");
#endif
}

// d = a b (or d += a b): a and b by descriptors, both K-major.
template <typename T, int kN>
PHI1_DEVICE void wgmma(T, float (&d)[kN][4], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(kN == 8 || kN == 16);
  constexpr bool kHalf = std::is_same_v<T, f16>;
#if defined(PHI1_EMULATOR)
  emulator::wgmma(&d[0][0], kN, nullptr, a, b, accumulate, false, kHalf);
#else
  if constexpr (kN == 8 && kHalf)
    PHI1_WGMMA_SHARED("64", PHI1_LIST32, PHI1_D32, "f16", "%32", "%33", "%34");
  else if constexpr (kN == 8)
    PHI1_WGMMA_SHARED("64", PHI1_LIST32, PHI1_D32, "bf16", "%32", "%33", "%34");
  else if constexpr (kHalf)
    PHI1_WGMMA_SHARED("128", PHI1_LIST64, PHI1_D64, "f16", "%64", "%65", "%66");
  else
    PHI1_WGMMA_SHARED("128", PHI1_LIST64, PHI1_D64, "bf16", "%64", "%65", "%66");
#endif
}

// The same with a in registers.
template <typename T, int kN>
PHI1_DEVICE void wgmma(T, float (&d)[kN][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(kN == 8 || kN == 16);
  constexpr bool kHalf = std::is_same_v<T, f16>;
#if defined(PHI1_EMULATOR)
  emulator::wgmma(&d[0][0], kN, a, 0, b, accumulate, false, kHalf);
#else
  if constexpr (kN == 8 && kHalf)
    PHI1_WGMMA_LEFT("64", PHI1_LIST32, PHI1_D32, "f16", "%32", "%33", "%34", "%35", "%36", "%37");
  else if constexpr (kN == 8)
    PHI1_WGMMA_LEFT("64", PHI1_LIST32, PHI1_D32, "bf16", "%32", "%33", "%34", "%35", "%36", "%37");
  else if constexpr (kHalf)
    PHI1_WGMMA_LEFT("128", PHI1_LIST64, PHI1_D64, "f16", "%64", "%65", "%66", "%67", "%68", "%69");
  else
    PHI1_WGMMA_LEFT("128", PHI1_LIST64, PHI1_D64, "bf16", "%64", "%65", "%66", "%67", "%68", "%69");
#endif
}

// d += a b: a in registers, b by its descriptor, MN-major.
template <typename T, int kN>
PHI1_DEVICE void wgmma(T, float (&d)[kN][4], const uint32_t (&a)[4], uint64_t b) {
  static_assert(kN == 8 || kN == 16);
  constexpr bool kHalf = std::is_same_v<T, f16>;
#if defined(PHI1_EMULATOR)
  emulator::wgmma(&d[0][0], kN, a, 0, b, true, true, kHalf);
#else
  if constexpr (kN == 8 && kHalf)
    PHI1_WGMMA_REGISTERS("64", PHI1_LIST32, PHI1_D32, "f16", "%32", "%33", "%34", "%35", "%36");
  else if constexpr (kN == 8)
    PHI1_WGMMA_REGISTERS("64", PHI1_LIST32, PHI1_D32, "bf16", "%32", "%33", "%34", "%35", "%36");
  else if constexpr (kHalf)
    PHI1_WGMMA_REGISTERS("128", PHI1_LIST64, PHI1_D64, "f16", "%64", "%65", "%66", "%67", "%68");
  else
    PHI1_WGMMA_REGISTERS("128", PHI1_LIST64, PHI1_D64, "bf16", "%64", "%65", "%66", "%67", "%68");
#endif
}

}  // namespace phi1::cuda
