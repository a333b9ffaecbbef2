// Whether AMX can be used, and if not, why: the CPU has it, the kernel saves its registers, and lets this process have
// them.
#include "cpu/kernels.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#endif

// Tests preload a library that executes the tile instructions on any CPU and defines this
// (tests/csrc/amx/emulator.cpp).
extern "C" __attribute__((weak, visibility("default"))) bool phi1_amx_is_emulated();

namespace phi1::cpu {

const char* why_no_amx_bf16() {
  constexpr const char* no_amx = "this CPU has no AMX-BF16";
  if (phi1_amx_is_emulated != nullptr) return phi1_amx_is_emulated() ? nullptr : no_amx;
#if defined(__x86_64__) && defined(__linux__)
  // CPUID leaf 1, ECX: XGETBV is there. Leaf 7, EDX: AMX-BF16, AMX-TILE.
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & bit_OSXSAVE) == 0) return no_amx;
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & bf16) == 0 || (d & tile) == 0) return no_amx;
  // XCR0: the states that the kernel saves.
  constexpr unsigned tile_config = 1u << 17, tile_data = 1u << 18;
  unsigned saved, high;
  __asm__ volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  if ((saved & tile_config) == 0 || (saved & tile_data) == 0)
    return "the operating system does not save AMX's registers";
  // Linux wants to be asked for the 8 KiB of a thread's tiles (arch/x86/include/uapi/asm/prctl.h). All threads get it.
  constexpr int request = 0x1023, xtile_data = 18;  // ARCH_REQ_XCOMP_PERM
  if (syscall(SYS_arch_prctl, request, xtile_data) == 0) return nullptr;
  if (errno == ENOSPC)  // arch/x86/kernel/signal.c, sigaltstack_size_valid
    return "Linux refuses AMX's registers, since a thread's signal stack (sigaltstack) has no room for them: it takes "
           "getauxval(AT_MINSIGSTKSZ) bytes";
  return "Linux refuses this process AMX's registers (arch_prctl ARCH_REQ_XCOMP_PERM)";
#else
  return no_amx;
#endif
}

}  // namespace phi1::cpu
