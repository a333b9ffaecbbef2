// Small kernels that each break one rule of Hopper's instructions, or none, run by csrc/emulator. Prints a line for
// each: name, then what happened.
#include <cstdio>
#include <functional>

#include "cuda/hopper/pipeline.cuh"

using namespace phi1;
using namespace phi1::cuda;
using namespace phi1::cuda::hopper;

namespace {

alignas(256) uint16_t memory[128 * 128];
constexpr int kSharedBytes = 64 * 1024;

void expect(const char* name, int threads, const std::function<void()>& kernel) {
  try {
    emulator::run({name, 1, threads, kSharedBytes, {{memory, sizeof memory}}}, kernel);
    std::printf("%s: ok\n", name);
  } catch (const emulator::Error& error) {
    std::printf("%s: %s\n", name, error.what());
  }
}

// The same where the order of threads decides whether it is noticed: in some order of many.
void expect_in_some_order(const char* name, int threads, const std::function<void()>& kernel) {
  std::string found = "ok";
  for (uint64_t seed = 0; seed < 32 && found == "ok"; ++seed) {
    emulator::set_seed(seed);
    try {
      emulator::run({name, 1, threads, kSharedBytes, {{memory, sizeof memory}}}, kernel);
    } catch (const emulator::Error& error) {
      found = error.what();
    }
  }
  emulator::set_seed(0);
  std::printf("%s: %s\n", name, found.c_str());
}

using Square = hopper::Tile<64, 64>;
uint32_t shared(int byte) { return shared_base() + uint32_t(byte); }
int thread() { return thread_index() % kWarpgroup; }

// Copies a tile, by all threads of a warpgroup, and waits for it.
void copy_tile(uint32_t tile) {
  Square::load(tile, {memory, 64}, 0, 64, thread());
  cp_async_commit();
  cp_async_wait<0>();
}

void barriers() {
  const auto one_lane = [](auto f) {
    if (thread_index() == 0) f();
  };
  expect("mbarrier_orders", 64, [&] {
    one_lane([] { mbarrier_init(shared(0), 1); });
    bar_sync();
    if (warp_index() == 0) {
      st_shared_4(shared(64 + 4 * lane_index()), 1);
      bar_warp_sync();
      if (lane_index() == 0) mbarrier_arrive(shared(0));
    } else {
      mbarrier_wait(shared(0), 0);
      ld_shared_4(shared(64 + 4 * (31 - lane_index())));
    }
  });
  expect_in_some_order("mbarrier_not_waited_for", 64, [&] {
    one_lane([] { mbarrier_init(shared(0), 1); });
    bar_sync();
    if (warp_index() == 0) {
      st_shared_4(shared(64 + 4 * lane_index()), 1);
      bar_warp_sync();
      if (lane_index() == 0) mbarrier_arrive(shared(0));
    } else {
      ld_shared_4(shared(64 + 4 * (31 - lane_index())));
    }
  });
  expect("mbarrier_waited_for_by_one_lane", 64, [&] {
    one_lane([] { mbarrier_init(shared(0), 1); });
    bar_sync();
    if (warp_index() == 0) {
      st_shared_4(shared(64 + 4 * lane_index()), 1);
      bar_warp_sync();
      if (lane_index() == 0) mbarrier_arrive(shared(0));
    } else {
      if (lane_index() == 0) mbarrier_wait(shared(0), 0);
      shfl_xor(1u, 1);
      ld_shared_4(shared(64 + 4 * (31 - lane_index())));
    }
  });
  expect("arrival_without_the_warps_barrier", 64, [&] {
    one_lane([] { mbarrier_init(shared(0), 1); });
    bar_sync();
    if (warp_index() == 0) {
      st_shared_4(shared(64 + 4 * lane_index()), 1);
      shfl_xor(1u, 1);
      if (lane_index() == 0) mbarrier_arrive(shared(0));
    } else {
      mbarrier_wait(shared(0), 0);
      ld_shared_4(shared(64 + 4 * (31 - lane_index())));
    }
  });
  expect("mbarrier_phase_ahead", 32, [&] {
    one_lane([] { mbarrier_init(shared(0), 1); });
    bar_sync();
    mbarrier_wait(shared(0), 1);
  });
  expect("mbarrier_phase_behind", 32, [&] {
    one_lane([] {
      mbarrier_init(shared(0), 1);
      mbarrier_arrive(shared(0));
      mbarrier_arrive(shared(0));
      mbarrier_wait(shared(0), 0);
    });
  });
  expect("mbarrier_without_init", 32, [&] { mbarrier_wait(shared(0), 0); });
  expect_in_some_order("mbarrier_init_without_barrier", 64, [&] {
    one_lane([] { mbarrier_init(shared(0), 1); });
    if (thread_index() == 32) mbarrier_arrive(shared(0));
  });
  expect("mbarrier_init_twice", 32,
         [&] { one_lane([] { mbarrier_init(shared(0), 1), mbarrier_init(shared(0), 1); }); });
  expect("mbarrier_alignment", 32, [&] { one_lane([] { mbarrier_init(shared(4), 1); }); });
  expect("mbarrier_count", 32, [&] { one_lane([] { mbarrier_init(shared(0), 0); }); });
  expect("mbarrier_written", 32, [&] {
    one_lane([] {
      mbarrier_init(shared(0), 1);
      st_shared_4(shared(4), 0);
    });
  });
  expect("arrival_left_over", 32, [&] {
    one_lane([] {
      mbarrier_init(shared(0), 2);
      mbarrier_arrive(shared(0));
    });
  });
  expect("arrival_missing", 32, [&] {
    one_lane([] { mbarrier_init(shared(0), 2); });
    bar_sync();
    one_lane([] { mbarrier_arrive(shared(0)); });
    mbarrier_wait(shared(0), 0);
  });

  expect("named_barrier_orders", 64, [&] {
    st_shared_4(shared(4 * thread_index()), 1);
    bar_sync_named(1, 64);
    ld_shared_4(shared(4 * (63 - thread_index())));
  });
  expect("named_barrier_orders_who_waits_only", 64, [&] {
    st_shared_4(shared(4 * thread_index()), 1);
    if (warp_index() == 0)
      bar_sync_named(1, 64);
    else
      bar_arrive_named(1, 64);
    ld_shared_4(shared(4 * (63 - thread_index())));
  });
  expect("named_barrier_number", 32, [&] { bar_sync_named(0, 32); });
  expect("named_barrier_threads", 32, [&] { bar_sync_named(1, 48); });
  expect("named_barrier_counts_differ", 96, [&] { bar_sync_named(1, warp_index() == 0 ? 96 : 64); });
  expect("named_barrier_left_over", 64, [&] {
    if (warp_index() == 0) bar_arrive_named(1, 64);
  });
  expect("named_barrier_missing", 64, [&] {
    if (warp_index() == 0) bar_sync_named(1, 64);
  });
  expect("named_barrier_lanes", 32, [&] { bar_sync_named(1 + lane_index() % 2, 32); });

  expect("registers_given_and_taken", 384, [&] {
    if (warpgroup_index() == 0)
      setmaxnreg_dec<40>();
    else
      setmaxnreg_inc<232>();
  });
  expect("registers_that_nobody_gives", 384, [&] {
    if (warpgroup_index() > 0) setmaxnreg_inc<232>();
  });
  expect("registers_increased_by_dec", 384, [&] { setmaxnreg_dec<232>(); });
  expect("registers_decreased_by_inc", 384, [&] { setmaxnreg_inc<40>(); });
  expect("registers_not_a_multiple_of_8", 384, [&] { setmaxnreg_dec<42>(); });
}

void products() {
  struct Options {
    bool fence_proxy = true, barrier = true, fence = true, commit = true, wait = true;
    int start = 0, stride = 1024;
  };
  const auto product = [](const Options& o) {
    copy_tile(shared(0));
    if (o.fence_proxy) fence_proxy_async();
    if (o.barrier) bar_sync();
    float d[8][4] = {};
    if (o.fence) wgmma_fence();
    const uint64_t operand = descriptor(shared(o.start), 0, o.stride);
    wgmma(bf16{}, d, operand, operand, false);
    if (o.commit) wgmma_commit();
    if (o.wait) wgmma_wait<0>(d);
  };
  const auto with = [&](auto change) {
    Options options;
    change(options);
    return [=] { product(options); };
  };
  expect("product", 128, with([](Options&) {}));
  expect("no_proxy_fence", 128, with([](Options& o) { o.fence_proxy = false; }));
  expect("no_barrier_before_wgmma", 128, with([](Options& o) { o.barrier = false; }));
  expect("no_wgmma_fence", 128, with([](Options& o) { o.fence = false; }));
  expect("no_commit", 128, with([](Options& o) { o.commit = false; }));
  expect("no_wait", 128, with([](Options& o) { o.wait = false; }));
  expect("neither_commit_nor_wait", 128, with([](Options& o) { o.commit = o.wait = false; }));
  expect("pattern_off_by_a_row", 128, with([](Options& o) { o.start = 128; }));
  expect("stride_of_half_a_pattern", 128, with([](Options& o) { o.stride = 512; }));
  expect("outside_the_block", 128, with([](Options& o) { o.start = kSharedBytes - 4096; }));
  expect("no_swizzle", 128, [&] {
    copy_tile(shared(0));
    fence_proxy_async();
    bar_sync();
    float d[8][4] = {};
    wgmma_fence();
    const uint64_t operand = descriptor(shared(0), 0, 1024) & ~kSwizzle128;
    wgmma(bf16{}, d, operand, operand, false);
  });
  expect("proxy_fence_of_another_thread", 128, [&] {
    copy_tile(shared(0));
    bar_sync();
    if (warp_index() == 0) fence_proxy_async();
    bar_sync();
    float d[8][4] = {};
    wgmma_fence();
    wgmma(bf16{}, d, Square::rows_operand(shared(0), 0, 0), Square::rows_operand(shared(0), 0, 0), false);
    wgmma_commit();
    wgmma_wait<0>(d);
  });
  expect("proxy_fence_before_the_copies_land", 128, [&] {
    Square::load(shared(0), {memory, 64}, 0, 64, thread());
    cp_async_commit();
    fence_proxy_async();
    cp_async_wait<0>();
    bar_sync();
    float d[8][4] = {};
    wgmma_fence();
    wgmma(bf16{}, d, Square::rows_operand(shared(0), 0, 0), Square::rows_operand(shared(0), 0, 0), false);
    wgmma_commit();
    wgmma_wait<0>(d);
  });
  // After a tile has come: d += a b with a in registers, and a mistake in between.
  struct Registers {
    float d[8][4] = {}, e[8][4] = {};
    uint32_t a[4] = {};
  };
  const auto after_tile = [](auto f) {
    return [=] {
      copy_tile(shared(0));
      fence_proxy_async();
      bar_sync();
      Registers registers;
      wgmma_fence();
      f(registers);
    };
  };
  const auto issue = [](float (&d)[8][4], uint32_t (&a)[4]) {
    wgmma(bf16{}, d, a, Square::columns_operand(shared(0), 0));
  };
  expect("two_on_one_accumulator", 128, after_tile([=](Registers& r) {
           issue(r.d, r.a), issue(r.d, r.a);
           wgmma_commit();
           wgmma_wait<0>(r.d);
         }));
  expect("accumulator_changed_after_the_fence", 128, after_tile([=](Registers& r) {
           r.d[3][1] = 1.0f;
           issue(r.d, r.a);
         }));
  expect("operand_changed_after_the_fence", 128, after_tile([=](Registers& r) {
           r.a[1] = 1;
           issue(r.d, r.a);
         }));
  expect("operand_changed_in_flight", 128, after_tile([=](Registers& r) {
           issue(r.d, r.a);
           wgmma_commit();
           r.a[1] = 1;
           wgmma_wait<0>(r.d);
         }));
  expect("accumulator_changed_in_flight", 128, after_tile([=](Registers& r) {
           issue(r.d, r.a);
           wgmma_commit();
           r.d[0][0] = 1.0f;
           wgmma_wait<0>(r.d);
         }));
  static bool is_nan;
  expect("accumulator_read_in_flight", 128, after_tile([=](Registers& r) {
           issue(r.d, r.a);
           wgmma_commit();
           is_nan = r.d[0][0] != r.d[0][0];
           wgmma_wait<0>(r.d);
         }));
  std::printf("in_flight: %s\n", is_nan ? "nan" : "a number");
  expect("waits_for_one_group_too_few", 128, after_tile([=](Registers& r) {
           issue(r.d, r.a);
           wgmma_commit();
           issue(r.e, r.a);
           wgmma_commit();
           wgmma_wait<1>(r.e);
         }));
  expect("waits_for_the_older_group", 128, after_tile([=](Registers& r) {
           issue(r.d, r.a);
           wgmma_commit();
           issue(r.e, r.a);
           wgmma_commit();
           wgmma_wait<1>(r.d);
           wgmma_wait<0>(r.e);
         }));
  expect("operand_overwritten_in_flight", 128, after_tile([=](Registers& r) {
           issue(r.d, r.a);
           wgmma_commit();
           st_shared_4(shared(4 * thread_index()), 0);
           wgmma_wait<0>(r.d);
         }));
  expect_in_some_order("operand_overwritten_before_others_have_read", 256, [=] {
    if (warpgroup_index() == 0) {
      copy_tile(shared(0));
      fence_proxy_async();
    }
    bar_sync();
    Registers r;
    if (warpgroup_index() == 1) {
      wgmma_fence();
      issue(r.d, r.a);
      wgmma_commit();
      wgmma_wait<0>(r.d);
    } else {
      st_shared_4(shared(4 * thread_index()), 0);
    }
  });
  expect("released_after_the_wait", 256, [=] {
    if (thread_index() == 0) mbarrier_init(shared(16384), 4);
    if (warpgroup_index() == 0) {
      copy_tile(shared(0));
      fence_proxy_async();
    }
    bar_sync();
    Registers r;
    if (warpgroup_index() == 1) {
      wgmma_fence();
      issue(r.d, r.a);
      wgmma_commit();
      wgmma_wait<0>(r.d);
      if (lane_index() == 0) mbarrier_arrive(shared(16384));
    } else {
      mbarrier_wait(shared(16384), 0);
      st_shared_4(shared(4 * thread_index()), 0);
    }
  });
  expect_in_some_order("released_before_the_wait", 256, [=] {
    if (thread_index() == 0) mbarrier_init(shared(16384), 4);
    if (warpgroup_index() == 0) {
      copy_tile(shared(0));
      fence_proxy_async();
    }
    bar_sync();
    Registers r;
    if (warpgroup_index() == 1) {
      wgmma_fence();
      issue(r.d, r.a);
      wgmma_commit();
      if (lane_index() == 0) mbarrier_arrive(shared(16384));
      wgmma_wait<0>(r.d);
    } else {
      mbarrier_wait(shared(16384), 0);
      st_shared_4(shared(4 * thread_index()), 0);
    }
  });
  expect_in_some_order("released_by_one_warp_for_all", 256, [=] {
    if (thread_index() == 0) mbarrier_init(shared(16384), 1);
    if (warpgroup_index() == 0) {
      copy_tile(shared(0));
      fence_proxy_async();
    }
    bar_sync();
    Registers r;
    if (warpgroup_index() == 1) {
      wgmma_fence();
      issue(r.d, r.a);
      wgmma_commit();
      wgmma_wait<0>(r.d);
      if (thread_index() == 128) mbarrier_arrive(shared(16384));
    } else {
      mbarrier_wait(shared(16384), 0);
      st_shared_4(shared(4 * thread_index()), 0);
    }
  });
  expect("warps_at_different_wgmma", 128, after_tile([=](Registers& r) {
           wgmma(bf16{}, r.d, r.a, Square::columns_operand(shared(0), warp_index() == 3));
           wgmma_commit();
           wgmma_wait<0>(r.d);
         }));
  expect("a_warp_without_wgmma", 128, after_tile([=](Registers& r) {
           if (warp_index() == 3) return;
           issue(r.d, r.a);
           wgmma_commit();
           wgmma_wait<0>(r.d);
         }));
  expect("lanes_at_different_wgmma", 128, after_tile([=](Registers& r) {
           wgmma(bf16{}, r.d, r.a, Square::columns_operand(shared(0), lane_index() == 3));
         }));
}

}  // namespace

int main() {
  barriers();
  products();
}
