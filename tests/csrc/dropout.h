// The dropout masks in plain C++, as kernels/reference.py defines them.
#pragma once

#include <cstdint>
#include <cstring>

// Whether dropout keeps the element of this byte of the counter's random 16.
inline bool kept(uint64_t seed, uint32_t threshold, const int64_t (&counter)[4], int64_t byte) {
  uint32_t c[4];
  for (int i = 0; i < 4; ++i) c[i] = uint32_t(counter[i]);
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 7; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t p0 = uint64_t(c[0]) * 0xD2511F53u, p2 = uint64_t(c[2]) * 0xCD9E8D57u;
    const uint32_t next[4] = {uint32_t(p2 >> 32) ^ c[1] ^ k0, uint32_t(p2), uint32_t(p0 >> 32) ^ c[3] ^ k1,
                              uint32_t(p0)};
    std::memcpy(c, next, sizeof c);
  }
  return (c[byte / 4] >> byte % 4 * 8 & 0xff) >= threshold;
}

// kernels/reference.py, attention_keep.
inline bool attention_kept(uint64_t seed, uint32_t threshold, int64_t plane, int64_t query, int64_t key) {
  const int64_t counter[4] = {key / 16 * 4 + key % 8 / 2, query / 16 * 4 + query % 8 / 2, plane, 0};
  return kept(seed, threshold, counter, 8 * (query % 2) + 4 * (key % 2) + 2 * (query / 8 % 2) + key / 8 % 2);
}

// kernels/reference.py, residual_keep.
inline bool residual_kept(uint64_t seed, uint32_t threshold, int64_t row, int64_t column) {
  const int64_t counter[4] = {column / 8, row / 2, 0, 1};
  return kept(seed, threshold, counter, 8 * (row % 2) + column % 8);
}
