#include "emulator/emulator.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <deque>
#include <exception>
#include <limits>
#include <memory>
#include <mutex>
#include <unordered_map>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "emulator/fiber.h"

namespace phi1::emulator {

namespace numeric {
#include "cpu/numeric.h"
}

namespace {

constexpr size_t kStackBytes = 128 * 1024;
// Where the shared window starts: an address that is not zero, so that a kernel cannot confuse offset and address.
constexpr uint32_t kSharedBase = 1024;

enum class Wait { none, bar_sync, bar_warp_sync, ldmatrix, mma, shfl };

const char* name_of(Wait wait) {
  switch (wait) {
    case Wait::bar_sync: return "bar.sync";
    case Wait::bar_warp_sync: return "bar.warp.sync";
    case Wait::ldmatrix: return "ldmatrix";
    case Wait::mma: return "mma";
    case Wait::shfl: return "shfl";
    case Wait::none: break;
  }
  return "nothing";
}

struct Copy {
  uint32_t to;
  const void* from;
  int size, bytes;
  int64_t group;
};

// What a lane brings to a warp-wide instruction.
struct Operands {
  void* d;
  const uint32_t *a, *b;
  uint32_t value;
  bool flag;
};

struct Lane {
  void* stack_pointer;
  int thread;
  Wait wait;
  bool done;
  Operands operands;
  std::deque<Copy> copies;
  int64_t groups;  // committed so far
};

struct Warp {
  std::vector<int> ready;  // threads, in the order in which they will run
  int arrived;
  Wait at;
  uint32_t epoch;  // bar.warp.sync passed
};

// Who last touched a word of shared memory, and between which barriers.
constexpr int kNobody = -1, kManyWarps = -2, kManyLanes = -3;  // kManyLanes - w: lanes of warp w
struct Word {
  int writer = kNobody, reader = kNobody;
  uint64_t write_epoch = 0, read_epoch = 0;
  uint32_t write_warp_epoch = 0, read_warp_epoch = 0;
};

// One instruction of one warp: its 32 lanes' addresses come one by one.
struct Request {
  uint64_t address[32];
  uint32_t mask = 0;
};
struct Site {
  int64_t issued[32] = {};  // per lane
  int64_t first = 0;        // index of open.front()
  std::deque<Request> open;
};

class Block {
 public:
  Block(const Launch& launch, const std::function<void()>& kernel, int index, uint64_t seed);
  void run();

  const Launch& launch;
  const std::function<void()>& kernel;
  const int index;
  Lane* current = nullptr;

  [[noreturn]] void fail(const std::string& what) const;
  void live();  // the body of every fiber
  void bar_sync();
  // Warp-wide instruction: the last lane to come calls perform() for all.
  template <typename F>
  void meet(Wait wait, const Operands& operands, F perform);

  unsigned char* shared(uint32_t address, int bytes, const char* what);
  void touch_shared(uint32_t address, int bytes, bool write);
  void check_global(const void* address, int bytes, const char* what) const;
  void count(uintptr_t site, uint64_t address, int size, bool is_shared);
  void count_wavefronts(const uint64_t* addresses, uint32_t mask, int size);
  void land(const Copy& copy);

  Warp& warp() { return warps_[current->thread / 32]; }
  Lane* lanes() { return &lanes_[current->thread / 32 * 32]; }

 private:
  uint64_t random() {
    random_ ^= random_ << 13, random_ ^= random_ >> 7, random_ ^= random_ << 17;
    return random_;
  }
  void shuffle(std::vector<int>& order);
  void yield();
  void switch_stack(void** save, const Lane* to);
  Lane* next();
  void finish_request(const Request& request, int size, bool is_shared);

