// Tiles in shared memory as wgmma reads them, and the two products that attention is made of.
#pragma once

#include "cuda/ptx_hopper.cuh"
#include "cuda/tile.cuh"

namespace phi1::cuda::hopper {

constexpr int kWarpgroup = 128;  // threads

// kRows x kHeadDim elements of 16 bits as pages of 64 columns. A row of a page is 128 bytes; its 16-byte chunk c lies
// at c ^ row % 8, wgmma's 128-byte swizzle. The tile starts at a multiple of 1,024.
template <int kRows, int kHeadDim>
struct Tile {
  static_assert(kRows % 16 == 0 && kHeadDim % 64 == 0);
  static constexpr int kPageBytes = 128 * kRows, kBytes = kPageBytes * kHeadDim / 64;
  static constexpr int kGroupBytes = 1024;  // 8 rows: the swizzle's period

  // Columns [16 k, 16 k + 16) of the rows from `row`, a multiple of 8: an operand whose k are the tile's columns.
  static PHI1_DEVICE uint64_t rows_operand(uint32_t tile, int row, int k) {
    return descriptor(tile + uint32_t(k / 4 * kPageBytes + 128 * row + 32 * (k % 4)), 0, kGroupBytes);
  }

  // Rows [16 k, 16 k + 16): an operand whose k are the tile's rows.
  static PHI1_DEVICE uint64_t columns_operand(uint32_t tile, int k) {
    return descriptor(tile + uint32_t(16 * 128 * k), kHeadDim > 64 ? kPageBytes : 0, kGroupBytes);
  }

  // A warp's 16 rows from `row`, as left operands.
  static PHI1_DEVICE void read_rows(uint32_t (&a)[kHeadDim / 16][4], uint32_t tile, int row) {
    row += lane_index() % 16;
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k)
      ldmatrix_x4(a[k],
                  tile + uint32_t(k / 4 * kPageBytes + 128 * row + 16 * ((2 * (k % 4) + lane_index() / 16) ^ row % 8)));
  }

  // Starts the copy of rows [first, first + kRows) of `from` by the threads of one warpgroup, of which this is number
  // `thread`; rows from `end` on become zeros. kUnroll: turns of the loop written out, for more registers.
  template <int kUnroll = kRows>
  static PHI1_DEVICE void load(uint32_t tile, const Rows& from, int first, int end, int thread) {
    constexpr int kStep = kWarpgroup / 8;  // rows that a warpgroup copies at a time
    const int row = thread / 8, chunk = thread % 8;
    const uint32_t to = tile + uint32_t(128 * row + 16 * (chunk ^ row % 8));
    const uint16_t* source = from.data + (first + row) * from.stride + 8 * chunk;
    if (first + kRows <= end) {
#pragma unroll kUnroll
      for (int i = 0; i < kRows; i += kStep) {
#pragma unroll
        for (int page = 0; page < kHeadDim / 64; ++page)
          cp_async_16(to + uint32_t(page * kPageBytes + 128 * i), source + 64 * page, 16);
        source += kStep * from.stride;
      }
      return;
    }
#pragma unroll 1
    for (int i = 0; i < kRows; i += kStep) {
      const bool inside = first + row + i < end;
#pragma unroll
      for (int page = 0; page < kHeadDim / 64; ++page)
        cp_async_16(to + uint32_t(page * kPageBytes + 128 * i), inside ? source + 64 * page : from.data,
                    inside ? 16 : 0);
      source += kStep * from.stride;
    }
  }
};

// d = a b^T over head_dim: the 64 rows of tile a from `row`, the 8 kN rows of tile b.
template <typename T, typename A, typename B, int kHeadDim, int kN>
PHI1_DEVICE void product_rows(float (&d)[kN][4], uint32_t a, int row, uint32_t b) {
#pragma unroll
  for (int k = 0; k < kHeadDim / 16; ++k) wgmma(T{}, d, A::rows_operand(a, row, k), B::rows_operand(b, 0, k), k > 0);
}

// The same with a's 64 rows in registers.
template <typename T, typename B, int kK, int kN>
PHI1_DEVICE void product_rows(float (&d)[kN][4], const uint32_t (&a)[kK][4], uint32_t b) {
#pragma unroll
  for (int k = 0; k < kK; ++k) wgmma(T{}, d, a[k], B::rows_operand(b, 0, k), k > 0);
}

// d += a b: a in registers, 64 x 16 kK; b the tile's 16 kK rows x 8 kN columns.
template <typename T, typename B, int kN, int kK>
PHI1_DEVICE void product_columns(float (&d)[kN][4], const uint32_t (&a)[kK][4], uint32_t b) {
#pragma unroll
  for (int k = 0; k < kK; ++k) wgmma(T{}, d, a[k], B::columns_operand(b, k));
}

// Accumulators, 64 x 16 kK, rounded to T: two neighbouring tiles of 8 columns are, lane by lane, a left operand.
template <typename T, int kK>
PHI1_DEVICE void round_to(uint32_t (&a)[kK][4], const float (&d)[2 * kK][4]) {
#pragma unroll
  for (int k = 0; k < kK; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      a[k][i] = pack_pair(T{}, d[2 * k + i / 2][2 * (i % 2)], d[2 * k + i / 2][2 * (i % 2) + 1]);
}

// Writes a warp's 16 rows x 8 kN accumulators, rounded to T, each row times its factor. `to` is the warp's first row;
// rows from `end` on are left out. The four lanes of a row exchange pairs, so that each writes 16 bytes.
template <typename T, int kN>
PHI1_DEVICE void store_rows(const float (&d)[kN][4], const float (&factor)[2], uint16_t* to, int64_t stride, int end) {
  const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int n = 0; n < kN; n += 4) {
      uint32_t word[4];  // of columns 8 (n + i) + 2 t; after the exchange of columns 8 (n + t) + 2 i
#pragma unroll
      for (int i = 0; i < 4; ++i)
        word[i] = pack_pair(T{}, factor[half] * d[n + i][2 * half], factor[half] * d[n + i][2 * half + 1]);
#pragma unroll
      for (int bit = 1; bit < 4; bit *= 2) {
        const bool upper = t & bit;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (i & bit) continue;
          const uint32_t other = shfl_xor(upper ? word[i] : word[i + bit], bit);
          (upper ? word[i] : word[i + bit]) = other;
        }
      }
      const int row = g + 8 * half;
      if (row < end) st_global_16(to + row * stride + 8 * (n + t), Vector4{{word[0], word[1], word[2], word[3]}});
    }
}

}  // namespace phi1::cuda::hopper
