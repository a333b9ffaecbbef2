// Flash attention: what the forward and the backward pass share.
//
// Everything is computed transposed, queries along the lanes: scores S^T = K Q^T (keys x queries), so that maxima,
// sums and exponentials of a query run down a column without a horizontal step, and O^T = V^T P^T.
// All products are C[m][n] += A[m][k] B[k][n], a block of C at a time. An element is one 32-bit lane: a float, or,
// where the CPU multiplies bf16, two bf16 that are neighbours along k.

// M rows x N vectors of C in registers, with A's elements broadcast and B's rows loaded.
template <class Dot, int N, int M = kRows>
struct VectorBlock {
  using Vectors = vfloat[M][N];
  Vectors c;

  // The vectors from First on, as everywhere.
  template <int First = 0>
  __attribute__((always_inline)) void clear() {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int n = First; n < N; ++n) c[m][n] = vfloat{};
  }

  // C = rows in memory, LDC lanes apart.
  template <int LDC>
  __attribute__((always_inline)) void load(const float* from) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) c[m][n] = vload(from + m * LDC + n * kLanes);
  }

  // ... each column times its factor.
  template <int LDC>
  __attribute__((always_inline)) void load(const float* from, const vfloat (&factor)[N]) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) c[m][n] = vload(from + m * LDC + n * kLanes) * factor[n];
  }

  template <int LDC>
  __attribute__((always_inline)) void store(float* to) const {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) vstore(to + m * LDC + n * kLanes, c[m][n]);
  }

  // C, to be worked on.
  template <int First>
  __attribute__((always_inline)) Vectors& vectors() {
    return c;
  }

  // c[m][n] += a[m][k] b[k][n], `steps` lanes of k; a's rows are LDA lanes apart, b's LDB.
  template <int LDA, int LDB, int First = 0>
  __attribute__((always_inline)) void multiply(const float* a, const float* b, int steps) {
    for (int k = 0; k < steps; ++k) {
      vfloat row[N];
#pragma GCC unroll 8
      for (int n = First; n < N; ++n) row[n] = vload(b + k * LDB + n * kLanes);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const vfloat element = splat(a[m * LDA + k]);
#pragma GCC unroll 8
        for (int n = First; n < N; ++n) c[m][n] = Dot::add(c[m][n], element, row[n]);
      }
    }
  }
};

struct DotF32 {
  static constexpr int k = 1;         // elements of the sum in a lane
  static constexpr int rows = kRows;  // of a block
  static constexpr int sum_vecs = 2;  // vectors of head_dim in a block of the backward pass's sums over queries
  template <int D>
  static constexpr int backward_keys = 64;  // in a block of the backward pass
  template <int N>
  using Block = VectorBlock<DotF32, N>;
  struct Setup {};  // what a thread holds while it multiplies
  static vfloat add(vfloat c, vfloat a, vfloat b) { return fma(a, b, c); }
  static vfloat exp2(vfloat x) { return PHI1_ISA::exp2(x); }
  // Writes kLanes neighbours of one row.
  static void store_row(float* to, vfloat x) { vstore(to, x); }
  // Writes a lane's k rows: with k = 1, the first only.
  static void store_rows(float* to, const vfloat* x) { vstore(to, x[0]); }
};

#if defined(__AVX512BF16__)
struct DotBf16 {
  static constexpr int k = 2, rows = kRows, sum_vecs = 2;
  template <int D>
  static constexpr int backward_keys = 64;
  template <int N>
  using Block = VectorBlock<DotBf16, N>;
  struct Setup {};
  static vfloat add(vfloat c, vfloat a, vfloat b) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
  static vfloat exp2(vfloat x) { return PHI1_ISA::exp2<true>(x); }
  static void store_row(float* to, vfloat x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x));
  }
  static void store_rows(float* to, const vfloat* x) {
    alignas(64) static constexpr uint16_t interleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                            21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                            11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(x[1], x[0]);
    vstore(to, (vfloat)_mm512_permutexvar_epi16(_mm512_load_si512(interleave), both));
  }
};
#endif

#if defined(__AMX_BF16__)
#include "cpu/attention_tiles.inl"
#endif

// Rows of C times N vectors, on their way through a product: Dot::rows of them.
template <class Dot, int N>
using Block = typename Dot::template Block<N>;

constexpr int kPanel = kVecs * kLanes;  // queries side by side in a register block
constexpr float kLog2e = 1.44269504088896341f;
// log(total exp(greatest)), of a row without a score above -inf: -inf, of one with +inf, whose total is NaN: +inf.
inline float log_sum_exp(float greatest, double total) {
  if (greatest == __builtin_inff()) return greatest;
  return total == 0 ? -__builtin_inff() : float(greatest + __builtin_log(total));
}

constexpr int kGroup = 16;  // keys and queries that share Philox counters: key blocks are multiples of it

// Calls f(integral_constant<int, n>) for n = 0 ... kVecs - 1.
template <class F>
__attribute__((always_inline)) inline void for_vectors(F&& f) {
  [&]<int... n>(std::integer_sequence<int, n...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, n>()), ...);
  }(std::make_integer_sequence<int, kVecs>());
}

