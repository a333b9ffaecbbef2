// x W^T for a few rows of x, where 16 lanes hold them all: the rows of x are lanes, and an element of W, or two
// neighbours of bf16, goes to all of them. W is read once and as it lies. A library packs it into panels first, in
// every call, which takes longer than the product does when 16 rows share it.
//
// Rows of W a power of two apart, as models have them, fall into the same lines of the cache: a line of one is used up
// at once. A line is summed by itself, then the lines, which is as exact as vectors along the width are; what is
// computed of a row depends neither on which others it goes with nor on the number of threads.

constexpr int kSide = 16;  // rows of x; rows of W, y's columns, at a time; 32-bit lanes of a line of W
static_assert(kSide == kLanes && kSide == kMostRows);
constexpr int64_t kLine = 4 * kSide;   // bytes
constexpr int64_t kFetch = 4 * kLine;  // so far ahead a row of W is fetched: up to 1.4 times as fast (Emerald Rapids)

// sums[column] += W x^T over a line of 16 rows of W, `stride` bytes apart. x: (lanes of the line, rows).
template <class Dot>
struct VectorSums {
  static constexpr int kChains = 8;  // sums on their way: 4 cycles each, two begin in a cycle
  struct Setup {};
  vfloat sums[kSide] = {};

  void add(const char* w, int64_t stride, const float* x) {
    vfloat rows[kSide];
#pragma GCC unroll 16
    for (int i = 0; i < kSide; ++i) rows[i] = vload(x + i * kSide);
#pragma GCC unroll 1
    for (int column = 0; column < kSide; column += kChains, w += kChains * stride) {
      vfloat chains[kChains] = {};
#pragma GCC unroll 16
      for (int i = 0; i < kSide; ++i)
#pragma GCC unroll 8
        for (int c = 0; c < kChains; ++c) {
          float element;
          std::memcpy(&element, w + c * stride + 4 * i, sizeof element);
          chains[c] = Dot::add(chains[c], splat(element), rows[i]);
        }
#pragma GCC unroll 8
      for (int c = 0; c < kChains; ++c) sums[column + c] += chains[c];
    }
  }
  vfloat (&columns()) [kSide] { return sums; }
};

#if defined(__AMX_BF16__)
struct TileSums {
  using Setup = DotTiles::Setup;
  vfloat sums[kSide];

  TileSums() { tile_zero<0>(); }
  void add(const char* w, int64_t stride, const float* x) {
    tile_load<kWhole.a>(w, stride);
    tile_load<kWhole.b>(x, kLine);
    tile_multiply<0, kWhole.a, kWhole.b>();
  }
  vfloat (&columns()) [kSide] {
    tile_store<0, kSide>(reinterpret_cast<float*>(sums));
    return sums;
  }
};
#endif

// Line `step` of all rows of x, transposed.
template <typename T>
void pack_rows(const ProductArgs& args, int64_t step, float* to) {
  const int64_t first = step * kLine / int64_t(sizeof(T));
  vfloat rows[kSide] = {};
  for (int64_t r = 0; r < args.rows; ++r)
    std::memcpy(&rows[r], static_cast<const T*>(args.x) + r * args.x_stride + first,
                size_t(smaller(kLine, (args.width - first) * int64_t(sizeof(T)))));
  transpose(rows);
  for (int i = 0; i < kSide; ++i) vstore(to + i * kSide, rows[i]);
}

// y's columns begin ... end - 1, at most 16. x: (lines, lanes of a line, rows).
template <class Sums, typename T>
void lanes_columns(const ProductArgs& args, const float* x, int64_t begin, int64_t end) {
  const int64_t bytes = args.width * int64_t(sizeof(T)), stride = args.weight_stride * int64_t(sizeof(T));
  // The last ones take some of those before along, so that there are 16 rows of W.
  const int64_t first = larger(0, smaller(begin, args.columns - kSide)), rows = smaller(kSide, args.columns);
  const char* w = static_cast<const char*>(args.weight) + first * stride;
  Sums sums;
  int64_t at = 0;
  for (; rows == kSide && at + kLine <= bytes; at += kLine) {
    const char* ahead = w + at + kFetch + (at + kFetch < bytes ? 0 : kSide * stride - bytes);
#pragma GCC unroll 16
    for (int r = 0; r < kSide; ++r) __builtin_prefetch(ahead + r * stride);
    sums.add(w + at, stride, x + at * kSide / 4);
  }
  for (; at < bytes; at += kLine) {  // what is no whole line of 16 rows, with zeros
    alignas(64) char lines[kSide][kLine] = {};
    for (int64_t r = 0; r < rows; ++r) std::memcpy(lines[r], w + r * stride + at, size_t(smaller(kLine, bytes - at)));
    sums.add(lines[0], kLine, x + at * kSide / 4);
  }
  vfloat(&y)[kSide] = sums.columns();
  transpose(y);
  for (int64_t r = 0; r < args.rows; ++r) {
    T lanes[kSide];
    vstore(lanes, y[r]);
    std::memcpy(static_cast<T*>(args.y) + r * args.columns + begin, lanes + (begin - first),
                size_t(end - begin) * sizeof(T));
  }
}

template <class Sums, typename T>
void product_lanes(const ProductArgs& args, int threads) {
  const int64_t steps = (args.width * int64_t(sizeof(T)) + kLine - 1) / kLine;
  Workspace workspace(size_t(steps * kLine * kSide));
  float* x = reinterpret_cast<float*>(workspace.data);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    [[maybe_unused]] const typename Sums::Setup setup;
#pragma omp for schedule(static)
    for (int64_t step = 0; step < steps; ++step) pack_rows<T>(args, step, x + step * kSide * kSide);
#pragma omp for schedule(static)
    for (int64_t begin = 0; begin < args.columns; begin += kSide)
      lanes_columns<Sums, T>(args, x, begin, smaller(begin + kSide, args.columns));
  }
}
