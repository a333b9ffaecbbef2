// Asks Linux for the registers of AMX's tiles, as csrc/cpu/amx.cpp does, in programs that are compiled for them.
#pragma once

#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>

// Defined where the emulator is linked in, which needs none.
extern "C" __attribute__((weak)) bool phi1_amx_is_emulated();

inline bool tiles_refused() { return phi1_amx_is_emulated == nullptr && syscall(SYS_arch_prctl, 0x1023, 18) != 0; }
#else
inline bool tiles_refused() { return false; }
#endif
