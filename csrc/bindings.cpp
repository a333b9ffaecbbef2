// The Python module kernels._native: raw pointers, sizes, strides and a stream in; exceptions out. No torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "cpu/kernels.h"
#if defined(PHI1_HAS_CUDA)
#include "cuda/kernels.h"
#endif

namespace py = pybind11;
using namespace phi1;

namespace {

// (address, batch stride, seq stride, head stride), strides in elements.
using HeadsSpec = std::array<int64_t, 4>;

HeadsTensor heads_tensor(const HeadsSpec& spec) {
  return {reinterpret_cast<void*>(spec[0]), spec[1], spec[2], spec[3]};
}

RotaryArgs rotary_args(const HeadsSpec& q, const HeadsSpec& k, const HeadsSpec& q_out, const HeadsSpec& k_out,
                       std::array<int64_t, 5> sizes, uintptr_t cos, uintptr_t sin, int64_t half, uintptr_t position,
                       int64_t position_batch_stride, bool inverse, int dtype) {
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

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "phi1's native kernels. Called by kernels/cpu.py and kernels/cuda.py only.";
#if defined(PHI1_HAS_CUDA)
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
  m.def("isa_name", &cpu::isa_name);
  m.def("use_isa", &cpu::use_isa);

  m.def("rotary_cpu", [](const HeadsSpec& q, const HeadsSpec& k, const HeadsSpec& q_out, const HeadsSpec& k_out,
                         std::array<int64_t, 5> sizes, uintptr_t cos, uintptr_t sin, int64_t half, uintptr_t position,
                         int64_t position_batch_stride, bool inverse, int dtype, int threads) {
    py::gil_scoped_release release;
    cpu::kernels().rotary(
        rotary_args(q, k, q_out, k_out, sizes, cos, sin, half, position, position_batch_stride, inverse, dtype),
        threads);
  });
#if defined(PHI1_HAS_CUDA)
  m.def("rotary_cuda", [](const HeadsSpec& q, const HeadsSpec& k, const HeadsSpec& q_out, const HeadsSpec& k_out,
                          std::array<int64_t, 5> sizes, uintptr_t cos, uintptr_t sin, int64_t half, uintptr_t position,
                          int64_t position_batch_stride, bool inverse, int dtype, uintptr_t stream) {
    py::gil_scoped_release release;
    cuda::rotary(
        rotary_args(q, k, q_out, k_out, sizes, cos, sin, half, position, position_batch_stride, inverse, dtype),
        reinterpret_cast<void*>(stream));
  });
#endif
}
