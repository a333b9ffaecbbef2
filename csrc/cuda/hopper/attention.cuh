// What the attention kernels for compute capability 9.0a share.
#pragma once

#include "cuda/hopper/pipeline.cuh"
#include "cuda/schedule.cuh"

namespace phi1::cuda::hopper {

// Tiles of kKeys keys that the last query of this work's kRows sees.
template <int kRows, int kKeys>
PHI1_DEVICE int key_tiles(const AttentionArgs& args, const Work& work) {
  const int last = minimum(work.first + kRows, work.seqlen_q) - 1;
  const int keys = minimum(last + visible_keys(args, work), work.seqlen_k);
  return keys > 0 ? ceil_div(keys, kKeys) : 0;
}

// Whether an exponent is so far from 0 that its rounding, 2^-12 at the most below, would show in a power of it.
PHI1_DEVICE bool is_large(float x) { return !((x < 0.0f ? -x : x) < 4096.0f); }

// The accumulators of a warp as those of csrc/cuda/attention.cuh and tile.cuh: one row of tiles.
template <int kN>
using Tiles = float[1][kN][4];
template <int kN>
PHI1_DEVICE Tiles<kN>& as_tiles(float (&x)[kN][4]) {
  return reinterpret_cast<Tiles<kN>&>(x);
}

// Accumulators in columns from limit[0] (in rows below 8) and limit[1] on, or before them, become `value`. Columns are
// counted from this lane's first.
template <int kN>
PHI1_DEVICE void hide_from(const int (&limit)[2], float value, float (&x)[kN][4]) {
  for_each(as_tiles(x), 0, 0, [&](float& element, const Element& at) {
    if (8 * at.n + at.i % 2 >= limit[at.i / 2]) element = value;
  });
}

template <int kN>
PHI1_DEVICE void hide_before(const int (&limit)[2], float value, float (&x)[kN][4]) {
  for_each(as_tiles(x), 0, 0, [&](float& element, const Element& at) {
    if (8 * at.n + at.i % 2 < limit[at.i / 2]) element = value;
  });
}

}  // namespace phi1::cuda::hopper
