// Vectors of bf16 and fp16 in memory, as floats.

inline vfloat vload(const bf16* p) {
  uint16_t bits __attribute__((vector_size(2 * kLanes)));
  std::memcpy(&bits, p, sizeof bits);
  return (vfloat)(__builtin_convertvector(bits, vuint) << 16);
}

inline vfloat vload(const f16* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  return vfloat{load(p[0]), load(p[1]), load(p[2]), load(p[3])};
#endif
}

typedef uint16_t vhalf __attribute__((vector_size(2 * kLanes)));

inline void vstore(bf16* p, vfloat v) {
  const vuint u = (vuint)v, rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16, quiet = (u >> 16) | 0x40u;
  const vuint nan = (vuint)(v != v);
  const vhalf bits = __builtin_convertvector((nan & quiet) | (~nan & rounded), vhalf);
  std::memcpy(p, &bits, sizeof bits);
}

inline void vstore(f16* p, vfloat v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) store(p[i], v[i]);
#endif
}
