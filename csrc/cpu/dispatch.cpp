// Which instruction set's kernels to run.
#include <cstdlib>
#include <stdexcept>
#include <string>

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
bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

struct Isa {
  const char* name;
  const Kernels* table;
  bool (*supported)();
};

// Best first. Behind `portable`, which every CPU runs, stands what is used only where PHI1_ISA asks for it: AMX, which
// has not been measured on a CPU that has it. Only then is the operating system asked for its registers, too.
constexpr Isa kIsas[] = {
#if defined(PHI1_HAS_avx2)
    {"avx512_bf16", &avx512_bf16::table, has_avx512_bf16},
    {"avx512", &avx512::table, has_avx512},
    {"avx2", &avx2::table, has_avx2},
#endif
    {"portable", &portable::table, [] { return true; }},
#if defined(PHI1_HAS_avx2)
    {"amx_bf16", &amx_bf16::table, [] { return has_avx512_bf16() && why_no_amx_bf16() == nullptr; }},
#endif
};

const Isa* find(const std::string& name) {
  std::string message = "instruction set '" + name + "' (PHI1_ISA): this CPU runs";
  for (const Isa& isa : kIsas) {
    if (!isa.supported()) continue;
    if (name == isa.name) return &isa;
    message.append(" ").append(isa.name);
  }
#if defined(PHI1_HAS_avx2)
  if (const char* why = name == "amx_bf16" ? why_no_amx_bf16() : nullptr) message.append("; ").append(why);
#endif
  throw std::invalid_argument(message);
}

const Isa* best() {
  const Isa* isa = kIsas;
  while (!isa->supported()) ++isa;
  return isa;
}

const Isa*& current() {
  static const Isa* isa = std::getenv("PHI1_ISA") ? find(std::getenv("PHI1_ISA")) : best();
  return isa;
}

}  // namespace

const Kernels& kernels() { return *current()->table; }

const char* isa_name() { return current()->name; }

void use_isa(const char* name) { current() = find(name); }

}  // namespace phi1::cpu
