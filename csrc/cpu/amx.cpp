// Whether AMX can be used: the CPU has it, the kernel saves its registers, and lets this process have them.
#include "cpu/kernels.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <errno.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

// Tests preload a library that executes the tile instructions on any CPU and defines this
// (tests/csrc/amx/emulator.cpp).
extern "C" __attribute__((weak, visibility("default"))) bool phi1_amx_is_emulated();

namespace phi1::cpu {

const char* amx_missing() {
  if (phi1_amx_is_emulated != nullptr && phi1_amx_is_emulated()) return nullptr;
#if defined(__x86_64__) && defined(__linux__)
  // CPUID leaf 1, ECX: XGETBV is there. Leaf 7, EDX: AMX-BF16, AMX-TILE.
  unsigned a, b, c, d;
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
  bool has_xgetbv = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_OSXSAVE) != 0;
  if (!has_xgetbv || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & bf16) == 0 || (d & tile) == 0)
    return "this CPU lacks AMX (TILE and BF16)";
  // XCR0: the states that the kernel saves.
  constexpr unsigned tile_config = 1u << 17, tile_data = 1u << 18;
  unsigned saved, high;
  __asm__ volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  if ((saved & tile_config) == 0 || (saved & tile_data) == 0)
    return "this CPU has AMX, but the operating system does not save its registers (Linux does from 5.16 on; "
           "a hypervisor may hide them)";
  // Linux wants to be asked for the 8 KiB of a thread's tiles (arch/x86/include/uapi/asm/prctl.h). All threads get it.
  constexpr int request = 0x1023, xtile_data = 18;  // ARCH_REQ_XCOMP_PERM
  if (syscall(SYS_arch_prctl, request, xtile_data) == 0) return nullptr;
  if (errno == ENOSPC)  // arch/x86/kernel/signal.c, sigaltstack_size_valid
    return "this CPU has AMX, but the kernel refuses its registers: a thread's alternate signal stack is too small for "
           "them (sigaltstack; AT_MINSIGSTKSZ says how large it must be)";
  return "this CPU has AMX, but the kernel refuses its registers to this process (arch_prctl, ARCH_REQ_XCOMP_PERM)";
#else
  return "AMX is used on x86-64 Linux only";
#endif
}

}  // namespace phi1::cpu
