// Eight elements of a row at a time: what the kernels beside the matrix products move.
#pragma once

#include "cuda/ptx.cuh"

namespace phi1::cuda {

// Eight elements as floats: one or two loads of 16 bytes.
template <typename T>
PHI1_DEVICE void ld_global_8(float (&x)[8], const T* from) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      const Vector4 v = ld_global_16(from + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) x[i + j] = bits_to_float(v.word[j]);
    }
  } else {
    const Vector4 v = ld_global_16(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = to_float(T{uint16_t(v.word[i])});
      x[2 * i + 1] = to_float(T{uint16_t(v.word[i] >> 16)});
    }
  }
}

template <typename T>
PHI1_DEVICE void st_global_8(T* to, const float (&x)[8]) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      Vector4 v;
#pragma unroll
      for (int j = 0; j < 4; ++j) v.word[j] = float_to_bits(x[i + j]);
      st_global_16(to + i, v);
    }
  } else {
    Vector4 v;
#pragma unroll
    for (int i = 0; i < 4; ++i) v.word[i] = pack_pair(T{}, x[2 * i], x[2 * i + 1]);
    st_global_16(to, v);
  }
}

}  // namespace phi1::cuda
