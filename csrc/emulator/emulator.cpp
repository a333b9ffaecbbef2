#include "emulator/emulator.h"

#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "emulator/block.h"

namespace phi1::emulator {

namespace numeric {
#include "cpu/numeric.h"
}

namespace {

std::mutex one_launch;
std::atomic<uint64_t> seed{0};

inline uintptr_t caller(void* address) { return reinterpret_cast<uintptr_t>(address); }
#define PHI1_SITE caller(__builtin_return_address(0))

}  // namespace

void run(const Launch& launch, const std::function<void()>& kernel) {
  std::lock_guard lock(one_launch);
  if (launch.threads < 32 || launch.threads % 32 || launch.threads > 1024)
    throw Error("kernel " + launch.name + ": " + std::to_string(launch.threads) + " threads: must be 32, 64, ... 1024");
  if (launch.shared > 227 * 1024)
    throw Error("kernel " + launch.name + ": " + std::to_string(launch.shared) +
                " bytes of shared memory: at most 232448");
  ++total.launches;
  total.blocks += launch.blocks;
  const bool backwards = seed & 1;  // blocks come in no order either
  for (int i = 0; i < launch.blocks; ++i) Block(launch, kernel, backwards ? launch.blocks - 1 - i : i, seed).run();
}

void set_seed(uint64_t value) { seed = value; }
Counters counters() { return total; }
void reset_counters() { total = {}; }

int thread_index() { return block->current->thread; }
int block_index() { return block->index; }
int block_count() { return block->launch.blocks; }
uint32_t shared_base() { return kSharedBase; }

void bar_sync() { block->bar_sync(); }
void bar_warp_sync() {
  block->meet(Wait::bar_warp_sync, {}, [](Lane*) { block->release_warp(); });
}

[[gnu::noinline]] void ld_global(void* to, const void* from, int bytes) {
  block->check_global(from, bytes, "ld.global");
  block->count(PHI1_SITE, reinterpret_cast<uintptr_t>(from), bytes, false);
  std::memcpy(to, from, size_t(bytes));
}

[[gnu::noinline]] void st_global(void* to, const void* from, int bytes) {
  block->check_global(to, bytes, "st.global");
  block->count(PHI1_SITE, reinterpret_cast<uintptr_t>(to), bytes, false);
  std::memcpy(to, from, size_t(bytes));
}

[[gnu::noinline]] void ld_shared(void* to, uint32_t from, int bytes) {
  const unsigned char* source = block->shared(from, bytes, "ld.shared");
  block->touch_shared(from, bytes, false);
  block->count(PHI1_SITE, from, bytes, true);
  std::memcpy(to, source, size_t(bytes));
}

[[gnu::noinline]] void st_shared(uint32_t to, const void* from, int bytes) {
  unsigned char* target = block->shared(to, bytes, "st.shared");
  block->touch_shared(to, bytes, true);
  block->count(PHI1_SITE, to, bytes, true);
  std::memcpy(target, from, size_t(bytes));
}

void ldmatrix_x4(uint32_t* d, uint32_t row, bool transposed) {
  block->shared(row, 16, "ldmatrix");
  block->touch_shared(row, 16, false);
  block->meet(Wait::ldmatrix, {d, nullptr, nullptr, row, transposed}, [](Lane* lanes) {
    uint64_t addresses[32];
    for (int i = 0; i < 32; ++i) addresses[i] = lanes[i].operands.value;
    block->count_wavefronts(addresses, 0xffffffffu, 16);
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t element[8][8];
      for (int r = 0; r < 8; ++r) std::memcpy(element[r], &shared_memory[addresses[8 * matrix + r] - kSharedBase], 16);
      for (int l = 0; l < 32; ++l) {
        const int i = l / 4, j = 2 * (l % 4);
        if (lanes[l].operands.flag != lanes[0].operands.flag)
          block->fail("divergence: ldmatrix with and without .trans");
        const bool t = lanes[l].operands.flag;
        const uint32_t low = t ? element[j][i] : element[i][j], high = t ? element[j + 1][i] : element[i][j + 1];
        static_cast<uint32_t*>(lanes[l].operands.d)[matrix] = low | high << 16;
      }
    }
  });
}

[[gnu::noinline]] void cp_async(uint32_t to, const void* from, int size, int bytes) {
  if (bytes != 0 && bytes != size)
    block->fail("cp.async: " + std::to_string(bytes) + " bytes: these kernels copy all or none");
  unsigned char* target = block->shared(to, size, "cp.async");
  block->touch_shared(to, size, true);
  block->count(PHI1_SITE, to, size, true);
  if (bytes) {
    block->check_global(from, size, "cp.async");
    block->count(PHI1_SITE, reinterpret_cast<uintptr_t>(from), size, false);
  }
  std::memset(target, 0xff, size_t(size));  // in flight
  block->current->copies.push_back({to, from, size, bytes, block->current->groups});
}

