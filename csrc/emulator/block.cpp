#include "emulator/block.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace phi1::emulator {

Block* block = nullptr;
Counters total;
std::vector<unsigned char> shared_memory;

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

namespace {

constexpr size_t kStackBytes = 128 * 1024;
uint64_t epoch = 1;  // barriers passed, over all blocks: a word's old owners never match
std::vector<unsigned char> stacks;
std::vector<Word> shared_words;

Stack stack_of(int thread) { return {&stacks[size_t(thread) * kStackBytes], kStackBytes}; }

void entry() { block->live(); }

}  // namespace

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

// ------------------------------------------------------------------------------------------ memory

static std::string hex(uint64_t address) {
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

}  // namespace phi1::emulator
