// Runs a CUDA kernel's source on the CPU, one block after another, as strictly as the PTX manual reads.
//
// A CUDA thread is a fiber; the 32 fibers of a warp meet at each warp-wide instruction, all of a block at a barrier.
// Which warp and which lane runs next is drawn from a seed. A violated rule throws Error, with kernel, block and
// thread:
//   shared memory    starts as NaN; bounds, alignment; two threads at one word without a barrier between, one writing
//   cp.async         the destination is NaN until the wait that covers the copy; a copy never waited for
//   global memory    bounds of the launch's regions, alignment
//   barriers         a thread that exits or waits elsewhere while others wait
//   warp-wide        lanes of one warp at different instructions
// Counted: sectors of global requests and wavefronts of shared requests, with the least they could be.
#pragma once

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __launch_bounds__(...)
#define __grid_constant__

namespace phi1::emulator {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Region {
  const void* begin;
  int64_t bytes;
};

struct Launch {
  std::string name;
  int blocks, threads, shared;
  std::vector<Region> regions;
};

// Sums over launches since the last reset.
struct Counters {
  int64_t launches = 0, blocks = 0, mma = 0, barriers = 0;
  int64_t global_sectors = 0, global_sectors_least = 0;        // 32-byte sectors, summed over warp-wide requests
  int64_t shared_wavefronts = 0, shared_wavefronts_least = 0;  // 128-byte passes; above the least: bank conflicts
};

void run(const Launch& launch, const std::function<void()>& kernel);
void set_seed(uint64_t seed);
Counters counters();
void reset_counters();

// The twins: see csrc/cuda/ptx.cuh for what each does.
int thread_index();
int block_index();
int block_count();
uint32_t shared_base();
void bar_sync();
void bar_warp_sync();
void ld_global(void* to, const void* from, int bytes);
void st_global(void* to, const void* from, int bytes);
void ld_shared(void* to, uint32_t from, int bytes);
void st_shared(uint32_t to, const void* from, int bytes);
void ldmatrix_x4(uint32_t* d, uint32_t row, bool transposed);
void cp_async(uint32_t to, const void* from, int size, int bytes);
void cp_async_commit();
void cp_async_wait(int pending);
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, bool half);
float max_f32(float x, float y);
float sqrt_f32(float x);
float bits_to_float(uint32_t x);
uint32_t float_to_bits(float x);
void mul_wide(uint32_t& low, uint32_t& high, uint32_t a, uint32_t b);
uint32_t prmt(uint32_t low, uint32_t high, uint32_t selector);
void setp_ge_f16x2(bool& low, bool& high, uint32_t a, uint32_t b);
float ex2(float x);
float lg2(float x);
float rcp(float x);
uint32_t pack_pair(float low, float high, bool half);
float to_float(uint16_t bits, bool half);
uint32_t shfl_xor(uint32_t value, int mask);
float shfl_xor(float value, int mask);

}  // namespace phi1::emulator