void cp_async_commit() { ++block->current->groups; }

void cp_async_wait(int pending) {
  Lane& lane = *block->current;
  while (!lane.copies.empty() && lane.copies.front().group < lane.groups - pending) {
    block->land(lane.copies.front());
    lane.copies.pop_front();
  }
}

float to_float(uint16_t bits, bool half) {
  return half ? numeric::load(numeric::f16{bits}) : numeric::load(numeric::bf16{bits});
}

uint32_t pack_pair(float low, float high, bool half) {
  if (half) {
    numeric::f16 a, b;
    numeric::store(a, low), numeric::store(b, high);
    return a.bits | uint32_t(b.bits) << 16;
  }
  numeric::bf16 a, b;
  numeric::store(a, low), numeric::store(b, high);
  return a.bits | uint32_t(b.bits) << 16;
}

void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, bool half) {
  block->meet(Wait::mma, {d, a, b, 0, half}, [](Lane* lanes) {
    ++total.mma;
    alignas(32) float left[16][16], right[16][8], sum[16][8];
    const auto put = [](float& low, float& high, uint32_t pair, bool half) {
      low = to_float(uint16_t(pair), half), high = to_float(uint16_t(pair >> 16), half);
    };
    for (int l = 0; l < 32; ++l) {
      const Operands& o = lanes[l].operands;
      const int g = l / 4, t = 2 * (l % 4);
      for (int i = 0; i < 4; ++i) {
        const int row = g + 8 * (i % 2), column = t + 8 * (i / 2);
        put(left[row][column], left[row][column + 1], o.a[i], o.flag);
        sum[row][t + i / 2] = static_cast<float*>(o.d)[2 * (i % 2) + i / 2];
      }
      for (int i = 0; i < 2; ++i) put(right[t + 8 * i][g], right[t + 8 * i + 1][g], o.b[i], o.flag);
    }
    for (int m = 0; m < 16; ++m)
      for (int k = 0; k < 16; ++k)
        for (int n = 0; n < 8; ++n) sum[m][n] += left[m][k] * right[k][n];
    for (int l = 0; l < 32; ++l) {
      const int g = l / 4, t = 2 * (l % 4);
      float* out = static_cast<float*>(lanes[l].operands.d);
      out[0] = sum[g][t], out[1] = sum[g][t + 1], out[2] = sum[g + 8][t], out[3] = sum[g + 8][t + 1];
    }
  });
}

float max_f32(float x, float y) { return std::fmax(x, y); }
float sqrt_f32(float x) { return std::sqrt(x); }
float bits_to_float(uint32_t x) { return std::bit_cast<float>(x); }
uint32_t float_to_bits(float x) { return std::bit_cast<uint32_t>(x); }

void mul_wide(uint32_t& low, uint32_t& high, uint32_t a, uint32_t b) {
  const uint64_t product = uint64_t(a) * b;
  low = uint32_t(product), high = uint32_t(product >> 32);
}

uint32_t prmt(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = low | uint64_t(high) << 32;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t from = selector >> 4 * i & 15;
    if (from & 8) block->fail("prmt: selector " + std::to_string(selector) + " copies a sign: not emulated");
    result |= uint32_t(bytes >> 8 * from & 0xff) << 8 * i;
  }
  return result;
}

void setp_ge_f16x2(bool& low, bool& high, uint32_t a, uint32_t b) {
  low = to_float(uint16_t(a), true) >= to_float(uint16_t(b), true);
  high = to_float(uint16_t(a >> 16), true) >= to_float(uint16_t(b >> 16), true);
}

float ex2(float x) {
  const float y = std::exp2(x);
  return y < std::numeric_limits<float>::min() ? 0.0f : y;
}
float lg2(float x) { return std::log2(x); }
float rcp(float x) {
  const float y = 1.0f / x;
  return std::fabs(y) < std::numeric_limits<float>::min() ? 0.0f : y;
}

uint32_t shfl_xor(uint32_t value, int mask) {
  uint32_t result;
  block->meet(Wait::shfl, {&result, nullptr, nullptr, value, false}, [mask](Lane* lanes) {
    for (int l = 0; l < 32; ++l) *static_cast<uint32_t*>(lanes[l].operands.d) = lanes[l ^ mask].operands.value;
  });
  return result;
}
float shfl_xor(float value, int mask) { return std::bit_cast<float>(shfl_xor(std::bit_cast<uint32_t>(value), mask)); }

}  // namespace phi1::emulator
