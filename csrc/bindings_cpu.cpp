// Python bindings of the CPU kernels.
#include "bindings.h"
#include "cpu/kernels.h"

namespace py = pybind11;

namespace phi1 {

void bind_cpu(py::module_& m) {
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
}

}  // namespace phi1
