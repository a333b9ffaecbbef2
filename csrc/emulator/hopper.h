// The twins of csrc/cuda/ptx_hopper.cuh. What they do, and refuse, beside emulator.h's rules:
//
//   wgmma            computes at its issue, delivers at the wait that covers it: until then d is NaN. Refused: d or a
//                    changed since the last wgmma.fence, or before the wait; a write to operands in shared memory
//                    before the wait; operands that another thread wrote with no barrier between, or without
//                    fence.proxy.async; lanes of a warp, or warps of a warpgroup, at different wgmma; exit before the
//                    wait, or with an open group
//   descriptors      any swizzle but 128 bytes, a pattern that does not start at 1,024, bytes outside the block
//   mbarrier         counts phases in full: a wait for one that is neither running nor the one before is refused; so
//   are
//                    use before init (and a barrier after it), ordinary access, arrivals left over at the end
//   named barriers   counts that differ, number 0, whole warps only, arrivals left over at the end
//   setmaxnreg       a decrease that increases and the reverse, counts that the instruction does not take; an increase
//                    waits for what others give back
//
// Memory is ordered by barriers and by mbarrier arrive -> wait. A lane that arrives releases its own accesses, and
// those of its warp if a barrier of all lanes (bar.warp.sync) came after them.
#pragma once

#include <cstdint>

namespace phi1::emulator {

void mbarrier_init(uint32_t barrier, int count);
void mbarrier_arrive(uint32_t barrier);
void mbarrier_wait(uint32_t barrier, int phase);
void bar_named(int number, int threads, bool wait);
void fence_proxy_async();
void setmaxnreg(int registers, bool increase);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending, float* d);
// n: columns of d in units of 8. a: registers, or null: descriptor a_operand.
void wgmma(float* d, int n, const uint32_t* a, uint64_t a_operand, uint64_t b_operand, bool accumulate,
           bool b_transposed, bool half);

}  // namespace phi1::emulator