// c[m][n] += a[m][k] b[k][n], each vector n up to the keys that it sees: seen[n] of KEYS. b is (keys / k, kPanel).
template <class Dot, int KEYS>
__attribute__((always_inline)) inline void multiply_seen(const float* a, const float* b, const int* seen,
                                                         Block<Dot, kVecs>& c) {
  int done = 0;
  for_vectors([&](auto from) __attribute__((always_inline)) {
    const int steps = seen[from] / Dot::k - done;
    c.template multiply<KEYS / Dot::k, kPanel, from>(a + done, b + done * kPanel, steps);
    done += steps;
  });
}

// ------------------------------------------------------------------------------------------------ memory

// Memory of one call, 64-byte aligned.
struct Workspace {
  char* data;
  explicit Workspace(size_t bytes) : data(static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64))) {
    if (data == nullptr) throw std::bad_alloc();
  }
  ~Workspace() { std::free(data); }
  Workspace(const Workspace&) = delete;
};

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// A (rows, head_dim) matrix of the caller: one head of one batch entry or document.
struct Rows {
  char* data;
  int64_t stride;  // bytes from row to row
};

inline int64_t element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// One independent problem: a batch entry, or a document.
struct Problem {
  int64_t batch, first_q, first_k, seqlen_q, seqlen_k;

  Rows rows(const HeadsTensor& x, int64_t first, int64_t head, DType dtype) const {
    const int64_t at = batch * x.batch_stride + first * x.seq_stride + head * x.head_stride;
    return {static_cast<char*>(x.data) + at * element_size(dtype), x.seq_stride * element_size(dtype)};
  }
};

// How many of `keys` keys from `start` a vector of queries from `first` sees, which may be negative: the first so many,
// rounded up to Dot::rows. It grows with `first`: to the right of the diagonal and before query 0 nothing is computed.
template <class Dot>
inline int seen_keys(const AttentionArgs& args, const Problem& p, int64_t first, int64_t start, int64_t keys) {
  const int64_t end = first + kLanes;
  if (end <= 0) return 0;
  if (args.causal) keys = larger(0, smaller(keys, end + p.seqlen_k - p.seqlen_q - start));
  return int(round_up(keys, Dot::rows));
}

inline int64_t query_panels(const Problem& p) { return round_up(p.seqlen_q, kPanel) / kPanel; }

// The first query of panel i of `panels`. Where they do not come out even, the first panel begins before query 0: in
// the causal case it sees fewest keys.
inline int64_t first_query(const Problem& p, int64_t panels, int64_t i) { return p.seqlen_q - (panels - i) * kPanel; }

// Whether heads come out even enough over the threads without sharing a head.
inline bool heads_alone(int64_t heads, int threads) { return heads % threads == 0 || heads >= 8 * threads; }

inline int64_t problem_count(const AttentionArgs& args) { return args.cu_seqlens_q ? args.documents : args.batch; }

inline Problem problem(const AttentionArgs& args, int64_t i) {
  if (args.cu_seqlens_q == nullptr) return {i, 0, 0, args.seqlen_q, args.seqlen_k};
  const int64_t q = args.cu_seqlens_q[i], k = args.cu_seqlens_k[i];
  return {0, q, k, args.cu_seqlens_q[i + 1] - q, args.cu_seqlens_k[i + 1] - k};
}

template <typename T>
void read_row_typed(const char* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) vstore(to + i, vload(reinterpret_cast<const T*>(from) + i));
}

// to = the row's `count` numbers, a multiple of kLanes, as floats.
inline void read_row(DType dtype, const char* from, float* to, int64_t count) {
  switch (dtype) {
    case DType::f32: std::memcpy(to, from, size_t(count) * 4); return;
    case DType::bf16: return read_row_typed<bf16>(from, to, count);
    case DType::f16: return read_row_typed<f16>(from, to, count);
  }
}

template <typename T>
void write_row_typed(char* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) vstore(reinterpret_cast<T*>(to) + i, vload(from + i));
}

// The other way round.
inline void write_row(DType dtype, char* to, const float* from, int64_t count) {
  switch (dtype) {
    case DType::f32: std::memcpy(to, from, size_t(count) * 4); return;
    case DType::bf16: return write_row_typed<bf16>(to, from, count);
    case DType::f16: return write_row_typed<f16>(to, from, count);
  }
}

// to[row][d / k]: rows first .. first + count of x as lanes along d; rows below 0 and from `valid` on are zeros.
template <class Dot, int D>
void pack_rows(const Rows& x, DType dtype, int64_t first, int64_t valid, int64_t count, float* to) {
  constexpr int width = D / Dot::k;
  for (int64_t r = 0; r < count; ++r, to += width) {
    const char* row = x.data + (first + r) * x.stride;
    if (first + r < 0 || first + r >= valid)
      std::memset(to, 0, width * 4);
    else if constexpr (Dot::k == 2)
      std::memcpy(to, row, width * 4);
    else
      read_row(dtype, row, to, D);
  }
}

