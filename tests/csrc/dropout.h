// The dropout masks in plain C++, as kernels/reference.py defines them.
#pragma once

#include <cstdint>
#include <cstring>

// Whether dropout keeps an element: kernels/reference.py, dropout_keep, with threshold of the probability.
inline bool kept(uint64_t seed, uint32_t threshold, uint32_t offset, int64_t plane, int64_t row, int64_t column) {
  uint32_t c[4] = {uint32_t(column / 32 * 4 + column % 8 / 2), uint32_t(row), uint32_t(plane), offset};
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t p0 = uint64_t(c[0]) * 0xD2511F53u, p2 = uint64_t(c[2]) * 0xCD9E8D57u;
    const uint32_t next[4] = {uint32_t(p2 >> 32) ^ c[1] ^ k0, uint32_t(p2), uint32_t(p0 >> 32) ^ c[3] ^ k1,
                              uint32_t(p0)};
    std::memcpy(c, next, sizeof c);
  }
  const int64_t slot = column % 32 / 8 * 2 + column % 2;
  return (c[slot / 2] >> (slot % 2 * 16) & 0xffff) >= threshold;
}
