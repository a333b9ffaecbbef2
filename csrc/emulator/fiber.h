// The context switch of a fiber: saves the callee-saved registers on the running stack, goes on on another.
#pragma once

#include <cstddef>
#include <cstdint>

// AddressSanitizer keeps account of the stacks and must be told of each switch.
#if defined(__SANITIZE_ADDRESS__)
#define PHI1_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define PHI1_ASAN 1
#endif
#endif
#if defined(PHI1_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Weak: every object that includes this header brings one.
extern "C" void phi1_switch_stack(void** save, void* load);

#if defined(__x86_64__)
asm(R"(
.text
.weak phi1_switch_stack
.type phi1_switch_stack, @function
phi1_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size phi1_switch_stack, .-phi1_switch_stack
)");
#elif defined(__aarch64__)
asm(R"(
.text
.weak phi1_switch_stack
.type phi1_switch_stack, %function
phi1_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size phi1_switch_stack, .-phi1_switch_stack
)");
#else
#error "the emulator's context switch is written for x86-64 and aarch64"
#endif

namespace phi1::emulator {

struct Stack {
  unsigned char* bottom = nullptr;
  size_t size = 0;
};

// Goes on where `load` was saved, on the stack `to`. save: where to keep the way back; null: there is none.
inline void switch_fiber(void** save, void* load, Stack to) {
  void* gone;
#if defined(PHI1_ASAN)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(save ? &fake_stack : nullptr, to.bottom, to.size);
  phi1_switch_stack(save ? save : &gone, load);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#else
  (void)to;
  phi1_switch_stack(save ? save : &gone, load);
#endif
}

// The first call of a fresh fiber. Returns the stack it was switched to from; known under AddressSanitizer only.
inline Stack arrive_on_fiber() {
  Stack from;
#if defined(PHI1_ASAN)
  const void* bottom;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &from.size);
  from.bottom = static_cast<unsigned char*>(const_cast<void*>(bottom));
#endif
  return from;
}

// What to switch to so that `entry` (which never returns) runs on `stack`.
inline void* prepare_stack(Stack stack, void (*entry)()) {
#if defined(PHI1_ASAN)  // a fiber that an error left behind has marks there
  __asan_unpoison_memory_region(stack.bottom, stack.size);
#endif
  uintptr_t top = (reinterpret_cast<uintptr_t>(stack.bottom) + stack.size) & ~uintptr_t(15);
#if defined(__x86_64__)
  auto* sp = reinterpret_cast<uintptr_t*>(top);
  *--sp = 0;  // the return address of entry: none. Here rsp % 16 is 8, as after a call.
  *--sp = reinterpret_cast<uintptr_t>(entry);
  for (int i = 0; i < 6; ++i) *--sp = 0;
#else
  auto* sp = reinterpret_cast<uintptr_t*>(top) - 20;
  for (int i = 0; i < 20; ++i) sp[i] = 0;
  sp[11] = reinterpret_cast<uintptr_t>(entry);  // x30
#endif
  return sp;
}

}  // namespace phi1::emulator
