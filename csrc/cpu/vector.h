// One vector of floats per instruction set, and what the kernels need of it beyond GCC's own vector operators.
// Included into one namespace per instruction set (kernels.cpp).

// Register blocks of the matrix products: kRows x kVecs vectors of accumulators, kVecs of B and one of A at a time.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 8, kVecs = 3;  // 24 + 3 + 1 of 32 registers
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRows = 4, kVecs = 3;  // 12 + 3 + 1 of 16
#else
constexpr int kLanes = 4, kRows = 4, kVecs = 2;
#endif

typedef float vfloat __attribute__((vector_size(4 * kLanes)));
typedef int32_t vint __attribute__((vector_size(4 * kLanes)));
typedef uint32_t vuint __attribute__((vector_size(4 * kLanes)));
typedef uint8_t vbytes __attribute__((vector_size(4 * kLanes)));

inline vfloat vload(const float* p) {
  vfloat v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void vstore(float* p, vfloat v) { std::memcpy(p, &v, sizeof v); }

// Copies the bits: a lane may hold two bf16 instead of a float.
inline vfloat splat(float x) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(x);
#elif defined(__AVX2__)
  return _mm256_set1_ps(x);
#else
  return vfloat{x, x, x, x};
#endif
}

inline vuint splat_bits(uint32_t x) { return vuint{} + x; }

inline vint lane_index() {
  vint index;
  for (int i = 0; i < kLanes; ++i) index[i] = i;
  return index;
}

// b where either is NaN.
inline vfloat vmax(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// b where either is NaN.
inline vfloat vmin(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

inline vfloat fma(vfloat a, vfloat b, vfloat c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// 2^x for x <= 127, which each caller says why it keeps to: beyond, the exponent's bits run over. Relative error below
// 2^-22 where x >= -126; 0 for x <= -127, in between it goes to 0; NaN stays. 2^x = 2^n 2^f, n = round(x): 2^f by a
// polynomial of degree 5, minimax on [-1/2, 1/2] (9.2e-8) with 2^0 = 1 exactly. Short: of degree 4 (2.9e-6), error
// below 2^-18, for what is rounded to bf16.
template <bool Short = false>
inline vfloat exp2(vfloat x) {
  x = vmax(splat(-127.0f), x);
  const vfloat magic = splat(12582912.0f + 127.0f);  // 1.5 * 2^23: the sum's last bits are n + 127, 2^n's exponent
  const vfloat sum = x + magic;
  const vfloat f = x - (sum - magic);
  vfloat p;
  if constexpr (Short) {
    p = splat(0x1.3a02ccp-7f);
    p = fma(p, f, splat(0x1.c9fc46p-5f));
    p = fma(p, f, splat(0x1.ec0378p-3f));
    p = fma(p, f, splat(0x1.62e12cp-1f));
  } else {
    p = splat(0x1.5bba14p-10f);
    p = fma(p, f, splat(0x1.3cea88p-7f));
    p = fma(p, f, splat(0x1.c6b752p-5f));
    p = fma(p, f, splat(0x1.ebf9bcp-3f));
    p = fma(p, f, splat(0x1.62e42ap-1f));
  }
  p = fma(p, f, splat(1.0f));
  return p * (vfloat)((vint)sum << 23);
}

// Swaps the off-diagonal blocks of S x S lanes in each pair of vectors S apart.
template <int S, size_t... I>
inline void transpose_round(vfloat (&v)[kLanes], std::index_sequence<I...>) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & S) continue;
    const vfloat a = v[i], b = v[i + S];
    v[i] = __builtin_shufflevector(a, b, (I & S ? kLanes + I - S : I)...);
    v[i + S] = __builtin_shufflevector(a, b, (I & S ? kLanes + I : I + S)...);
  }
}

inline void transpose(vfloat (&v)[kLanes]) {
  constexpr auto lanes = std::make_index_sequence<kLanes>();
  transpose_round<1>(v, lanes);
  transpose_round<2>(v, lanes);
  if constexpr (kLanes > 4) transpose_round<4>(v, lanes);
  if constexpr (kLanes > 8) transpose_round<8>(v, lanes);
}

// to[column][row] = from[row][column], 32-bit lanes; rows and columns are multiples of kLanes.
inline void transpose(const float* from, int64_t from_stride, int rows, int columns, float* to, int64_t to_stride) {
  for (int r = 0; r < rows; r += kLanes)
    for (int c = 0; c < columns; c += kLanes) {
      vfloat v[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) v[i] = vload(from + (r + i) * from_stride + c);
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) vstore(to + (c + i) * to_stride + r, v[i]);
    }
}

// The 64-bit products of all lanes with c.
inline void multiply_wide(vuint a, uint32_t c, vuint& high, vuint& low) {
#if defined(__AVX512F__)
  const __m512i x = (__m512i)a, factor = _mm512_set1_epi32(int(c));
  const __m512i even = _mm512_mul_epu32(x, factor), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), factor);
  high = (vuint)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
  low = (vuint)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
#elif defined(__AVX2__)
  const __m256i x = (__m256i)a, factor = _mm256_set1_epi32(int(c));
  const __m256i even = _mm256_mul_epu32(x, factor), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), factor);
  high = (vuint)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  low = (vuint)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
#else
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t product = uint64_t(a[i]) * c;
    high[i] = uint32_t(product >> 32);
    low[i] = uint32_t(product);
  }
#endif
}

// Philox 4x32-7 of kernels/reference.py in every lane: counter in, random words out.
inline void philox(vuint (&c)[4], uint64_t seed) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 7; ++round) {
    vuint high0, low0, high2, low2;
    multiply_wide(c[0], 0xD2511F53u, high0, low0);
    multiply_wide(c[2], 0xCD9E8D57u, high2, low2);
    c[0] = high2 ^ c[1] ^ k0;
    c[1] = low2;
    c[2] = high0 ^ c[3] ^ k1;
    c[3] = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// Bit i: byte i of value is at least threshold, which is below 256.
inline uint64_t bytes_at_least(vbytes value, uint32_t threshold) {
  const vbytes least = vbytes{} + uint8_t(threshold);
#if defined(__AVX512F__)
  return _mm512_cmpge_epu8_mask((__m512i)value, (__m512i)least);
#else
  const vbytes yes = (vbytes)(value >= least);
#if defined(__AVX2__)
  return uint32_t(_mm256_movemask_epi8((__m256i)yes));
#else
  uint64_t bits = 0;
  for (int i = 0; i < 4 * kLanes; i += 8) {
    uint64_t eight;
    std::memcpy(&eight, reinterpret_cast<const char*>(&yes) + i, 8);
    // The last bits of eight bytes side by side: byte j's goes to bit 56 + j, and no two meet.
    bits |= ((eight & 0x0101010101010101u) * 0x0102040810204080u >> 56) << i;
  }
  return bits;
#endif
#endif
}

// x in the lanes whose bit is set, 0 in the others.
inline vfloat keep_lanes(uint32_t bits, vfloat x) {
#if defined(__AVX512F__)
  return _mm512_maskz_mov_ps(__mmask16(bits), x);
#else
  const vuint bit = splat_bits(1) << (vuint)lane_index();
  return (vfloat)((vint)x & ((splat_bits(bits) & bit) != 0));
#endif
}
