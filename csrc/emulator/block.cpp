#include "emulator/block.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace phi1::emulator {

Block* block = nullptr;
Counters total;
std::vector<unsigned char> shared_memory;
std::vector<Word> shared_words;

const char* name_of(Wait wait) {
  switch (wait) {
    case Wait::bar_sync: return "bar.sync";
    case Wait::bar_warp_sync: return "bar.warp.sync";
    case Wait::ldmatrix: return "ldmatrix";
    case Wait::mma: return "mma";
    case Wait::shfl: return "shfl";
    case Wait::bar_named: return "a named barrier";
    case Wait::mbarrier: return "an mbarrier";
    case Wait::setmaxnreg: return "setmaxnreg";
    case Wait::wgmma: return "wgmma";
    case Wait::none: break;
  }
  return "nothing";
}

namespace {

constexpr size_t kStackBytes = 128 * 1024;
Tick next_tick = 1;  // of the next block: later than all of this one's
std::vector<unsigned char> stacks;
std::vector<Reader> readers;  // of word i and warp w at [i warps + w]
size_t reader_warps = 0;

Stack stack_of(int thread) { return {&stacks[size_t(thread) * kStackBytes], kStackBytes}; }

void entry() { block->live(); }

}  // namespace

Reader& reader(size_t word, int warp) { return readers[word * reader_warps + size_t(warp)]; }

void join(Knowledge& mine, const Knowledge& other) {
  for (size_t i = 0; i < mine.size(); ++i) mine[i] = std::max(mine[i], other[i]);
}

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
  reader_warps = size_t(threads) / 32;
  readers.resize(std::max(readers.size(), shared_words.size() * reader_warps));
  if (stacks.size() < size_t(threads) * kStackBytes)  // nothing in the old ones is worth a copy
    stacks = std::vector<unsigned char>(size_t(threads) * kStackBytes);
  lanes_.resize(size_t(threads));
  warps_.resize(size_t(threads) / 32);
  first_tick_ = next_tick;
  knowledge_.assign(size_t(threads), Knowledge(2 * reader_warps, first_tick_));
  for (Warp& warp : warps_) {
    warp.tick = warp.waits = first_tick_;
    warp.registers = std::min(65536 / threads / 8 * 8, 255);
  }
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
  for (const Warp& warp : warps_) next_tick = std::max({next_tick, warp.tick + 1, warp.waits + 1});
  if (!error_) {
    try {
      hopper.finish();
    } catch (...) {
      error_ = std::current_exception();
    }
  }
  block = nullptr;
  if (error_) std::rethrow_exception(error_);
  for (auto& by_size : sites_)
    for (int size = 0; size < 17; ++size)
      for (auto& [site, requests] : by_size[size])
        for (const Request& request : requests.open) finish_request(request, size, &by_size == &sites_[1]);
}

const unsigned char* Block::stack_top(int thread) const { return stack_of(thread).bottom + kStackBytes; }

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
    if (!warp().wgmma.operations.empty()) fail("exits with wgmma that were never waited for");
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
      int waiting[kWaits] = {};
      for (const Lane& lane : lanes_) ++waiting[int(lane.wait)];
      std::string what = "divergence: no thread can go on;";
      for (int w = 1; w < kWaits; ++w)
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

void Block::sleep(Wait wait) {
  current->wait = wait;
  yield();
}

void Block::wake(int thread) {
  lanes_[size_t(thread)].wait = Wait::none;
  warps_[size_t(thread) / 32].ready.push_back(thread);
}

void Block::bar_sync() {
  Lane* me = current;
  if (++at_barrier_ < launch.threads) return sleep(Wait::bar_sync);
  at_barrier_ = 0;
  ++total.barriers;
  Knowledge all = knowledge_[0];
  for (const Knowledge& one : knowledge_) join(all, one);
  for (size_t w = 0; w < warps_.size(); ++w) all[w] = ++warps_[w].tick, warps_[w].dirty = 0;
  for (Knowledge& one : knowledge_) one = all;
  for (Lane& lane : lanes_)
    if (&lane != me) wake(lane.thread);
  for (Warp& warp : warps_) shuffle(warp.ready);
}

Knowledge Block::release() {
  Warp& warp = this->warp();
  Knowledge mine = knowledge(current->thread);
  const uint32_t me = 1u << current->thread % 32;
  // What other lanes of the warp did is released with them only after a barrier of all lanes.
  if ((warp.dirty & ~me) == 0) mine[size_t(current->thread) / 32] = ++warp.tick, warp.dirty = 0;
  return mine;
}

void Block::release_warp() {
  Warp& warp = this->warp();
  const int first = current->thread / 32 * 32;
  Knowledge all = knowledge(first);
  for (int i = 1; i < 32; ++i) join(all, knowledge(first + i));
  all[size_t(first) / 32] = ++warp.tick, warp.dirty = 0;
  for (int i = 0; i < 32; ++i) knowledge(first + i) = all;
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
  const int me = current->thread;
  const size_t my_warp = size_t(me) / 32;
  const Knowledge& known = knowledge(me);
  warp().dirty |= 1u << me % 32;
  if (write) hopper.check_not_read(address, bytes);
  for (uint32_t i = (address - kSharedBase) / 4; i < (address - kSharedBase + uint32_t(bytes) + 3) / 4; ++i) {
    Word& word = shared_words[i];
    const bool fresh = word.written >= first_tick_;  // written by this block
    const auto place = [&] { return "shared offset " + std::to_string(4 * i); };
    if (fresh && word.is_barrier) fail((write ? "writes " : "reads ") + place() + ", which is an mbarrier");
    if (fresh && word.writer != me && word.written >= known[size_t(word.writer) / 32])
      fail(std::string("race: ") + (write ? "writes " : "reads ") + place() + ", which thread " +
           std::to_string(word.writer) + " wrote, with no barrier between");
    if (write) {
      for (size_t w = 0; w < warps_.size(); ++w) {
        const Reader& other = reader(i, int(w));
        if (other.thread != me && other.read >= known[w] && other.read >= first_tick_)
          fail("race: writes " + place() + ", which another thread read, with no barrier between");
        if (w != my_warp && other.read_by_wgmma >= known[warps_.size() + w])
          fail("race: writes " + place() + ", which a wgmma of warp " + std::to_string(w) +
               " read, with no barrier between");
      }
      word.writer = me, word.written = warp().tick, word.fences = current->fences.size(), word.is_barrier = false;
    } else {
      Reader& mine = reader(i, int(my_warp));
      const bool others = mine.thread != me && mine.read >= known[my_warp];
      mine.thread = others ? kManyLanes : me, mine.read = warp().tick;
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
