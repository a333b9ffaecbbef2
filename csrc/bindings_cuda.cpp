// Python bindings of the CUDA kernels.
#include "bindings.h"
#include "cuda/kernels.h"

namespace py = pybind11;

namespace phi1 {

void bind_cuda(py::module_& m) {
  m.def("rotary_cuda", [](const HeadsSpec& q, const HeadsSpec& k, const HeadsSpec& q_out, const HeadsSpec& k_out,
                          std::array<int64_t, 5> sizes, uintptr_t cos, uintptr_t sin, int64_t half, uintptr_t position,
                          int64_t position_batch_stride, bool inverse, int dtype, uintptr_t stream) {
    py::gil_scoped_release release;
    cuda::rotary(
        rotary_args(q, k, q_out, k_out, sizes, cos, sin, half, position, position_batch_stride, inverse, dtype),
        reinterpret_cast<void*>(stream));
  });
}

}  // namespace phi1
