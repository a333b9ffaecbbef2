// What the parts of the Python module kernels._native share: raw pointers, sizes and strides in. No torch.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "rotary.h"

namespace phi1 {

// (address, batch stride, seq stride, head stride), strides in elements.
using HeadsSpec = std::array<int64_t, 4>;

inline HeadsTensor heads_tensor(const HeadsSpec& spec) {
  return {reinterpret_cast<void*>(spec[0]), spec[1], spec[2], spec[3]};
}

inline RotaryArgs rotary_args(const HeadsSpec& q, const HeadsSpec& k, const HeadsSpec& q_out, const HeadsSpec& k_out,
                              std::array<int64_t, 5> sizes, uintptr_t cos, uintptr_t sin, int64_t half,
                              uintptr_t position, int64_t position_batch_stride, bool inverse, int dtype) {
  const auto [batch, seq, heads, kv_heads, head_dim] = sizes;
  return {{heads_tensor(q), heads_tensor(k)},
          {heads_tensor(q_out), heads_tensor(k_out)},
          {heads, kv_heads},
          batch,
          seq,
          head_dim,
          half,
          reinterpret_cast<const float*>(cos),
          reinterpret_cast<const float*>(sin),
          reinterpret_cast<const int64_t*>(position),
          position_batch_stride,
          inverse,
          static_cast<DType>(dtype)};
}

// Each adds its functions to the module: bindings_cpu.cpp, bindings_cuda.cpp.
void bind_cpu(pybind11::module_& m);
void bind_cuda(pybind11::module_& m);

}  // namespace phi1
