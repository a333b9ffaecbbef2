// float <-> bf16/fp16 as bit operations without branches, so that loops over them vectorise on every compiler.
// Rounding is to nearest even, as in PyTorch. Included into one namespace per instruction set (kernels.cpp).

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline float load(float x) { return x; }

inline float load(bf16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }

inline float load(f16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  // Place exponent and mantissa, then let a multiplication fix the bias: subnormals come out exact.
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  float value = std::bit_cast<float>(magnitude) * 0x1p112f;
  if ((x.bits & 0x7c00) == 0x7c00) value = std::bit_cast<float>(magnitude | 0x7f800000u);
  return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | uint32_t(x.bits & 0x8000) << 16);
#endif
}

inline void store(float& to, float x) { to = x; }

inline void store(bf16& to, float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  to.bits = uint16_t(x != x ? (u >> 16) | 0x40 : rounded);
}

inline void store(f16& to, float x) {
#if defined(__F16C__)
  to.bits = uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
  const uint32_t u = std::bit_cast<uint32_t>(x), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  uint32_t bits;
  if (magnitude > 0x7f800000) {
    bits = 0x7e00;  // NaN
  } else if (magnitude >= 0x477ff000) {
    bits = 0x7c00;  // rounds to infinity
  } else if (magnitude < 0x38800000) {
    // Subnormal: adding 0.5 leaves the rounded mantissa in the low bits.
    bits = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    bits = (magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  to.bits = uint16_t(sign | bits);
#endif
}
