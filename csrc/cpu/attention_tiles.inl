// Attention's products of bf16 in AMX tiles: registers of 16 rows of 64 bytes, that is 16 lanes, eight to a thread.
//
// The operands lie in memory as tiles want them: TDPBF16PS multiplies 16 rows of A, 16 lanes along k, with 16 rows of
// B, a lane a column, and adds to 16 x 16 numbers of C. Sums over keys and queries are multiples of 16 numbers, that is
// 8 lanes: what is over goes through tiles of half as many lanes of A and rows of B, and no lane is read that no one
// wrote.
//
// By asm with numbers of tiles, so that none is ever spilled. GCC 12's intrinsics do not say that they read memory.

constexpr int kTileLanes = 16;  // and rows
static_assert(kLanes == kTileLanes);

// Tiles 0 to 3 are C, the others A and B, whole and half.
struct TilePair {
  int a, b, lanes;  // lanes of A, rows of B
};
constexpr TilePair kWhole = {4, 5, kTileLanes}, kHalf = {6, 7, kTileLanes / 2};

// The operand of LDTILECFG.
struct TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  constexpr void set(int tile, int tile_rows, int lanes) {
    rows[tile] = uint8_t(tile_rows);
    row_bytes[tile] = uint16_t(4 * lanes);
  }
  constexpr TileShapes() {
    for (int tile = 0; tile < 4; ++tile) set(tile, kTileLanes, kTileLanes);
    for (const TilePair& pair : {kWhole, kHalf}) {
      set(pair.a, kTileLanes, pair.lanes);
      set(pair.b, pair.lanes, kTileLanes);
    }
  }
};
static_assert(sizeof(TileShapes) == 64);

template <int Tile>
inline void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(Tile));
}

// The tile's rows are `stride` bytes apart in memory.
template <int Tile>
inline void tile_load(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(Tile) : "memory");
}

// LD lanes apart.
template <int Tile, int LD>
inline void tile_load(const float* from) {
  tile_load<Tile>(from, 4 * LD);
}

template <int Tile, int LD>
inline void tile_store(float* to) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(int64_t(4 * LD)), "i"(Tile) : "memory");
}

template <int C, int A, int B>
inline void tile_multiply() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// VectorBlock (attention.inl) with C in tiles: 16 rows, N tiles side by side.
template <int N>
struct TileBlock {
  static_assert(N <= kWhole.a);
  using Vectors = vfloat[kTileLanes][N];
  Vectors c;  // where vectors() finds them

  // Calls f(integral_constant<int, n>) for n = First ... N - 1.
  template <int First, class F>
  __attribute__((always_inline)) static void for_tiles(F&& f) {
    [&]<int... n>(std::integer_sequence<int, n...>) __attribute__((always_inline)) {
      (f(std::integral_constant<int, First + n>()), ...);
    }(std::make_integer_sequence<int, N - First>());
  }

  template <int First = 0>
  __attribute__((always_inline)) void clear() {
    for_tiles<First>([](auto n) { tile_zero<n>(); });
  }

  template <int LDC>
  __attribute__((always_inline)) void load(const float* from) {
    for_tiles<0>([&](auto n) { tile_load<n, LDC>(from + n * kLanes); });
  }

  template <int LDC>
  __attribute__((always_inline)) void store(float* to) const {
    for_tiles<0>([&](auto n) { tile_store<n, LDC>(to + n * kLanes); });
  }

  template <int First>
  __attribute__((always_inline)) Vectors& vectors() {
    for_tiles<First>([&](auto n) { tile_store<n, N * kLanes>(reinterpret_cast<float*>(&c[0][n])); });
    return c;
  }

  // steps is a multiple of kHalf.lanes.
  template <int LDA, int LDB, int First = 0>
  __attribute__((always_inline)) void multiply(const float* a, const float* b, int steps) {
    int k = 0;
    for (; k + kWhole.lanes <= steps; k += kWhole.lanes) step<kWhole, LDA, LDB, First>(a + k, b + k * LDB);
    if (k < steps) step<kHalf, LDA, LDB, First>(a + k, b + k * LDB);
  }

  template <TilePair Pair, int LDA, int LDB, int First>
  __attribute__((always_inline)) static void step(const float* a, const float* b) {
    tile_load<Pair.a, LDA>(a);
    for_tiles<First>([&](auto n) {
      tile_load<Pair.b, LDB>(b + n * kLanes);
      tile_multiply<n, Pair.a, Pair.b>();
    });
  }
};

struct DotTiles : DotBf16 {
  static constexpr int rows = kTileLanes, sum_vecs = 4;
  template <int D>
  static constexpr int backward_keys = D < 128 ? 64 : 128;  // measured: 13% less time for 128, 5% more for 64
  // Halves are rounded away from zero: these CPUs take 2 cycles for a vcvtne2ps2bf16, and NaN stays NaN as long as its
  // last 16 bits are 0, as they are of one that comes from a bf16.
  static void store_rows(float* to, const vfloat* x) {
    const vuint low = ((vuint)x[0] + 0x8000u) >> 16, high = (vuint)x[1] + 0x8000u;
    vstore(to, (vfloat)_mm512_mask_blend_epi16(0xaaaaaaaau, (__m512i)low, (__m512i)high));
  }
  // As vector.h's short form, with n = floor(x): that is what vscalefps takes, 6 instructions for 10. On Emerald Rapids
  // the exponentials of 16 x 16 scores take 36 ns for 56, but a denormal result 33 times that: Setup makes it zero.
  static vfloat exp2(vfloat x) {
    const vfloat f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // 0 of an infinity
    vfloat p = splat(0x1.b7f730p-7f);  // minimax on [0, 1] with 2^0 = 1 exactly: 2.9e-6
    p = fma(p, f, splat(0x1.abf868p-5f));
    p = fma(p, f, splat(0x1.ee2450p-3f));
    p = fma(p, f, splat(0x1.62d6c6p-1f));
    return _mm512_scalef_ps(fma(p, f, splat(1.0f)), x);
  }
  template <int N>
  using Block = TileBlock<N>;
  struct Setup {
    const unsigned mxcsr = _mm_getcsr();
    Setup() {
      alignas(64) static constexpr TileShapes shapes;
      __asm__ volatile("ldtilecfg %0" ::"m"(shapes));
      _mm_setcsr(mxcsr | _MM_FLUSH_ZERO_ON);
    }
    ~Setup() {
      _mm_setcsr(mxcsr);
      __asm__ volatile("tilerelease");
    }
    Setup(const Setup&) = delete;
  };
};
