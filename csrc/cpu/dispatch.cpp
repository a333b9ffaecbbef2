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
#endif

namespace {

struct Isa {
  const char* name;
  const Kernels* table;
  bool supported;
};

// Best first.
const Isa* begin() {
#if defined(PHI1_HAS_avx2)
  __builtin_cpu_init();
  static const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  static const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  static const Isa all[] = {
#if defined(PHI1_HAS_avx2)
      {"avx512_bf16", &avx512_bf16::table, has_bf16},
      {"avx512", &avx512::table, has_avx512},
      {"avx2", &avx2::table, has_avx2},
#endif
      {"portable", &portable::table, true},
      {nullptr, nullptr, false},
  };
  return all;
}

const Isa* find(const std::string& name) {
  std::string message = "instruction set '" + name + "' (PHI1_ISA): this CPU runs";
  for (const Isa* isa = begin(); isa->name; ++isa) {
    if (isa->supported && name == isa->name) return isa;
    if (isa->supported) message.append(" ").append(isa->name);
  }
  throw std::invalid_argument(message);
}

const Isa* best() {
  const Isa* isa = begin();
  while (!isa->supported) ++isa;
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
