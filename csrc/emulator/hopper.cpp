#include "emulator/hopper.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "emulator/block.h"

namespace phi1::emulator {

namespace {

constexpr uint32_t kInFlight = 0xffffffffu;  // what d holds until the wait: a NaN

std::string text(int64_t x) { return std::to_string(x); }

// ------------------------------------------------------------------------------------------ mbarriers

Mbarrier& mbarrier_at(uint32_t address, const char* what) {
  const auto found = block->hopper.mbarriers.find(address);
  const int me = block->current->thread;
  if (found == block->hopper.mbarriers.end())
    block->fail(std::string(what) + ": no mbarrier was initialised at shared offset " +
                text(int64_t(address) - kSharedBase));
  Mbarrier& barrier = found->second;
  if (barrier.initialiser != me && barrier.initialised >= block->knowledge(me)[size_t(barrier.initialiser) / 32])
    block->fail(std::string("race: ") + what + ": thread " + text(barrier.initialiser) +
                " initialised the mbarrier, with no barrier between");
  return barrier;
}

}  // namespace

void mbarrier_init(uint32_t address, int count) {
  block->shared(address, 8, "mbarrier.init");
  if (count < 1 || count >= 1 << 20) block->fail("mbarrier.init: count = " + text(count) + ": must be in 1..1048575");
  if (block->hopper.mbarriers.count(address)) block->fail("mbarrier.init: the mbarrier is in use");
  block->touch_shared(address, 8, true);
  for (uint32_t i = 0; i < 2; ++i) shared_words[(address - kSharedBase) / 4 + i].is_barrier = true;
  Mbarrier& barrier = block->hopper.mbarriers[address];
  barrier.count = barrier.pending = count;
  barrier.initialiser = block->current->thread;
  barrier.initialised = block->warp().tick;
  barrier.arrived = barrier.complete = Knowledge(2 * block->warps().size(), 0);
}

void mbarrier_arrive(uint32_t address) {
  Mbarrier& barrier = mbarrier_at(address, "mbarrier.arrive");
  join(barrier.arrived, block->release());
  if (--barrier.pending > 0) return;
  barrier.pending = barrier.count;
  ++barrier.phase;
  barrier.complete = barrier.arrived;
  std::fill(barrier.arrived.begin(), barrier.arrived.end(), 0);
  for (int thread : barrier.waiting) {
    join(block->knowledge(thread), barrier.complete);
    block->wake(thread);
  }
  barrier.waiting.clear();
}

void mbarrier_wait(uint32_t address, int phase) {
  Mbarrier& barrier = mbarrier_at(address, "mbarrier.try_wait");
  if (phase == barrier.phase - 1) return join(block->knowledge(block->current->thread), barrier.complete);
  if (phase != barrier.phase)
    block->fail("mbarrier.try_wait: phase " + text(phase) + " while phase " + text(barrier.phase) +
                " runs: its parity says nothing");
  barrier.waiting.push_back(block->current->thread);
  block->sleep(Wait::mbarrier);
}

// ------------------------------------------------------------------------------------- other barriers

void bar_named(int number, int threads, bool wait) {
  if (number < 1 || number > 15) block->fail("named barrier " + text(number) + ": must be in 1..15; 0 is bar.sync's");
  if (threads < 32 || threads % 32 || threads > block->launch.threads)
    block->fail("named barrier " + text(number) + ": " + text(threads) + " threads: must be whole warps of the block");
  NamedBarrier& barrier = block->hopper.named[number];
  bool complete = false;
  block->meet(Wait::bar_named, {nullptr, nullptr, nullptr, uint32_t(2 * number + wait), false}, [&](Lane* lanes) {
    for (int i = 1; i < 32; ++i)
      if (lanes[i].operands.value != lanes[0].operands.value)
        block->fail("divergence: lanes at different named barriers");
    block->release_warp();
    if (barrier.threads == 0)
      barrier.threads = threads, barrier.known = Knowledge(2 * block->warps().size(), 0);
    else if (barrier.threads != threads)
      block->fail("named barrier " + text(number) + ": " + text(threads) + " threads, where others said " +
                  text(barrier.threads));
    join(barrier.known, block->knowledge(block->current->thread));
    barrier.arrived += 32;
    if (barrier.arrived > threads) block->fail("named barrier " + text(number) + ": more threads than it was made for");
    complete = barrier.arrived == threads;
    if (wait)
      for (int i = 0; i < 32; ++i) barrier.waiting.push_back(lanes[i].thread);
  });
  const int me = block->current->thread;
  if (complete) {  // the last lane of the last warp
    NamedBarrier done;
    std::swap(done, barrier);
    for (int thread : done.waiting) {
      join(block->knowledge(thread), done.known);
      if (block->lane(thread).wait == Wait::bar_named) block->wake(thread);
    }
    return;
  }
  // A lane that the last warp found here before it slept has nothing to wait for.
  if (wait && std::count(barrier.waiting.begin(), barrier.waiting.end(), me)) block->sleep(Wait::bar_named);
}

void fence_proxy_async() {
  Lane& lane = *block->current;
  lane.fences.push_back(block->warp().tick);
  block->warp().dirty |= 1u << lane.thread % 32;
}

void setmaxnreg(int registers, bool increase) {
  if (registers < 24 || registers > 256 || registers % 8)
    block->fail("setmaxnreg: " + text(registers) + " registers: must be 24, 32, ... 256");
  block->meet(Wait::setmaxnreg, {nullptr, nullptr, nullptr, uint32_t(2 * registers + increase), false},
              [&](Lane* lanes) {
                for (int i = 1; i < 32; ++i)
                  if (lanes[i].operands.value != lanes[0].operands.value)
                    block->fail("divergence: setmaxnreg of different counts");
                Warp& warp = block->warp();
                if (increase ? registers < warp.registers : registers > warp.registers)
                  block->fail(std::string("setmaxnreg.") + (increase ? "inc" : "dec") + ": from " +
                              text(warp.registers) + " to " + text(registers));
                if (increase) return;
                warp.registers = registers;
                for (int thread : block->hopper.want_registers) block->wake(thread);
                block->hopper.want_registers.clear();
              });
  // The pool is what the block was launched with, not all that a multiprocessor has.
  const int pool = launch_registers(block->launch.threads) * block->launch.threads;
  while (block->warp().registers != registers) {
    int taken = 0;
    for (const Warp& warp : block->warps()) taken += 32 * warp.registers;
    if (taken + 32 * (registers - block->warp().registers) <= pool) {
      block->warp().registers = registers;
    } else {
      block->hopper.want_registers.push_back(block->current->thread);
      block->sleep(Wait::setmaxnreg);
    }
  }
}

// ---------------------------------------------------------------------------------------------- wgmma

namespace {

// What a descriptor says, in bytes.
struct Operand {
  uint32_t start, leading, stride;

