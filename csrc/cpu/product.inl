// x W^T for a few rows of x: W, as nn.Linear stores it, is read once and as it lies. A library packs W into panels
// first, in every call, which takes longer than the product does when 16 rows share it: MKL reaches 28 to 48 GFLOP/s on
// Zen 3, these loops 57 to 73 of a core's 93 (float32, 16 rows, busy machine).
//
// A register block is kRows rows of x by kVecs rows of W, the lanes along the width that is summed; a block's sums stay
// vectors until all of the width is done. What is computed of a row does not depend on which others it goes with, nor
// results on the number of threads.

constexpr int64_t kMostRows = 16;
constexpr int64_t kPiece = 512;  // of the width: kRows + 2 kVecs rows of it fit in L1
static_assert(kMostRows % kRows == 0 && kMostRows % kLanes == 0);

// Adds up the products over `count` of the width, whole vectors but for the last. kAhead: of so many rows of W the next
// piece is fetched meanwhile: the processor does not see by itself where it goes on in three rows at once.
template <int kAhead, typename T>
inline void multiply_piece(const float* x, int64_t x_stride, const T* const* w, int64_t count, const T* const* next,
                           vfloat* sums) {
  vfloat c[kRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) c[r][j] = sums[r * kVecs + j];
  for_lanes(count, [&](int64_t k, auto n) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int j = 0; j < kAhead; ++j) __builtin_prefetch(next[j] + k);
    vfloat b[kVecs];
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) b[j] = vload(w[j] + k, n);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const vfloat a = vload(x + r * x_stride + k);  // padded with zeros
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) c[r][j] = fma(a, b[j], c[r][j]);
    }
  });
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) sums[r * kVecs + j] = c[r][j];
}

// Columns first .. first + kVecs of y, as many of them as there are. x: (kMostRows, x_stride) floats.
template <typename T>
void product_columns(const ProductArgs& args, const float* x, int64_t x_stride, int64_t first) {
  const int64_t blocks = (args.rows + kRows - 1) / kRows;
  const auto row = [&](int64_t n) {  // past the end the last one again
    return static_cast<const T*>(args.weight) + smaller(n, args.columns - 1) * args.weight_stride;
  };
  vfloat sums[kMostRows * kVecs] = {};
  for (int64_t k = 0; k < args.width; k += kPiece) {
    const bool last = k + kPiece >= args.width;
    const T *w[kVecs], *next[kVecs];
    for (int j = 0; j < kVecs; ++j) {
      w[j] = row(first + j) + k;
      next[j] = last ? row(first + kVecs + j) : w[j] + kPiece;
    }
    const int64_t count = smaller(kPiece, args.width - k);
    for (int64_t b = 0; b < blocks; ++b) {
      const float* rows = x + b * kRows * x_stride + k;
      vfloat* to = sums + b * kRows * kVecs;
      if (blocks < kVecs && b == 0)
        multiply_piece<kVecs>(rows, x_stride, w, count, next, to);
      else if (blocks >= kVecs && b < kVecs)
        multiply_piece<1>(rows, x_stride, w, count, next + b, to);
      else
        multiply_piece<0>(rows, x_stride, w, count, next, to);
    }
  }
  for (int64_t j = 0; j < smaller(kVecs, args.columns - first); ++j)
    for (int64_t r = 0; r < args.rows; r += kLanes) {
      vfloat part[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) part[i] = sums[(r + i) * kVecs + j];
      transpose(part);
#pragma GCC unroll 16
      for (int i = 1; i < kLanes; ++i) part[0] += part[i];
      for (int64_t i = 0; i < smaller(kLanes, args.rows - r); ++i)
        store(static_cast<T*>(args.y)[(r + i) * args.columns + first + j], part[0][i]);
    }
}

template <typename T>
void product_typed(const ProductArgs& args, int threads) {
  const int64_t x_stride = round_up(args.width, kLanes);
  Workspace workspace(size_t(kMostRows * x_stride) * 4);
  float* x = reinterpret_cast<float*>(workspace.data);
  std::memset(x, 0, size_t(kMostRows * x_stride) * 4);
  for (int64_t r = 0; r < args.rows; ++r)
    for_lanes(args.width, [&](int64_t k, auto n) {
      vstore(x + r * x_stride + k, vload(static_cast<const T*>(args.x) + r * args.x_stride + k, n));
    });
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t first = 0; first < args.columns; first += kVecs) product_columns<T>(args, x, x_stride, first);
}

#if defined(__AVX512F__)
#include "cpu/product_lanes.inl"
#endif

void product(const ProductArgs& args, int threads) {
  // Below about 20 microseconds of work, waking the other threads costs more than they save.
  if (args.rows * args.columns * args.width < 1 << 19) threads = 1;
#if defined(__AVX512F__)
  if (args.dtype == DType::f32) return product_lanes<VectorSums<DotF32>, float>(args, threads);
#endif
#if defined(__AMX_BF16__)
  if (args.dtype == DType::bf16) return product_lanes<TileSums, bf16>(args, threads);
#elif defined(__AVX512BF16__)
  if (args.dtype == DType::bf16) return product_lanes<VectorSums<DotBf16>, bf16>(args, threads);
#endif
  with_type(args.dtype, [&](auto zero) { product_typed<decltype(zero)>(args, threads); });
}
