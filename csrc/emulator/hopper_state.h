// What the twins of Hopper's instructions remember of a block.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <string>
#include <vector>

namespace phi1::emulator {

using Tick = uint32_t;

// A lane's registers, as its fiber's stack from `from` on was at its last wgmma.fence.
struct Registers {
  const unsigned char* from = nullptr;
  std::vector<unsigned char> copy;
};

// What all lanes and warps must say alike of one wgmma.
struct WgmmaShape {
  int n;  // in units of 8
  bool a_in_registers, accumulate, b_transposed, half;
  uint64_t a, b;
  bool operator==(const WgmmaShape&) const = default;
};

// A warp's quarter of a wgmma that has not been waited for.
struct WgmmaOperation {
  int64_t group;
  std::vector<uint32_t> chunks;  // of 16 bytes of shared memory: what it reads
  const uint32_t* a[32] = {};    // registers, or null
  uint32_t a_copy[32][4];
};

// Registers of a warp that wgmma in flight write. They hold kInFlight until the wait.
struct WgmmaResult {
  int64_t group;  // of the last one
  float* d[32];
  std::vector<float> value;  // lane by lane
};

struct WarpWgmma {
  int64_t groups = 0;  // committed
  size_t issued = 0;
  bool uncommitted = false;
  std::deque<WgmmaOperation> operations;
  std::vector<WgmmaResult> results;
};

struct Mbarrier {
  int count, pending;
  int phase = 0;
  int initialiser;  // thread, and when
  Tick initialised;
  std::vector<Tick> arrived, complete;  // what those of this phase know, and of the one before
  std::vector<int> waiting;             // threads
};

struct NamedBarrier {
  int threads = 0, arrived = 0;  // threads 0: not in use
  std::vector<Tick> known;
  std::vector<int> waiting;
};

struct Hopper {
  std::map<uint32_t, Mbarrier> mbarriers;  // by address
  NamedBarrier named[16];
  std::vector<int> want_registers;                // threads
  std::vector<std::vector<WgmmaShape>> sequence;  // of each warpgroup
  std::vector<uint8_t> locks;                     // of each 16 bytes of shared memory: wgmma that read it

  // Refuses a write to what a wgmma in flight reads.
  void check_not_read(uint32_t address, int bytes) const;
  // At the block's end: nothing is left half done.
  void finish() const;
};

}  // namespace phi1::emulator
