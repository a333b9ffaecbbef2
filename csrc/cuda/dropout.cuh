// The dropout masks of kernels/reference.py (`attention_keep`, `residual_keep`), bit for bit.
#pragma once

#include "cuda/ptx.cuh"

namespace phi1::cuda {

// Philox 4x32-7 (Salmon et al., SC 2011): 14 wide multiplications for 16 random bytes.
PHI1_DEVICE void philox(uint32_t (&c)[4], uint64_t seed) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma unroll
  for (int round = 0; round < 7; ++round) {
    uint32_t low0, high0, low1, high1;
    mul_wide(low0, high0, 0xD2511F53u, c[0]);
    mul_wide(low1, high1, 0xCD9E8D57u, c[2]);
    c[0] = high1 ^ c[1] ^ k0;
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ k1;
    c[3] = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// The seed of a call. In memory it may change between the replays of a CUDA graph.
template <typename Args>
PHI1_DEVICE uint64_t seed_of(const Args& args) {
  return args.seed_memory ? ld_global(args.seed_memory) : args.seed;
}

// Which of a word's four elements dropout keeps: keep[i] = byte i >= threshold. Two bytes, widened to 16 bits, are
// compared as subnormal half-precision numbers, in one instruction; their order is that of the integers.
PHI1_DEVICE void keep_bytes(bool (&keep)[4], uint32_t word, uint32_t threshold) {
  const uint32_t least = threshold * 0x10001u;
  setp_ge_f16x2(keep[0], keep[2], prmt(word, 0, 0x4240), least);
  setp_ge_f16x2(keep[1], keep[3], prmt(word, 0, 0x4341), least);
}

// Random bytes of a warp's 16 rows x 32 columns of attention, the layout of four accumulators of m16n8. `row` is a
// multiple of 16, `column` of 32. word[i][j] belongs to this lane's elements in columns 16 i + 2 t + j and 8 further,
// rows g and g + 8 (g = lane / 4, t = lane % 4). Its byte 2 y + x is that of the query 8 y and the key 8 x further, in
// both orientations: rows are queries and columns keys, or, kTransposed, the other way round.
//
// A Philox call serves two rows that are neighbours, that is, two lanes: the even one draws for the first 16 columns,
// the odd one for the last, and they swap halves. A call for 16 elements of a lane, and 2 shuffles. All 32 lanes take
// part.
template <bool kTransposed>
PHI1_DEVICE void attention_random(uint32_t (&word)[2][2], uint64_t seed, int plane, int row, int column) {
  constexpr uint32_t kAttentionOffset = 0;
  const int g = lane_index() / 4, t = lane_index() % 4;
  const bool odd = g % 2;
  const uint32_t rows = uint32_t(row / 16 * 4 + g / 2), columns = uint32_t((column / 16 + odd) * 4 + t);
  uint32_t drawn[4] = {kTransposed ? rows : columns, kTransposed ? columns : rows, uint32_t(plane), kAttentionOffset};
  philox(drawn, seed);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    // Word 2 (query % 2) + key % 2.
    const uint32_t even_row = drawn[kTransposed ? 2 * j : j], odd_row = drawn[kTransposed ? 2 * j + 1 : 2 + j];
    const uint32_t other = shfl_xor(odd ? even_row : odd_row, 4);
    word[0][j] = odd ? other : even_row;
    word[1][j] = odd ? odd_row : other;
  }
}

// Random bytes of eight columns from `column`, a multiple of 8, of two rows of the residual, `row` and the other one of
// its pair: byte j % 4 of word 2 (row % 2) + j / 4 is that of column j.
PHI1_DEVICE void residual_random(uint32_t (&word)[4], uint64_t seed, int row, int column) {
  constexpr uint32_t kResidualOffset = 1;
  word[0] = uint32_t(column / 8), word[1] = uint32_t(row / 2), word[2] = 0, word[3] = kResidualOffset;
  philox(word, seed);
}

}  // namespace phi1::cuda
