// The table of CPU kernels that each instruction set's object fills in.
#pragma once

#include <vector>

#include "arguments.h"

namespace phi1::cpu {

// float32; what attention takes where the result is rounded to bf16; what it takes there beside tile instructions, with
// NaN of -inf, elsewhere the same.
enum class Exp2 : int { full = 0, rounded = 1, beside_tiles = 2 };

struct Kernels {
  void (*rotary)(const RotaryArgs&, int threads);
  void (*attention_forward)(const AttentionArgs&, int threads);
  void (*attention_backward)(const AttentionArgs&, int threads);
  void (*layer_norm_forward)(const LayerNormArgs&, int threads);
  void (*layer_norm_backward)(const LayerNormArgs&, int threads);
  void (*after_in)(const AfterInArgs&, int threads);
  void (*after_in_backward)(const AfterInArgs&, int threads);
  void (*residual)(const ResidualArgs&, int threads);
  void (*residual_backward)(const ResidualArgs&, int threads);
  void (*cross_entropy)(const CrossEntropyArgs&, int threads);
  void (*add_product)(const AddProductArgs&, int threads);
  void (*product)(const ProductArgs&, int threads);
  void (*residual_keep)(uint8_t* keep, int64_t rows, int64_t columns, uint32_t threshold, uint64_t seed, int threads);
  // 2^x as the kernels compute it.
  void (*exp2)(const float* in, float* out, int64_t count, Exp2 form);
};

// The kernels of one instruction set.
struct Isa {
  const char* name;
  const Kernels* table;
  const char* missing;  // why this process cannot run them, or null
};

// All that were compiled, the most capable first; the last, portable, runs everywhere. The first call asks the
// operating system for AMX's registers where the CPU has them.
const std::vector<Isa>& isas();

// Why this process may not use AMX's tiles and their products of bf16, or null; asks the operating system for them.
const char* why_no_amx_bf16();

}  // namespace phi1::cpu