  Operand(uint64_t descriptor, bool transposed, int rows)
      : start(uint32_t(descriptor & 0x3fff) * 16),
        leading(uint32_t(descriptor >> 16 & 0x3fff) * 16),
        stride(uint32_t(descriptor >> 32 & 0x3fff) * 16) {
    const auto refuse = [&](const std::string& why) { block->fail("wgmma descriptor: " + why); };
    if (descriptor >> 62 != 1)
      refuse("swizzle " + text(int64_t(descriptor >> 62)) + ": these kernels use 1, 128 bytes");
    if (descriptor >> 49 & 7) refuse("base offset " + text(descriptor >> 49 & 7) + ": must be 0");
    if (transposed ? start % 1024 : start / 128 % 8)
      refuse("start " + text(start) + ": the pattern does not begin at a multiple of 1024");
    if (stride == 0 || stride % 1024) refuse("stride offset " + text(stride) + ": must be a multiple of 1024");
    if (transposed && rows > 64 && (leading == 0 || leading % 1024))
      refuse("leading offset " + text(leading) + ": must be a multiple of 1024");
  }

  // Shared address of the 16 bytes with elements 8 chunk .. 8 chunk + 7 of a row. K-major: a row is one m or n, two
  // chunks. MN-major: a row is one k, its chunks run over m or n.
  uint32_t address(int row, int chunk) const {
    const uint32_t at = start + uint32_t(row / 8) * stride + uint32_t(row % 8) * 128 + uint32_t(chunk / 8) * leading +
                        uint32_t(chunk % 8) * 16;
    return at ^ (at / 128 % 8) * 16;
  }
};

// Reads 16 bytes of an operand for all lanes of the running warp; notes them in `operation`.
void read_chunk(uint16_t (&element)[8], uint32_t address, const Knowledge& known, WgmmaOperation& operation) {
  const unsigned char* from = block->shared(address, 16, "wgmma");
  for (uint32_t i = (address - kSharedBase) / 4; i < (address - kSharedBase) / 4 + 4; ++i) {
    const Word& word = shared_words[i];
    if (word.written < block->first_tick()) continue;
    const auto place = [&] {
      return "shared offset " + text(4 * i) + ", which thread " + text(word.writer) + " wrote, ";
    };
    const Tick writer = known[size_t(word.writer) / 32];
    if (word.is_barrier) block->fail("wgmma reads shared offset " + text(4 * i) + ", which is an mbarrier");
    if (word.written >= writer) block->fail("race: wgmma reads " + place() + "with no barrier between");
    const std::vector<Tick>& fences = block->lane(word.writer).fences;
    if (fences.size() <= word.fences || fences[word.fences] >= writer)
      block->fail("wgmma reads " + place() + "without fence.proxy.async between");
  }
  const uint32_t chunk = (address - kSharedBase) / 16;
  ++block->hopper.locks[chunk];
  operation.chunks.push_back(chunk);
  std::memcpy(element, from, 16);
}

// Refuses registers that are not as they were at the lane's last wgmma.fence.
void check_fenced(const Lane& lane, const void* registers, size_t bytes, const char* what) {
  const auto* at = static_cast<const unsigned char*>(registers);
  const Registers& fenced = lane.registers;
  if (fenced.from == nullptr || at < fenced.from || at + bytes > fenced.from + fenced.copy.size() ||
      std::memcmp(at, fenced.copy.data() + (at - fenced.from), bytes))
    block->fail(std::string("wgmma: registers of ") + what + " of thread " + text(lane.thread) +
                " changed since the last wgmma.fence");
}

WgmmaResult& result_of(WarpWgmma& wgmma, Lane* lanes, int floats, bool accumulate) {
  for (WgmmaResult& result : wgmma.results) {
    if (result.d[0] != lanes[0].operands.d) continue;
    if (int(result.value.size()) != 32 * floats) block->fail("wgmma: d is in flight with another shape");
    return result;
  }
  WgmmaResult& result = wgmma.results.emplace_back();
  result.value.resize(size_t(32 * floats));
  for (int i = 0; i < 32; ++i) {
    result.d[i] = static_cast<float*>(lanes[i].operands.d);
    check_fenced(lanes[i], result.d[i], 4 * size_t(floats), "d");
    if (accumulate) std::copy_n(result.d[i], floats, &result.value[size_t(i * floats)]);
    std::memset(static_cast<void*>(result.d[i]), 0xff, 4 * size_t(floats));
  }
  return result;
}

// A warp's quarter of a wgmma.
void multiply(Lane* lanes, const WgmmaShape& shape) {
  WarpWgmma& wgmma = block->warp().wgmma;
  const int first = lanes[0].thread, floats = 4 * shape.n;
  auto& sequences = block->hopper.sequence;
  sequences.resize(std::max(sequences.size(), size_t(first) / 128 + 1));
  std::vector<WgmmaShape>& sequence = sequences[size_t(first) / 128];
  if (wgmma.issued == sequence.size()) sequence.push_back(shape);
  if (!(sequence[wgmma.issued++] == shape)) block->fail("divergence: warps of a warpgroup at different wgmma");

  block->hopper.locks.resize(shared_memory.size() / 16 + 1);
  Knowledge known = block->knowledge(first);  // to every lane
  for (int i = 1; i < 32; ++i)
    for (size_t w = 0; w < known.size(); ++w) known[w] = std::min(known[w], block->knowledge(first + i)[w]);

  WgmmaOperation operation{wgmma.groups, {}, {}, {}};
  static float left[16][16], right[16][128], sum[16][128];
  uint16_t element[8];
  if (shape.a_in_registers) {
    for (int l = 0; l < 32; ++l) {
      const uint32_t* a = lanes[l].operands.a;
      check_fenced(lanes[l], a, 16, "a");
      operation.a[l] = a;
      std::copy_n(a, 4, operation.a_copy[l]);
      for (int i = 0; i < 4; ++i) {
        float* to = &left[l / 4 + 8 * (i % 2)][2 * (l % 4) + 8 * (i / 2)];
        to[0] = to_float(uint16_t(a[i]), shape.half), to[1] = to_float(uint16_t(a[i] >> 16), shape.half);
      }
    }
  } else {
    const Operand a(shape.a, false, 64);
    const int row = first / 32 % 4 * 16;
    for (int m = 0; m < 16; ++m)
      for (int chunk = 0; chunk < 2; ++chunk) {
        read_chunk(element, a.address(row + m, chunk), known, operation);
        for (int i = 0; i < 8; ++i) left[m][8 * chunk + i] = to_float(element[i], shape.half);
      }
  }
  const Operand b(shape.b, shape.b_transposed, 8 * shape.n);
  for (int row = 0; row < (shape.b_transposed ? 16 : 8 * shape.n); ++row)
    for (int chunk = 0; chunk < (shape.b_transposed ? shape.n : 2); ++chunk) {
      read_chunk(element, b.address(row, chunk), known, operation);
      for (int i = 0; i < 8; ++i)
        (shape.b_transposed ? right[row][8 * chunk + i] : right[8 * chunk + i][row]) = to_float(element[i], shape.half);
    }

  WgmmaResult& result = result_of(wgmma, lanes, floats, shape.accumulate);
  result.group = wgmma.groups;
  const auto each = [&](auto f) {  // f(element of the lane, element of the matrix)
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < floats; ++i)
        f(result.value[size_t(l * floats + i)], sum[l / 4 + 8 * (i / 2 % 2)][8 * (i / 4) + 2 * (l % 4) + i % 2]);
  };
  if (shape.accumulate)
    each([](float lane, float& matrix) { matrix = lane; });
  else
    std::memset(sum, 0, sizeof sum);
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 8 * shape.n; ++n) sum[m][n] += left[m][k] * right[k][n];
  each([](float& lane, float matrix) { lane = matrix; });
  wgmma.operations.push_back(std::move(operation));
  wgmma.uncommitted = true;
  ++total.mma;
}

