// The instruction sets that the kernels are compiled for, and why one of them cannot run here.
#include "cpu/kernels.h"

namespace phi1::cpu {

#define PHI1_DECLARE(isa)     \
  namespace isa {             \
  extern const Kernels table; \
  }

PHI1_DECLARE(portable)
#if defined(PHI1_HAS_avx2)
PHI1_DECLARE(avx2)
PHI1_DECLARE(avx512)
PHI1_DECLARE(avx512_bf16)
PHI1_DECLARE(amx_bf16)
#endif

namespace {

#if defined(PHI1_HAS_avx2)
const char* avx2_missing() {
  __builtin_cpu_init();
  bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return has ? nullptr : "this CPU lacks AVX2, FMA or F16C";
}
const char* avx512_missing() {
  if (const char* why = avx2_missing()) return why;
  bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return has ? nullptr : "this CPU lacks AVX-512 (F, BW, DQ and VL)";
}
const char* avx512_bf16_missing() {
  if (const char* why = avx512_missing()) return why;
  return __builtin_cpu_supports("avx512bf16") ? nullptr : "this CPU lacks AVX-512 BF16";
}
const char* amx_bf16_missing() {
  const char* why = avx512_bf16_missing();
  return why != nullptr ? why : why_no_amx_bf16();
}
#endif

}  // namespace

const std::vector<Isa>& isas() {
  static const std::vector<Isa> all = {
#if defined(PHI1_HAS_avx2)
      {"amx_bf16", &amx_bf16::table, amx_bf16_missing()},
      {"avx512_bf16", &avx512_bf16::table, avx512_bf16_missing()},
      {"avx512", &avx512::table, avx512_missing()},
      {"avx2", &avx2::table, avx2_missing()},
#endif
      {"portable", &portable::table, nullptr},
  };
  return all;
}

}  // namespace phi1::cpu
