// Python bindings of the CPU kernels.
#include <tuple>

#include "bindings.h"
#include "cpu/kernels.h"

namespace py = pybind11;

namespace phi1 {
namespace {

// (batch, seqlen_q, seqlen_k, heads, kv_heads, head_dim), (address of starts_q, of starts_k, documents), causal, scale,
// (dropout threshold, scale, seed), dtype: kernels/cpu.py, _attention_arguments.
cpu::AttentionArgs attention_args(std::array<int64_t, 6> sizes, std::array<int64_t, 3> documents, bool causal,
                                  float scale, std::tuple<uint32_t, float, uint64_t> dropout, int dtype) {
  cpu::AttentionArgs args = {};
  std::tie(args.batch, args.seqlen_q, args.seqlen_k, args.heads, args.kv_heads, args.head_dim) = std::tuple_cat(sizes);
  args.starts_q = reinterpret_cast<const int32_t*>(documents[0]);
  args.starts_k = reinterpret_cast<const int32_t*>(documents[1]);
  args.documents = documents[2];
  args.causal = causal;
  args.scale = scale;
  std::tie(args.dropout_threshold, args.dropout_scale, args.seed) = dropout;
  args.dtype = static_cast<DType>(dtype);
  return args;
}

}  // namespace

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

  m.def("attention_forward_cpu",
        [](const HeadsSpec& q, const HeadsSpec& k, const HeadsSpec& v, const HeadsSpec& out, uintptr_t lse,
           std::array<int64_t, 6> sizes, std::array<int64_t, 3> documents, bool causal, float scale,
           std::tuple<uint32_t, float, uint64_t> dropout, int dtype, int threads) {
          py::gil_scoped_release release;
          cpu::AttentionArgs args = attention_args(sizes, documents, causal, scale, dropout, dtype);
          args.q = heads_tensor(q);
          args.k = heads_tensor(k);
          args.v = heads_tensor(v);
          args.out = heads_tensor(out);
          args.lse = reinterpret_cast<float*>(lse);
          cpu::kernels().attention_forward(args, threads);
        });

  m.def("attention_backward_cpu",
        [](const HeadsSpec& grad_out, const HeadsSpec& q, const HeadsSpec& k, const HeadsSpec& v, const HeadsSpec& out,
           const HeadsSpec& grad_q, const HeadsSpec& grad_k, const HeadsSpec& grad_v, uintptr_t lse,
           std::array<int64_t, 6> sizes, std::array<int64_t, 3> documents, bool causal, float scale,
           std::tuple<uint32_t, float, uint64_t> dropout, int dtype, int threads) {
          py::gil_scoped_release release;
          cpu::AttentionArgs args = attention_args(sizes, documents, causal, scale, dropout, dtype);
          args.grad_out = heads_tensor(grad_out);
          args.q = heads_tensor(q);
          args.k = heads_tensor(k);
          args.v = heads_tensor(v);
          args.out = heads_tensor(out);
          args.grad_q = heads_tensor(grad_q);
          args.grad_k = heads_tensor(grad_k);
          args.grad_v = heads_tensor(grad_v);
          args.lse = reinterpret_cast<float*>(lse);
          cpu::kernels().attention_backward(args, threads);
        });

  m.def("residual_keep_cpu",
        [](uintptr_t keep, int64_t rows, int64_t columns, uint32_t threshold, uint64_t seed, int threads) {
          py::gil_scoped_release release;
          cpu::kernels().residual_keep(reinterpret_cast<uint8_t*>(keep), rows, columns, threshold, seed, threads);
        });

  // For tests: 2^x as the kernels compute it, of `count` floats at `in`.
  m.def("exp2_cpu", [](uintptr_t in, uintptr_t out, int64_t count) {
    cpu::kernels().exp2(reinterpret_cast<const float*>(in), reinterpret_cast<float*>(out), count);
  });
}

}  // namespace phi1
