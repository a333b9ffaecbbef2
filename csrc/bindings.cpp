// The Python module kernels._native: tensors, sizes, strides and a stream in; exceptions out. No torch.
#include "bindings.h"

PYBIND11_MODULE(_native, m) {
  m.doc() = "phi1's native kernels. Called by kernels/cpu.py and kernels/cuda.py only.";
  phi1::bind_cpu(m);
#if defined(PHI1_HAS_CUDA)
  m.attr("has_cuda") = true;
  phi1::bind_cuda(m);
#else
  m.attr("has_cuda") = false;
#endif
}