// Waits for groups before `end`.
void complete(Lane* lanes, WarpWgmma& wgmma, int64_t end) {
  Warp& warp = block->warp();
  const int index = lanes[0].thread / 32;
  while (!wgmma.operations.empty() && wgmma.operations.front().group < end) {
    const WgmmaOperation& operation = wgmma.operations.front();
    for (uint32_t chunk : operation.chunks) {
      --block->hopper.locks[chunk];
      for (size_t i = 4 * chunk; i < 4 * chunk + 4 && i < shared_words.size(); ++i)
        reader(i, index).read_by_wgmma = warp.waits;
    }
    for (int l = 0; l < 32; ++l)
      if (operation.a[l] && std::memcmp(operation.a[l], operation.a_copy[l], 16))
        block->fail("wgmma: registers of a of thread " + text(lanes[l].thread) + " changed before the wait");
    wgmma.operations.pop_front();
  }
  for (size_t r = 0; r < wgmma.results.size();) {
    WgmmaResult& result = wgmma.results[r];
    if (result.group >= end) {
      ++r;
      continue;
    }
    const size_t floats = result.value.size() / 32;
    for (size_t l = 0; l < 32; ++l) {
      for (size_t i = 0; i < floats; ++i)
        if (std::bit_cast<uint32_t>(result.d[l][i]) != kInFlight)
          block->fail("wgmma: registers of d of thread " + text(lanes[l].thread) + " changed before the wait");
      std::copy_n(&result.value[l * floats], floats, result.d[l]);
    }
    wgmma.results.erase(wgmma.results.begin() + std::ptrdiff_t(r));
  }
  ++warp.waits;
  for (int l = 0; l < 32; ++l) block->knowledge(lanes[l].thread)[block->warps().size() + size_t(index)] = warp.waits;
}

}  // namespace

