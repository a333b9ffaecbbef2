// The Python module _emulator: the functions of csrc/bindings_cuda.cpp, run by the emulator. Built by the tests only.
#include "bindings.h"
#include "emulator/emulator.h"

PYBIND11_MODULE(_emulator, m) {
  using namespace phi1;
  m.doc() = "The CUDA kernels on the CPU: arguments as kernels._native's, tensors on the CPU.";
  bind_cuda(m);
  m.def("set_seed", &emulator::set_seed, "Order of threads, warps and blocks.");
  m.def("reset_counters", &emulator::reset_counters);
  m.def("counters", [] {
    const emulator::Counters c = emulator::counters();
    pybind11::dict d;
    d["launches"] = c.launches;
    d["blocks"] = c.blocks;
    d["mma"] = c.mma;
    d["barriers"] = c.barriers;
    d["global_sectors"] = c.global_sectors;
    d["global_sectors_least"] = c.global_sectors_least;
    d["shared_wavefronts"] = c.shared_wavefronts;
    d["shared_wavefronts_least"] = c.shared_wavefronts_least;
    return d;
  });
}
