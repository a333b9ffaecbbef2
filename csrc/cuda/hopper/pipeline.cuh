// How tiles go from the warpgroup that loads them to those that compute.
#pragma once

#include "cuda/hopper/tile.cuh"

namespace phi1::cuda::hopper {

// Where one side is in a ring: the place it uses next, and how often it has been round.
template <int kPlaces>
struct Turn {
  int place = 0, round = 0;
  PHI1_DEVICE void next() {
    if (++place == kPlaces) place = 0, ++round;
  }
};

// kPlaces places for tiles of kBytes, each with a barrier that says full (a phase: a warpgroup has written it) and one
// that says empty (a phase: kReaders warpgroups have read it). One lane arrives for each warp.
template <int kPlaces, int kBytes>
struct Ring {
  static constexpr int kSharedBytes = kPlaces * kBytes, kBarrierBytes = 16 * kPlaces;
  uint32_t tiles, barriers;

  PHI1_DEVICE uint32_t tile(Turn<kPlaces> turn) const { return tiles + uint32_t(turn.place * kBytes); }
  PHI1_DEVICE uint32_t full(Turn<kPlaces> turn) const { return barriers + uint32_t(16 * turn.place); }
  PHI1_DEVICE uint32_t empty(Turn<kPlaces> turn) const { return full(turn) + 8; }

  // By one thread, before a barrier of the block.
  PHI1_DEVICE void init(int readers) const {
    for (int place = 0; place < kPlaces; ++place) {
      mbarrier_init(barriers + uint32_t(16 * place), kWarpgroup / 32);
      mbarrier_init(barriers + uint32_t(16 * place + 8), kWarpgroup / 32 * readers);
    }
  }

  PHI1_DEVICE void wait_full(Turn<kPlaces> turn) const { mbarrier_wait(full(turn), turn.round); }
  PHI1_DEVICE void wait_empty(Turn<kPlaces> turn) const { mbarrier_wait(empty(turn), turn.round - 1); }

  // Reader: this warp is done with the place. All its wgmma on the tile have been waited for.
  PHI1_DEVICE void release(Turn<kPlaces> turn) const {
    bar_warp_sync();  // what other lanes read by themselves
    if (lane_index() == 0) mbarrier_arrive(empty(turn));
  }
};

// The writers' side: copies by cp.async, which serve any strides and end a document's tile with zeros. A tile is
// published when the copies of the next one are on their way, for only then are its own worth waiting for: a thread
// waits for its copies, hands them to the async proxy, then arrives.
struct Loader {
  int thread;            // in its warpgroup
  uint32_t pending = 0;  // the `full` of a tile that is on its way; 0: none

  // copies(address of the place): starts this thread's share of them.
  template <int kPlaces, int kBytes, typename F>
  PHI1_DEVICE void load(const Ring<kPlaces, kBytes>& ring, Turn<kPlaces>& turn, F copies) {
    ring.wait_empty(turn);
    copies(ring.tile(turn));
    cp_async_commit();
    if (pending) {
      cp_async_wait<1>();
      publish();
    }
    pending = ring.full(turn);
    turn.next();
  }

  PHI1_DEVICE void finish() {
    if (!pending) return;
    cp_async_wait<0>();
    publish();
    pending = 0;
  }

 private:
  PHI1_DEVICE void publish() const {
    fence_proxy_async();
    bar_warp_sync();
    if (thread % 32 == 0) mbarrier_arrive(pending);
  }
};

}  // namespace phi1::cuda::hopper