// AddressSanitizer marks the gaps between variables: the stack is copied gaps and all.
[[gnu::noinline]] __attribute__((no_sanitize("address"))) void wgmma_fence() {
  Registers& registers = block->current->registers;
  registers.from = static_cast<const unsigned char*>(__builtin_frame_address(0));
  const auto bytes = size_t(block->stack_top(block->current->thread) - registers.from);
  registers.copy.resize(bytes);
  unsigned char* to = registers.copy.data();
  for (size_t i = 0; i < bytes; ++i) to[i] = registers.from[i];
  block->meet(Wait::wgmma, {nullptr, nullptr, nullptr, 0, false}, [](Lane*) {});
}

void wgmma_commit() {
  block->meet(Wait::wgmma, {nullptr, nullptr, nullptr, 1, false}, [](Lane*) {
    WarpWgmma& wgmma = block->warp().wgmma;
    ++wgmma.groups;
    wgmma.uncommitted = false;
  });
}

void wgmma_wait(int pending, float* d) {
  block->meet(Wait::wgmma, {d, nullptr, nullptr, 2, false}, [=](Lane* lanes) {
    WarpWgmma& wgmma = block->warp().wgmma;
    if (wgmma.uncommitted) block->fail("wgmma.wait_group: a wgmma was not committed");
    complete(lanes, wgmma, wgmma.groups - pending);
    for (const WgmmaResult& result : wgmma.results)
      if (result.d[0] == lanes[0].operands.d)
        block->fail("wgmma.wait_group " + text(pending) + ": its accumulators are still in flight");
  });
}