  uint64_t random_;
  void* main_ = nullptr;
  Stack main_stack_;
  std::vector<Lane> lanes_;
  std::vector<Warp> warps_;
  int running_warp_ = 0, burst_ = 0;
  int at_barrier_ = 0, done_ = 0;
  std::exception_ptr error_;
  std::unordered_map<uintptr_t, Site> sites_[2][17];  // [shared?][size]
};

Block* block = nullptr;
std::mutex one_launch;
std::atomic<uint64_t> seed{0};
Counters total;
uint64_t epoch = 1;  // barriers passed, over all blocks: a word's old owners never match
std::vector<unsigned char> stacks;
std::vector<unsigned char> shared_memory;
std::vector<Word> shared_words;

Stack stack_of(int thread) { return {&stacks[size_t(thread) * kStackBytes], kStackBytes}; }

void entry() { block->live(); }

Block::Block(const Launch& launch, const std::function<void()>& kernel, int index, uint64_t seed)
    : launch(launch),
      kernel(kernel),
      index(index),
      random_((seed + 1) * 0x9E3779B97F4A7C15u ^ uint64_t(index + 1) << 32) {
  for (int i = 0; i < 8; ++i) random();
}

void Block::shuffle(std::vector<int>& order) {
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random() % i]);
}

void Block::run() {
  const int threads = launch.threads;
  shared_memory.assign(size_t(launch.shared), 0xff);  // NaN in every format
  shared_words.resize(size_t(launch.shared + 3) / 4);
  if (stacks.size() < size_t(threads) * kStackBytes)  // nothing in the old ones is worth a copy
    stacks = std::vector<unsigned char>(size_t(threads) * kStackBytes);
  lanes_.resize(size_t(threads));
  warps_.resize(size_t(threads) / 32);
  ++epoch;
  for (int t = 0; t < threads; ++t) {
    Lane& lane = lanes_[size_t(t)];
    lane = {};
    lane.thread = t;
    lane.stack_pointer = prepare_stack(stack_of(t), entry);
    warps_[size_t(t) / 32].ready.push_back(t);
  }
  for (Warp& warp : warps_) shuffle(warp.ready);
  block = this;
  current = next();
  switch_stack(&main_, current);
  block = nullptr;
  if (error_) std::rethrow_exception(error_);
  for (auto& by_size : sites_)
    for (int size = 0; size < 17; ++size)
      for (auto& [site, requests] : by_size[size])
        for (const Request& request : requests.open) finish_request(request, size, &by_size == &sites_[1]);
}

void Block::fail(const std::string& what) const {
  throw Error("kernel " + launch.name + ", block " + std::to_string(index) + ", thread " +
              std::to_string(current->thread) + ": " + what);
}

// Goes on as `to`, or where run() was called if it is null. save: where to keep the way back, null if there is none.
void Block::switch_stack(void** save, const Lane* to) {
  switch_fiber(save, to ? to->stack_pointer : main_, to ? stack_of(to->thread) : main_stack_);
}

void Block::live() {
  const Stack from = arrive_on_fiber();
  if (main_stack_.bottom == nullptr) main_stack_ = from;  // the first fiber comes from run()
  // An exception must not cross to another stack.
  try {
    kernel();
    if (!current->copies.empty()) fail("exits with cp.async copies that were never waited for");
    current->done = true;
    ++done_;
  } catch (...) {
    error_ = std::current_exception();
  }
  if (!error_ && done_ < launch.threads) {
    try {
      current = next();
    } catch (...) {
      error_ = std::current_exception();
    }
  }
  switch_stack(nullptr, error_ || done_ == launch.threads ? nullptr : current);
  std::terminate();
}

// The lane to run next. A warp keeps running for a drawn number of steps: runs ahead of others by a lot or a little.
Lane* Block::next() {
  if (--burst_ < 0 || warps_[size_t(running_warp_)].ready.empty()) {
    int candidates[64], n = 0;
    for (int w = 0; w < int(warps_.size()); ++w)
      if (!warps_[size_t(w)].ready.empty()) candidates[n++] = w;
    if (n == 0) {
      int waiting[6] = {};
      for (const Lane& lane : lanes_) ++waiting[int(lane.wait)];
      std::string what = "divergence: no thread can go on;";
      for (int w = 1; w < 6; ++w)
        if (waiting[w]) what += " " + std::to_string(waiting[w]) + " wait at " + name_of(Wait(w)) + ",";
      fail(what + " " + std::to_string(done_) + " have exited");
    }
    running_warp_ = candidates[random() % uint64_t(n)];
    burst_ = 1 << random() % 14;
  }
  std::vector<int>& ready = warps_[size_t(running_warp_)].ready;
  Lane* lane = &lanes_[size_t(ready.back())];
  ready.pop_back();
  return lane;
}

