// Small kernels that each break one rule, or none, run by csrc/emulator. Prints a line for each: name, then what
// happened.
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "cuda/ptx.cuh"

using namespace phi1;
using namespace phi1::cuda;

alignas(32) static uint32_t memory[1024];

static void expect(const char* name, int threads, const std::function<void()>& kernel) {
  emulator::reset_counters();
  try {
    emulator::run({name, 1, threads, 4096, {{memory, sizeof memory}}}, kernel);
    const emulator::Counters c = emulator::counters();
    std::printf("%s: ok, sectors %lld of %lld, wavefronts %lld of %lld\n", name, (long long)c.global_sectors,
                (long long)c.global_sectors_least, (long long)c.shared_wavefronts,
                (long long)c.shared_wavefronts_least);
  } catch (const emulator::Error& error) {
    std::printf("%s: %s\n", name, error.what());
  }
}

int main() {
  const auto shared = [](int byte) { return shared_base() + uint32_t(byte); };
  const auto copy = [&](int byte, const void* from) { cp_async_16(shared(byte), from, 16); };
  const auto* bytes = reinterpret_cast<const unsigned char*>(memory);

  expect("dense", 32, [&] { st_global(memory + thread_index(), 1u); });
  expect("strided", 32, [&] { st_global(memory + 8 * thread_index(), 1u); });
  expect("no_conflict", 32, [&] { st_shared_4(shared(4 * thread_index()), 1); });
  expect("conflict", 32, [&] { st_shared_4(shared(128 * thread_index()), 1); });

  expect("shared_bounds", 32, [&] { st_shared_4(shared(4096), 1); });
  expect("shared_alignment", 32, [&] { ld_shared_16(shared(8)); });
  expect("global_bounds", 32, [&] { ld_global(memory + 1024 + thread_index()); });
  expect("global_alignment", 32, [&] { ld_global_16(bytes + 4); });
  expect("copy_alignment", 32, [&] { copy(16 * thread_index(), bytes + 8); });

  expect("race_write_read", 64, [&] {
    st_shared_4(shared(4 * thread_index()), 1);
    ld_shared_4(shared(4 * (63 - thread_index())));
  });
  expect("race_read_write", 64, [&] {
    st_shared_4(shared(4 * thread_index()), 1);
    bar_sync();
    ld_shared_4(shared(4 * (63 - thread_index())));
    st_shared_4(shared(4 * thread_index()), 2);
  });
  // One warp writes what the other reads. Which comes first is drawn: over some seeds, each is found.
  bool found[2] = {};
  for (uint64_t seed = 0; seed < 32; ++seed) {
    emulator::set_seed(seed);
    try {
      emulator::run({"race", 1, 64, 4096, {}}, [&] {
        const uint32_t word = shared(4 * (thread_index() % 32));
        thread_index() < 32 ? st_shared_4(word, 1) : void(ld_shared_4(word));
      });
    } catch (const emulator::Error& error) {
      found[std::string(error.what()).find("race: reads") == std::string::npos] = true;
    }
  }
  emulator::set_seed(0);
  std::printf("race_of_a_pair: reads %d, writes %d\n", found[0], found[1]);
  expect("barrier_orders", 64, [&] {
    st_shared_4(shared(4 * thread_index()), 1);
    bar_sync();
    ld_shared_4(shared(4 * (63 - thread_index())));
  });
  expect("warp_barrier_orders_a_warp", 32, [&] {
    st_shared_4(shared(4 * thread_index()), 1);
    bar_warp_sync();
    ld_shared_4(shared(4 * (31 - thread_index())));
  });
  expect("warp_barrier_does_not_order_a_block", 64, [&] {
    st_shared_4(shared(4 * thread_index()), 1);
    bar_warp_sync();
    ld_shared_4(shared(4 * (63 - thread_index())));
  });

  expect("divergent_barrier", 64, [&] {
    if (thread_index() < 40) bar_sync();
  });
  expect("divergent_warp", 32, [&] {
    if (thread_index() < 7)
      shfl_xor(1u, 1);
    else
      bar_warp_sync();
  });
  expect("copy_never_waited_for", 32, [&] {
    copy(16 * thread_index(), bytes);
    cp_async_commit();
  });
  for (uint32_t& word : memory) word = 5;
  // What a thread reads of its own copies: the first before any wait, after a wait for all but one group, after all.
  static uint32_t seen[3];
  expect("copies_land_at_their_wait", 32, [&] {
    copy(32 * thread_index(), bytes);
    cp_async_commit();
    copy(32 * thread_index() + 16, bytes);
    cp_async_commit();
    const uint32_t early = ld_shared_4(shared(32 * thread_index()));
    cp_async_wait<1>();
    const uint32_t first = ld_shared_4(shared(32 * thread_index()));
    const uint32_t second = ld_shared_4(shared(32 * thread_index() + 16));
    cp_async_wait<0>();
    if (thread_index() == 0) seen[0] = early, seen[1] = first, seen[2] = second;
  });
  std::printf("seen: %x %x %x\n", seen[0], seen[1], seen[2]);
  static float fresh;
  expect("shared_memory_starts_as_nan", 32, [&] {
    const uint32_t word = ld_shared_4(shared(4 * thread_index()));
    if (thread_index() == 0) fresh = bits_to_float(word);
  });
  std::printf("fresh: %s\n", fresh != fresh ? "nan" : "a number");
}
