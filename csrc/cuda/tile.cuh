// Tiles of 16-bit elements in shared memory, and the two products that attention is made of.
//
// A tile is rows x head_dim, a row 64, 128 or 256 bytes, at a multiple of a row. Its 16-byte chunks are permuted within
// a row (swizzled), so that the eight rows of one 8x8 matrix of ldmatrix lie in different banks: chunk ^ (row % 8);
// where a row is half of the 128 bytes of all banks (head_dim 32), chunk ^ (row / 2 % 4). The tests count no bank
// conflict. The permutation repeats every 8 rows and is an exclusive or: one lane-dependent offset and constants give
// all addresses.
#pragma once

#include "cuda/ptx.cuh"

namespace phi1::cuda {

// Rows of elements in global memory: row r starts at data + r * stride.
struct Rows {
  const uint16_t* data;
  int64_t stride;
};

template <int kHeadDim>
struct SwizzledTile {
  static constexpr int kRowBytes = 2 * kHeadDim, kChunks = kHeadDim / 8;

  // Byte offset of a chunk.
  static PHI1_DEVICE uint32_t offset(int row, int chunk) {
    const int swizzled = kChunks >= 8 ? chunk ^ (row % 8) : chunk ^ (row / 2 % 4);
    return uint32_t(row * kRowBytes + swizzled * 16);
  }

  // Address of the chunk `chunk ^ chunks`, `rows` (a multiple of 8) rows after the one that `offset` belongs to.
  static PHI1_DEVICE uint32_t address(uint32_t tile, uint32_t offset, int rows, int chunks) {
    return (tile + uint32_t(rows * kRowBytes) + offset) ^ uint32_t(16 * chunks);
  }

  // Copies the rows of a matrix to tiles, kRows after kRows: this thread's share. A pointer runs along.
  template <int kRows, int kThreads>
  struct Copy {
    static constexpr int kStep = kThreads / kChunks;  // rows that the block copies at a time
    static_assert(kStep % 8 == 0 && kRows % kStep == 0);
    const uint16_t* next;  // this thread's first chunk of the next tile
    int64_t stride;

    // From row `first` of `from` on.
    PHI1_DEVICE Copy(const Rows& from, int first)
        : next(from.data + (first + thread_index() / kChunks) * from.stride + thread_index() % kChunks * 8),
          stride(from.stride) {}

    // Starts the copy of the next kRows, of which only `left` are there: those past the end become zeros. mapped: an
    // address to read nothing from.
    PHI1_DEVICE void start(uint32_t tile, int left, const void* mapped) {
      const int row = thread_index() / kChunks;
      const uint32_t to = offset(row, thread_index() % kChunks);
      if (left >= kRows) {
#pragma unroll
        for (int i = 0; i < kRows; i += kStep, next += kStep * stride) cp_async_16(address(tile, to, i, 0), next, 16);
      } else {
#pragma unroll
        for (int i = 0; i < kRows; i += kStep, next += kStep * stride) {
          const bool inside = row + i < left;
          cp_async_16(address(tile, to, i, 0), inside ? next : mapped, inside ? 16 : 0);
        }
      }
    }
  };

  // The 16x16 fragment of rows from `row` and columns from 16 k, as the left operand of mma.
  static PHI1_DEVICE void left(uint32_t (&a)[4], uint32_t tile, int row, int k) {
    ldmatrix_x4(a, address(tile, offset(lane_index() % 16, lane_index() / 16), row, 2 * k));
  }

  // The same elements as right operands of two mma whose columns are the tile's rows: [row, row + 8), [row + 8, row +
  // 16).
  static PHI1_DEVICE void right_rows(uint32_t (&b)[2][2], uint32_t tile, int row, int k) {
    uint32_t d[4];
    const uint32_t lane = offset(lane_index() / 16 * 8 + lane_index() % 8, lane_index() / 8 % 2);
    ldmatrix_x4(d, address(tile, lane, row, 2 * k));
    b[0][0] = d[0], b[0][1] = d[1], b[1][0] = d[2], b[1][1] = d[3];
  }

  // Rows [16 k, 16 k + 16) as right operands of two mma whose columns are the tile's columns from 16 n.
  static PHI1_DEVICE void right_columns(uint32_t (&b)[2][2], uint32_t tile, int k, int n) {
    uint32_t d[4];
    ldmatrix_x4_trans(d, address(tile, offset(lane_index() % 16, lane_index() / 16), 16 * k, 2 * n));
    b[0][0] = d[0], b[0][1] = d[1], b[1][0] = d[2], b[1][1] = d[3];
  }