void Block::yield() {
  Lane* from = current;
  current = next();
  if (current != from) switch_stack(&from->stack_pointer, current);
}

void Block::bar_sync() {
  Lane* me = current;
  me->wait = Wait::bar_sync;
  if (++at_barrier_ < launch.threads) return yield();
  at_barrier_ = 0;
  ++epoch;
  ++total.barriers;
  for (Lane& lane : lanes_) {
    lane.wait = Wait::none;
    if (&lane != me) warps_[size_t(lane.thread) / 32].ready.push_back(lane.thread);
  }
  for (Warp& warp : warps_) shuffle(warp.ready);
}

template <typename F>
void Block::meet(Wait wait, const Operands& operands, F perform) {
  Warp& warp = this->warp();
  Lane* me = current;
  if (warp.arrived > 0 && warp.at != wait)
    fail(std::string("divergence: at ") + name_of(wait) + " while lanes of its warp are at " + name_of(warp.at));
  warp.at = wait;
  me->wait = wait;
  me->operands = operands;
  if (++warp.arrived < 32) return yield();
  warp.arrived = 0;
  perform(lanes());
  const int first = me->thread / 32 * 32;
  const int turn = int(random() % 32);  // another order each time
  for (int i = 0; i < 32; ++i) {
    const int thread = first + (i * 5 + turn) % 32;
    lanes_[size_t(thread)].wait = Wait::none;
    if (thread != me->thread) warp.ready.push_back(thread);
  }
}

// ------------------------------------------------------------------------------------------ memory

std::string hex(uint64_t address) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(address));
  return text;
}

unsigned char* Block::shared(uint32_t address, int bytes, const char* what) {
  if (address % uint32_t(bytes))
    fail(std::string(what) + ": shared address " + std::to_string(address) + " is not a multiple of " +
         std::to_string(bytes));
  if (address < kSharedBase || int64_t(address) + bytes > int64_t(kSharedBase) + launch.shared)
    fail(std::string(what) + ": shared offset " + std::to_string(int64_t(address) - kSharedBase) + " + " +
         std::to_string(bytes) + " is outside the block's " + std::to_string(launch.shared) + " bytes");
  return &shared_memory[address - kSharedBase];
}

void Block::touch_shared(uint32_t address, int bytes, bool write) {
  const int me = current->thread, my_warp = me / 32;
  const uint32_t warp_epoch = warp().epoch;
  const auto race = [&](int other, uint64_t when, uint32_t when_in_warp) {
    if (other == kNobody || other == me || when != epoch) return false;
    if (other == kManyWarps) return true;
    const int other_warp = other >= 0 ? other / 32 : kManyLanes - other;
    return other_warp != my_warp || when_in_warp == warp_epoch;
  };
  for (uint32_t i = (address - kSharedBase) / 4; i < (address - kSharedBase + uint32_t(bytes) + 3) / 4; ++i) {
    Word& word = shared_words[i];
    if (race(word.writer, word.write_epoch, word.write_warp_epoch))
      fail(std::string("race: ") + (write ? "writes" : "reads") + " shared offset " + std::to_string(4 * i) +
           ", which thread " + std::to_string(word.writer) + " wrote, with no barrier between");
    if (write) {
      if (race(word.reader, word.read_epoch, word.read_warp_epoch))
        fail("race: writes shared offset " + std::to_string(4 * i) +
             ", which another thread read, with no barrier between");
      word.writer = me, word.write_epoch = epoch, word.write_warp_epoch = warp_epoch;
    } else {
      if (word.read_epoch != epoch || word.reader == kNobody)
        word.reader = me;
      else if (word.reader != me && word.reader != kManyWarps) {
        const int other_warp = word.reader >= 0 ? word.reader / 32 : kManyLanes - word.reader;
        word.reader = other_warp == my_warp ? kManyLanes - my_warp : kManyWarps;
      }
      word.read_epoch = epoch, word.read_warp_epoch = warp_epoch;
    }
  }
}

