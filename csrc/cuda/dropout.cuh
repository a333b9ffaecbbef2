// The dropout mask of kernels/reference.py (`dropout_keep`), bit for bit.
#pragma once

#include "cuda/ptx.cuh"

namespace phi1::cuda {

// Philox 4x32-10 (Salmon et al., SC 2011): 20 wide multiplications for four words.
PHI1_DEVICE void philox(uint32_t (&c)[4], uint64_t seed) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c[0], p1 = uint64_t(0xCD9E8D57u) * c[2];
    c[0] = uint32_t(p1 >> 32) ^ c[1] ^ k0;
    c[1] = uint32_t(p1);
    c[2] = uint32_t(p0 >> 32) ^ c[3] ^ k1;
    c[3] = uint32_t(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// Random bits of one row: word i holds columns 32 group + 8 i + 2 pair (low half) and the next (high half).
PHI1_DEVICE void attention_random(uint32_t (&word)[4], uint64_t seed, int plane, int row, int group, int pair) {
  constexpr uint32_t kAttentionOffset = 0;
  word[0] = uint32_t(group * 4 + pair), word[1] = uint32_t(row), word[2] = uint32_t(plane), word[3] = kAttentionOffset;
  philox(word, seed);
}

// Random bits of the eight columns from `column` (a multiple of 8) of one row of the residual: element 2 i is the low
// half of word i, element 2 i + 1 the high half. Lane q of four holds columns 8 q to 8 q + 7 of a group of 32, and one
// draw serves a pair of columns of each of the four: each lane draws once, then the four exchange 4 x 4 words. All 32
// lanes of the warp take part.
PHI1_DEVICE void residual_random(uint32_t (&word)[4], uint64_t seed, int row, int column) {
  constexpr uint32_t kResidualOffset = 1;
  word[0] = uint32_t(column / 8), word[1] = uint32_t(row), word[2] = 0, word[3] = kResidualOffset;
  philox(word, seed);
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool upper = column / 8 & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const uint32_t other = shfl_xor(upper ? word[i] : word[i + bit], bit);
      if (upper)
        word[i] = other;
      else
        word[i + bit] = other;
    }
  }
}

}  // namespace phi1::cuda
