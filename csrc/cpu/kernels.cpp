// All CPU kernels, compiled once per instruction set with PHI1_ISA naming it (CMakeLists.txt, add_isa).
#include "cpu/kernels.h"

#include <bit>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace phi1::cpu::PHI1_ISA {

// Everything below has internal linkage: no inline function of one instruction set can stand in for another's.
namespace {

#include "cpu/numeric.h"
#include "cpu/rotary.inl"

}  // namespace

extern const Kernels table;
const Kernels table = {rotary};

}  // namespace phi1::cpu::PHI1_ISA
