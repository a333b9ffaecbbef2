// One block of a launch: its threads as fibers, in which order they run, and the rules of its memory.
#pragma once

#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator/emulator.h"
#include "emulator/fiber.h"
#include "emulator/hopper_state.h"

namespace phi1::emulator {

// Where the shared window starts: an address that is not zero, so that a kernel cannot confuse offset and address.
constexpr uint32_t kSharedBase = 1024;

enum class Wait { none, bar_sync, bar_warp_sync, ldmatrix, mma, shfl, bar_named, mbarrier, setmaxnreg, wgmma };
constexpr int kWaits = 10;

const char* name_of(Wait wait);

struct Copy {
  uint32_t to;
  const void* from;
  int size, bytes;
  int64_t group;
};

// What a thread knows of the others: of warp w, all accesses stamped below the tick at [w] and all of its wgmma's reads
// stamped below that at [warps + w] come before what it does next. Joined by barriers.
using Knowledge = std::vector<Tick>;

void join(Knowledge& mine, const Knowledge& other);

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
  int64_t groups;       // committed so far
  Registers registers;  // of wgmma: at its last fence
  WgmmaShape shape;
  std::vector<Tick> fences;  // fence.proxy.async: when
};

struct Warp {
  std::vector<int> ready;  // threads, in the order in which they will run
  int arrived;
  Wait at;
  Tick tick;       // stamps this warp's accesses to shared memory; goes up whenever some are released
  Tick waits;      // stamps its wgmma's reads; goes up at each wait
  uint32_t dirty;  // lanes that have touched shared memory since the last barrier of all lanes
  int registers;   // a thread
  WarpWgmma wgmma;
};

// Who last touched a word of shared memory, and when: a tick of his warp. Ticks go on from block to block, so that what
// an earlier block left is always in order.
constexpr int kNobody = -1, kManyLanes = -2;
struct Word {
  int writer = kNobody;
  bool is_barrier = false;
  Tick written = 0;
  size_t fences = 0;  // of the writer, before it wrote
};
struct Reader {  // of one word, lanes of one warp
  int thread = kNobody;
  Tick read = 0, read_by_wgmma = 0;
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
  Knowledge release();  // by the running lane; returns what others learn from it
  void release_warp();  // all lanes of the running warp are at a barrier: each learns what the others know
  Knowledge& knowledge(int thread) { return knowledge_[size_t(thread)]; }
  // The running lane goes on when wake() is called for it.
  void sleep(Wait wait);
  void wake(int thread);
  void check_global(const void* address, int bytes, const char* what) const;
  void count(uintptr_t site, uint64_t address, int size, bool is_shared);
  void count_wavefronts(const uint64_t* addresses, uint32_t mask, int size);
  void land(const Copy& copy);

  Warp& warp() { return warps_[size_t(current->thread) / 32]; }
  Lane* lanes() { return &lanes_[size_t(current->thread) / 32 * 32]; }
  std::vector<Warp>& warps() { return warps_; }
  const unsigned char* stack_top(int thread) const;
  Lane& lane(int thread) { return lanes_[size_t(thread)]; }
  Tick first_tick() const { return first_tick_; }
  Hopper hopper;

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
  Tick first_tick_ = 0;
  std::vector<Knowledge> knowledge_;  // of each thread
  std::exception_ptr error_;
  std::unordered_map<uintptr_t, Site> sites_[2][17];  // [shared?][size]
};

extern Block* block;  // that runs
extern Counters total;
extern std::vector<unsigned char> shared_memory;
extern std::vector<Word> shared_words;
Reader& reader(size_t word, int warp);  // of shared_words

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

}  // namespace phi1::emulator