  // Writes a warp's 16 kM rows x kHeadDim accumulators, rounded, over its rows of `tile` (from `row`), then to global
  // memory in runs of whole rows: `to` is row 0 of the tile there, rows from `end` on are left out.
  // The warp must be the last to use these rows.
  template <typename T, int kM>
  static PHI1_DEVICE void store(const float (&acc)[kM][kHeadDim / 8][4], float factor, uint32_t tile, int row,
                                uint16_t* to, int64_t stride, int end) {
    const int g = lane_index() / 4, t = lane_index() % 4;
    bar_warp_sync();
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          st_shared_4(address(tile, offset(g, 0), row + 16 * m + 8 * half, n) + uint32_t(4 * t),
                      pack_pair(T{}, factor * acc[m][n][2 * half], factor * acc[m][n][2 * half + 1]));
    bar_warp_sync();
#pragma unroll
    for (int i = 0; i < 16 * kM * kChunks / 32; ++i) {
      const int at = i * 32 + lane_index(), r = row + at / kChunks, chunk = at % kChunks;
      if (r < end) st_global_16(to + r * stride + chunk * 8, ld_shared_16(tile + offset(r, chunk)));
    }
  }
};

// One of a warp's accumulators: acc[m][n][i], in row `row` and column `column` of the product.
struct Element {
  int m, n, i;
  int row, column;

  // The same element of other accumulators.
  template <int kM, int kN>
  PHI1_DEVICE float of(const float (&x)[kM][kN][4]) const {
    return x[m][n][i];
  }
};

// Calls f(acc[m][n][i], Element) for this lane's accumulators in the 8 columns of tile n: of each 16 x 8 two
// neighbouring columns of row lane / 4 (i = 0, 1) and of the row 8 further (i = 2, 3). acc[0][0]'s first element is in
// row `row` and column `column`.
template <int kM, int kN, class F>
PHI1_DEVICE void for_each_in(float (&acc)[kM][kN][4], int n, int row, int column, F&& f) {
  const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      f(acc[m][n][i], Element{m, n, i, row + 16 * m + 8 * (i / 2) + g, column + 8 * n + 2 * t + i % 2});
}

// The same for the accumulators of all columns.
template <int kM, int kN, class F>
PHI1_DEVICE void for_each(float (&acc)[kM][kN][4], int row, int column, F&& f) {
#pragma unroll
  for (int n = 0; n < kN; ++n) for_each_in(acc, n, row, column, f);
}

template <int kM, int kN>
PHI1_DEVICE void clear(float (&acc)[kM][kN][4]) {
  for_each(acc, 0, 0, [](float& x, const Element&) { x = 0.0f; });
}

// acc = a b^T over head_dim: rows [row, row + 16 kM) of tile a, rows [0, 8 kN) of tile b.
template <typename T, int kHeadDim, int kM, int kN>
PHI1_DEVICE void product_rows(float (&acc)[kM][kN][4], uint32_t a, int row, uint32_t b) {
  clear(acc);
#pragma unroll
  for (int k = 0; k < kHeadDim / 16; ++k) {
    uint32_t left[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) SwizzledTile<kHeadDim>::left(left[m], a, row + 16 * m, k);
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t right[2][2];
      SwizzledTile<kHeadDim>::right_rows(right, b, 8 * n, k);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma_m16n8k16(T{}, acc[m][n], left[m], right[0]);
        mma_m16n8k16(T{}, acc[m][n + 1], left[m], right[1]);
      }
    }
  }
}

// acc += p b: p the warp's accumulators (16 kM x 8 kK), rounded to T; b the tile's 8 kK rows x head_dim.
// Two neighbouring accumulator tiles are, lane by lane, a left operand: nothing moves.
template <typename T, int kHeadDim, int kM, int kK>
PHI1_DEVICE void product_columns(float (&acc)[kM][kHeadDim / 8][4], const float (&p)[kM][kK][4], uint32_t b) {
#pragma unroll
  for (int k = 0; k < kK / 2; ++k) {
    uint32_t left[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        left[m][i] = pack_pair(T{}, p[m][2 * k + i / 2][2 * (i % 2)], p[m][2 * k + i / 2][2 * (i % 2) + 1]);
#pragma unroll
    for (int n = 0; n < kHeadDim / 16; ++n) {
      uint32_t right[2][2];
      SwizzledTile<kHeadDim>::right_columns(right, b, k, n);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma_m16n8k16(T{}, acc[m][2 * n], left[m], right[0]);
        mma_m16n8k16(T{}, acc[m][2 * n + 1], left[m], right[1]);
      }
    }
  }
}

}  // namespace phi1::cuda