// to[row / k][d]: lanes along the rows, zeros as above. `count` is a multiple of k.
template <class Dot, int D>
void pack_pairs(const Rows& x, DType dtype, int64_t first, int64_t valid, int64_t count, float* to) {
  if constexpr (Dot::k == 1) {
    pack_rows<Dot, D>(x, dtype, first, valid, count, to);
  } else {
    for (int64_t r = 0; r < count; r += 2, to += D) {
      uint16_t low[D] = {}, high[D] = {};
      const auto inside = [&](int64_t row) { return row >= 0 && row < valid; };
      if (inside(first + r)) std::memcpy(low, x.data + (first + r) * x.stride, sizeof low);
      if (inside(first + r + 1)) std::memcpy(high, x.data + (first + r + 1) * x.stride, sizeof high);
      uint32_t pairs[D];
      for (int d = 0; d < D; ++d) pairs[d] = low[d] | uint32_t(high[d]) << 16;
      std::memcpy(to, pairs, sizeof pairs);
    }
  }
}

// ----------------------------------------------------------------------------------------------- dropout

// Of the words of two queries that are neighbours and one key: four lanes are the four pairs of queries of a group
// of 16. Puts the 16 bytes of the first of the two keys in the order of the queries, then (low, high) those of the
// other one.
template <size_t... I>
inline void sort_queries(vuint even, vuint odd, vbytes& low, vbytes& high, std::index_sequence<I...>) {
  // In each 16 bytes, 4 pair + 2 (query / 8) + key / 8 -> 8 (key / 8) + 4 (query / 8) + pair.
  const auto sorted = [](vbytes x) {
    return __builtin_shufflevector(x, x, (I / 16 * 16 + I % 4 * 4 + I / 4 % 2 * 2 + I / 8 % 2)...);
  };
  const vbytes a = sorted((vbytes)even), b = sorted((vbytes)odd);
  low = __builtin_shufflevector(a, b, (I % 2 * sizeof...(I) + I / 16 * 16 + I % 16 / 2)...);
  high = __builtin_shufflevector(a, b, (I % 2 * sizeof...(I) + I / 16 * 16 + I % 16 / 2 + 8)...);
}

// keep[key][v] for `keys` keys from first_key, both multiples of 16, and the kVecs vectors of queries from first_query,
// which may be negative: bit i is set if dropout keeps query lane i. kernels.reference.attention_keep, a group of 16
// queries x 16 keys at a time.
void dropout_bits(const AttentionArgs& args, int64_t plane, int64_t first_query, int64_t first_key, int64_t keys,
                  uint32_t (*keep)[kVecs]) {
  constexpr int parts = kGroup / kLanes, pairs = kLanes / 4;  // vectors of counters in a group; pairs of keys in a part
  static_assert(kPanel + kGroup - 1 <= 64);
  const int64_t skipped = first_query & (kGroup - 1), first_group = (first_query - skipped) / kGroup;
  for (int64_t from = 0; from < keys; from += kGroup) {
    uint64_t bits[kGroup] = {};  // of a key, for the queries from first_query - skipped
    for (int64_t q = 0; q * kGroup < skipped + kPanel; ++q)
      for (int part = 0; part < parts; ++part) {
        const vuint lane = (vuint)lane_index();
        vuint words[4] = {lane / 4 + uint32_t((first_key + from) / kGroup * 4 + part * pairs),
                          lane % 4 + uint32_t((first_group + q) * 4), splat_bits(uint32_t(plane)), vuint{}};
        philox(words, args.seed);
        for (int odd = 0; odd < 2; ++odd) {
          vbytes half[2];
          sort_queries(words[odd], words[2 + odd], half[0], half[1], std::make_index_sequence<4 * kLanes>());
          for (int i = 0; i < 2; ++i) {
            const uint64_t kept = bytes_at_least(half[i], args.dropout_threshold);
            for (int pair = 0; pair < pairs; ++pair)
              bits[2 * (part * pairs + pair) + odd + 8 * i] |= (kept >> kGroup * pair & 0xffff) << kGroup * q;
          }
        }
      }
    for (int key = 0; key < kGroup; ++key)
      for (int v = 0; v < kVecs; ++v) keep[from + key][v] = uint32_t(bits[key] >> (skipped + v * kLanes));
  }
}

// Calls run<Dot, head_dim>(args, threads) for the arithmetic that the inputs and this instruction set allow.
template <class Run>
void with_kernel(const AttentionArgs& args, Run run) {
  auto with_dim = [&](auto dot) {
    switch (args.head_dim) {
      case 32: return run(dot, std::integral_constant<int, 32>());
      case 64: return run(dot, std::integral_constant<int, 64>());
      case 128: return run(dot, std::integral_constant<int, 128>());
      default: throw std::invalid_argument("head_dim: must be 32, 64 or 128");
    }
  };
#if defined(__AMX_BF16__)
  if (args.dtype == DType::bf16) return with_dim(DotTiles());
#elif defined(__AVX512BF16__)
  if (args.dtype == DType::bf16) return with_dim(DotBf16());
#endif
  with_dim(DotF32());
}
