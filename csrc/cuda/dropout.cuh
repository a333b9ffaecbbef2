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

}  // namespace phi1::cuda