void wgmma(float* d, int n, const uint32_t* a, uint64_t a_operand, uint64_t b_operand, bool accumulate,
           bool b_transposed, bool half) {
  const WgmmaShape shape{n, a != nullptr, accumulate, b_transposed, half, a_operand, b_operand};
  Lane& me = *block->current;
  me.shape = shape;
  block->meet(Wait::wgmma, {d, a, nullptr, 3, half}, [](Lane* lanes) {
    for (int i = 1; i < 32; ++i)
      if (!(lanes[i].shape == lanes[0].shape)) block->fail("divergence: lanes of a warp at different wgmma");
    multiply(lanes, lanes[0].shape);
  });
}

void Hopper::check_not_read(uint32_t address, int bytes) const {
  if (locks.empty()) return;
  for (uint32_t chunk = (address - kSharedBase) / 16; chunk <= (address - kSharedBase + uint32_t(bytes) - 1) / 16;
       ++chunk)
    if (locks[chunk])
      block->fail("writes shared offset " + text(16 * chunk) + ", which a wgmma that was not waited for reads");
}

void Hopper::finish() const {
  for (const auto& [address, barrier] : mbarriers)
    if (barrier.pending != barrier.count)
      block->fail("ends with " + text(barrier.count - barrier.pending) + " of " + text(barrier.count) +
                  " arrivals at the mbarrier at shared offset " + text(int64_t(address) - kSharedBase));
  for (int i = 0; i < 16; ++i)
    if (named[i].arrived) block->fail("ends with " + text(named[i].arrived) + " threads at named barrier " + text(i));
  for (size_t warp = 0; warp < block->warps().size(); ++warp) {
    const size_t group = warp / 4;
    const size_t issued = block->warps()[warp].wgmma.issued;
    if (group < sequence.size() && issued != sequence[group].size())
      block->fail("divergence: warp " + text(int64_t(warp)) + " issued " + text(int64_t(issued)) +
                  " wgmma, others of its warpgroup " + text(int64_t(sequence[group].size())));
  }
}

}  // namespace phi1::emulator
