// Python bindings of the CUDA kernels.
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "cuda/kernels.h"

namespace py = pybind11;

namespace phi1 {

namespace {

#if defined(PHI1_HAS_HOPPER)
constexpr bool kHasHopper = true;
#define PHI1_HOPPER(launcher) cuda::hopper::launcher
#else
constexpr bool kHasHopper = false;
#define PHI1_HOPPER(launcher) nullptr
#endif

void* stream_of(uintptr_t x) { return reinterpret_cast<void*>(x); }

// Of the launchers of an attention kernel number `version`: 0, mma.sync, any card; the others, wgmma, compute
// capability 9.0 only.
using AttentionLauncher = void (*)(const AttentionArgs&, void*);
AttentionLauncher attention_version(int version, std::initializer_list<AttentionLauncher> launchers) {
  if (version >= 0 && version < int(launchers.size()))
    if (const AttentionLauncher found = launchers.begin()[version]) return found;
  throw std::invalid_argument("attention: version = " + std::to_string(version) + ": this build has 0 (mma)" +
                              (kHasHopper ? " to " + std::to_string(launchers.size() - 1) + " (hopper)"
                                          : "; build with 90a in PHI1_CUDA_ARCHS"));
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.attr("has_hopper") = kHasHopper;

  m.def("rotary_cuda", [](HeadsTensor q, HeadsTensor k, HeadsTensor q_out, HeadsTensor k_out,
                          std::array<int64_t, 5> sizes, Memory cos, Memory sin, int64_t half, Memory position,
                          int64_t position_batch_stride, bool inverse, int dtype, uintptr_t stream) {
    py::gil_scoped_release release;
    cuda::rotary(
        rotary_args(q, k, q_out, k_out, sizes, cos, sin, half, position, position_batch_stride, inverse, dtype),
        stream_of(stream));
  });

  m.def("attention_forward_cuda", [](HeadsTensor q, HeadsTensor k, HeadsTensor v, HeadsTensor out, Memory lse,
                                     std::array<int64_t, 6> sizes, std::tuple<Memory, Memory, int64_t> documents,
                                     bool causal, float scale, Dropout dropout, int dtype, uintptr_t stream,
                                     int version) {
    py::gil_scoped_release release;
    const auto forward = attention_version(
        version, {cuda::attention_forward, PHI1_HOPPER(attention_forward), PHI1_HOPPER(attention_forward_wide)});
    forward(attention_args(q, k, v, out, lse, sizes, documents, causal, scale, dropout, dtype), stream_of(stream));
  });

  m.def("attention_backward_cuda",
        [](const std::array<HeadsTensor, 4>& grads, Memory row_stats, HeadsTensor q, HeadsTensor k, HeadsTensor v,
           HeadsTensor out, Memory lse, std::array<int64_t, 6> sizes, std::tuple<Memory, Memory, int64_t> documents,
           bool causal, float scale, Dropout dropout, int dtype, uintptr_t stream, int version) {
          py::gil_scoped_release release;
          AttentionArgs args = attention_args(q, k, v, out, lse, sizes, documents, causal, scale, dropout, dtype);
          add_gradients(args, grads);
          args.row_stats = address<float>(row_stats);
          const auto backward = attention_version(version, {cuda::attention_backward, PHI1_HOPPER(attention_backward)});
          backward(args, stream_of(stream));
        });

  m.def("layer_norm_forward_cuda", [](Memory x, Memory weight, Memory bias, Memory y, Memory stats,
                                      std::array<int64_t, 3> sizes, float eps, int dtype, uintptr_t stream) {
    py::gil_scoped_release release;
    LayerNormArgs args = layer_norm_args(x, weight, stats, sizes, dtype);
    args.bias = address(bias), args.y = address(y), args.eps = eps;
    cuda::layer_norm_forward(args, stream_of(stream));
  });

  m.def("layer_norm_backward_cuda", [](Memory grad_y, Memory x, Memory weight, Memory stats, Memory residual,
                                       Memory grad_x, Memory grad_weight, Memory grad_bias, Memory partial,
                                       int64_t chunks, std::array<int64_t, 3> sizes, int dtype, uintptr_t stream) {
    py::gil_scoped_release release;
    LayerNormArgs args = layer_norm_args(x, weight, stats, sizes, dtype);
    args.grad_y = address(grad_y), args.residual = address(residual);
    args.y = address(grad_x), args.grad_weight = address(grad_weight), args.grad_bias = address(grad_bias);
    args.partial = address<float>(partial), args.chunks = chunks;
    cuda::layer_norm_backward(args, stream_of(stream));
  });

  m.def("after_in_cuda", [](Memory z, Memory bias, Memory activated, std::array<int64_t, 8> sizes,
                            std::tuple<Memory, Memory, int64_t> table, Memory position, int64_t position_batch_stride,
                            int activation, int dtype, uintptr_t stream) {
    py::gil_scoped_release release;
    cuda::after_in(after_in_args(z, bias, activated, sizes, table, position, position_batch_stride, activation, dtype),
                   stream_of(stream));
  });

  m.def("after_in_backward_cuda",
        [](Memory grad_z, Memory grad_bias, Memory partial, int64_t chunks, Memory z, Memory bias, Memory activated,
           std::array<int64_t, 8> sizes, std::tuple<Memory, Memory, int64_t> table, Memory position,
           int64_t position_batch_stride, int activation, int dtype, uintptr_t stream) {
          py::gil_scoped_release release;
          AfterInArgs args =
              after_in_args(z, bias, activated, sizes, table, position, position_batch_stride, activation, dtype);
          args.grad_z = address(grad_z), args.grad_bias = address(grad_bias);
          args.partial = address<float>(partial), args.chunks = chunks;
          cuda::after_in_backward(args, stream_of(stream));
        });

  m.def("residual_cuda", [](Memory h, Memory bias, Memory x, std::array<int64_t, 2> sizes, Dropout dropout, int dtype,
                            uintptr_t stream) {
    py::gil_scoped_release release;
    ResidualArgs args = residual_args(h, sizes, dropout, dtype);
    args.bias = address(bias), args.x = address(x);
    cuda::residual(args, stream_of(stream));
  });

  m.def("residual_backward_cuda", [](Memory grad_y, Memory grad_h, Memory grad_bias, Memory partial, int64_t chunks,
                                     std::array<int64_t, 2> sizes, Dropout dropout, int dtype, uintptr_t stream) {
    py::gil_scoped_release release;
    ResidualArgs args = residual_args(grad_h, sizes, dropout, dtype);
    args.grad_y = address(grad_y), args.grad_bias = address(grad_bias);
    args.partial = address<float>(partial), args.chunks = chunks;
    cuda::residual_backward(args, stream_of(stream));
  });

  // With null `bias_sums` the loss only.
  m.def("cross_entropy_cuda",
        [](Memory logits, Memory bias, Memory targets, Memory loss, Memory bias_sums, Memory stats, int64_t chunks,
           std::array<int64_t, 3> sizes, float z_loss, int dtype, uintptr_t stream) {
          py::gil_scoped_release release;
          CrossEntropyArgs args = cross_entropy_args(logits, bias, targets, loss, bias_sums, sizes, z_loss, dtype);
          args.stats = address<float>(stats), args.chunks = chunks;
          cuda::cross_entropy(args, stream_of(stream));
          if (args.bias_sums != nullptr) cuda::cross_entropy_backward(args, stream_of(stream));
        });
}

}  // namespace phi1