void Block::check_global(const void* address, int bytes, const char* what) const {
  const auto a = reinterpret_cast<uintptr_t>(address);
  if (a % uintptr_t(bytes))
    fail(std::string(what) + ": global address " + hex(a) + " is not a multiple of " + std::to_string(bytes));
  for (const Region& region : launch.regions) {
    const auto begin = reinterpret_cast<uintptr_t>(region.begin);
    if (a >= begin && a + uintptr_t(bytes) <= begin + uintptr_t(region.bytes)) return;
  }
  fail(std::string(what) + ": global address " + hex(a) + " is outside the tensors of this launch");
}

// Requests are grouped as the hardware would: the n-th time that each lane of a warp passes one instruction.
void Block::count(uintptr_t site, uint64_t address, int size, bool is_shared) {
  const int lane = current->thread % 32;
  Site& at = sites_[is_shared][size][site ^ uintptr_t(current->thread / 32) << 56];
  const int64_t i = at.issued[lane]++ - at.first;
  while (int64_t(at.open.size()) <= i) at.open.emplace_back();
  Request& request = at.open[size_t(i)];
  request.address[lane] = address;
  request.mask |= 1u << lane;
  while (!at.open.empty() && at.open.front().mask == 0xffffffffu) {
    finish_request(at.open.front(), size, is_shared);
    at.open.pop_front();
    ++at.first;
  }
}

void Block::finish_request(const Request& request, int size, bool is_shared) {
  if (is_shared) return count_wavefronts(request.address, request.mask, size);
  uint64_t at[32];
  int n = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (request.mask >> lane & 1) at[n++] = request.address[lane];
  std::sort(at, at + n);
  n = int(std::unique(at, at + n) - at);
  total.global_sectors_least += (n * size + 31) / 32;
  for (int i = 0; i < n; ++i) at[i] /= 32;
  total.global_sectors += std::unique(at, at + n) - at;
}

// 32 banks of 4 bytes; a pass serves 128 bytes: 32 lanes of 4, 16 of 8, 8 of 16.
void Block::count_wavefronts(const uint64_t* addresses, uint32_t mask, int size) {
  const int lanes = std::min(32, 128 / size);
  for (int first = 0; first < 32; first += lanes) {
    uint64_t words[32];
    int n = 0;
    for (int lane = first; lane < first + lanes; ++lane)
      if (mask >> lane & 1)
        for (int part = 0; part < std::max(1, size / 4); ++part) words[n++] = addresses[lane] / 4 + uint64_t(part);
    if (n == 0) continue;
    std::sort(words, words + n);
    n = int(std::unique(words, words + n) - words);
    int per_bank[32] = {}, most = 0;
    for (int i = 0; i < n; ++i) most = std::max(most, ++per_bank[words[i] % 32]);
    total.shared_wavefronts += most;
    ++total.shared_wavefronts_least;
  }
}

void Block::land(const Copy& copy) {
  unsigned char* to = shared(copy.to, copy.size, "cp.async");
  touch_shared(copy.to, copy.size, true);
  std::memset(to, 0, size_t(copy.size));
  if (copy.bytes) std::memcpy(to, copy.from, size_t(copy.bytes));
}

inline uintptr_t caller(void* address) { return reinterpret_cast<uintptr_t>(address); }
#define PHI1_SITE caller(__builtin_return_address(0))

}  // namespace

// ----------------------------------------------------------------------------------------- interface

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
uint32_t shared_base() { return kSharedBase; }

void bar_sync() { block->bar_sync(); }
void bar_warp_sync() {
  block->meet(Wait::bar_warp_sync, {}, [](Lane*) { ++block->warp().epoch; });
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
