// Python bindings of the CPU kernels.
#include <tuple>

#include "bindings.h"
#include "cpu/kernels.h"

namespace py = pybind11;

namespace phi1 {
namespace {

// (batch, seqlen_q, seqlen_k, heads, kv_heads, head_dim), (starts_q, starts_k, documents), causal, scale,
// (dropout threshold, scale, seed), dtype: kernels/cpu.py, _attention_arguments.
cpu::AttentionArgs attention_args(std::array<int64_t, 6> sizes, std::tuple<Memory, Memory, int64_t> documents,
                                  bool causal, float scale, std::tuple<uint32_t, float, uint64_t> dropout, int dtype) {
  cpu::AttentionArgs args = {};
  std::tie(args.batch, args.seqlen_q, args.seqlen_k, args.heads, args.kv_heads, args.head_dim) = std::tuple_cat(sizes);
  args.starts_q = address<const int32_t>(std::get<0>(documents));
  args.starts_k = address<const int32_t>(std::get<1>(documents));
  args.documents = std::get<2>(documents);
  args.causal = causal;
  args.scale = scale;
  std::tie(args.dropout_threshold, args.dropout_scale, args.seed) = dropout;
  args.dtype = static_cast<DType>(dtype);
  return args;
}

// Of z, bias, activated, then (batch, seq, turned heads, head_dim, half, width, inner, activated's stride) and the
// rotary table: kernels/cpu.py, _after_in_arguments.
cpu::AfterInArgs after_in_args(Memory z, Memory bias, Memory activated, std::array<int64_t, 8> sizes, Memory cos,
                               Memory sin, Memory position, int64_t position_batch_stride, int dtype) {
  cpu::AfterInArgs args = {};
  args.z = address(z), args.bias = address(bias), args.activated = address(activated);
  std::tie(args.batch, args.seq, args.turned_heads, args.head_dim, args.half, args.width, args.inner,
           args.activated_stride) = std::tuple_cat(sizes);
  args.cos = address<const float>(cos), args.sin = address<const float>(sin);
  args.position = address<const int64_t>(position);
  args.position_batch_stride = position_batch_stride;
  args.dtype = static_cast<DType>(dtype);
  return args;
}

cpu::ResidualArgs residual_args(int64_t rows, int64_t columns, std::tuple<uint32_t, float, uint64_t> dropout,
                                int dtype) {
  cpu::ResidualArgs args = {};
  args.rows = rows, args.columns = columns;
  std::tie(args.dropout_threshold, args.dropout_scale, args.seed) = dropout;
  args.dtype = static_cast<DType>(dtype);
  return args;
}

}  // namespace

void bind_cpu(py::module_& m) {
  py::class_<cpu::Isa> isa(m, "Isa", "The kernels of one instruction set.");
  isa.def_readonly("name", &cpu::Isa::name);
  isa.def_readonly("missing", &cpu::Isa::missing, "Why this process cannot run them, or None.");
  m.def("isas", &cpu::isas, "All that were compiled, the most capable first.");

  isa.def("rotary", [](const cpu::Isa& isa, HeadsTensor q, HeadsTensor k, HeadsTensor q_out, HeadsTensor k_out,
                       std::array<int64_t, 5> sizes, Memory cos, Memory sin, int64_t half, Memory position,
                       int64_t position_batch_stride, bool inverse, int dtype, int threads) {
    py::gil_scoped_release release;
    isa.table->rotary(
        rotary_args(q, k, q_out, k_out, sizes, cos, sin, half, position, position_batch_stride, inverse, dtype),
        threads);
  });

  isa.def("attention_forward",
          [](const cpu::Isa& isa, HeadsTensor q, HeadsTensor k, HeadsTensor v, HeadsTensor out, Memory lse,
             std::array<int64_t, 6> sizes, std::tuple<Memory, Memory, int64_t> documents, bool causal, float scale,
             std::tuple<uint32_t, float, uint64_t> dropout, int dtype, int threads) {
            py::gil_scoped_release release;
            cpu::AttentionArgs args = attention_args(sizes, documents, causal, scale, dropout, dtype);
            args.q = q;
            args.k = k;
            args.v = v;
            args.out = out;
            args.lse = address<float>(lse);
            isa.table->attention_forward(args, threads);
          });

  isa.def("attention_backward",
          [](const cpu::Isa& isa, HeadsTensor grad_out, HeadsTensor q, HeadsTensor k, HeadsTensor v, HeadsTensor out,
             HeadsTensor grad_q, HeadsTensor grad_k, HeadsTensor grad_v, Memory lse, std::array<int64_t, 6> sizes,
             std::tuple<Memory, Memory, int64_t> documents, bool causal, float scale,
             std::tuple<uint32_t, float, uint64_t> dropout, int dtype, int threads) {
            py::gil_scoped_release release;
            cpu::AttentionArgs args = attention_args(sizes, documents, causal, scale, dropout, dtype);
            args.grad_out = grad_out;
            args.q = q;
            args.k = k;
            args.v = v;
            args.out = out;
            args.grad_q = grad_q;
            args.grad_k = grad_k;
            args.grad_v = grad_v;
            args.lse = address<float>(lse);
            isa.table->attention_backward(args, threads);
          });

  isa.def("layer_norm_forward", [](const cpu::Isa& isa, Memory x, Memory weight, Memory bias, Memory y, Memory stats,
                                   std::array<int64_t, 3> sizes, float eps, int dtype, int threads) {
    py::gil_scoped_release release;
    cpu::LayerNormArgs args = {};
    args.x = address(x), args.weight = address(weight), args.bias = address(bias), args.y = address(y);
    args.stats = address<float>(stats);
    std::tie(args.rows, args.hidden, args.x_stride) = std::tuple_cat(sizes);
    args.eps = eps;
    args.dtype = static_cast<DType>(dtype);
    isa.table->layer_norm_forward(args, threads);
  });

  isa.def("layer_norm_backward",
          [](const cpu::Isa& isa, Memory grad_y, Memory x, Memory weight, Memory stats, Memory residual, Memory grad_x,
             Memory grad_weight, Memory grad_bias, std::array<int64_t, 3> sizes, int dtype, int threads) {
            py::gil_scoped_release release;
            cpu::LayerNormArgs args = {};
            args.grad_y = address(grad_y), args.x = address(x), args.weight = address(weight);
            args.stats = address<float>(stats);
            args.residual = address(residual);
            args.y = address(grad_x), args.grad_weight = address(grad_weight), args.grad_bias = address(grad_bias);
            std::tie(args.rows, args.hidden, args.x_stride) = std::tuple_cat(sizes);
            args.dtype = static_cast<DType>(dtype);
            isa.table->layer_norm_backward(args, threads);
          });

  isa.def("after_in",
          [](const cpu::Isa& isa, Memory z, Memory bias, Memory activated, std::array<int64_t, 8> sizes, Memory cos,
             Memory sin, Memory position, int64_t position_batch_stride, int dtype, int threads) {
            py::gil_scoped_release release;
            isa.table->after_in(
                after_in_args(z, bias, activated, sizes, cos, sin, position, position_batch_stride, dtype), threads);
          });

  isa.def("after_in_backward", [](const cpu::Isa& isa, Memory grad_z, Memory grad_bias, Memory z, Memory bias,
                                  Memory activated, std::array<int64_t, 8> sizes, Memory cos, Memory sin,
                                  Memory position, int64_t position_batch_stride, int dtype, int threads) {
    py::gil_scoped_release release;
    cpu::AfterInArgs args = after_in_args(z, bias, activated, sizes, cos, sin, position, position_batch_stride, dtype);
    args.grad_z = address(grad_z), args.grad_bias = address(grad_bias);
    isa.table->after_in_backward(args, threads);
  });

  isa.def("residual", [](const cpu::Isa& isa, Memory h, Memory bias, Memory x, int64_t rows, int64_t columns,
                         std::tuple<uint32_t, float, uint64_t> dropout, int dtype, int threads) {
    py::gil_scoped_release release;
    cpu::ResidualArgs args = residual_args(rows, columns, dropout, dtype);
    args.h = address(h), args.bias = address(bias), args.x = address(x);
    isa.table->residual(args, threads);
  });

  isa.def("residual_backward",
          [](const cpu::Isa& isa, Memory grad_y, Memory grad_h, Memory grad_bias, int64_t rows, int64_t columns,
             std::tuple<uint32_t, float, uint64_t> dropout, int dtype, int threads) {
            py::gil_scoped_release release;
            cpu::ResidualArgs args = residual_args(rows, columns, dropout, dtype);
            args.grad_y = address(grad_y), args.h = address(grad_h), args.grad_bias = address(grad_bias);
            isa.table->residual_backward(args, threads);
          });

  isa.def("cross_entropy", [](const cpu::Isa& isa, Memory logits, Memory bias, Memory targets, Memory loss,
                              Memory grad_bias, std::array<int64_t, 3> sizes, float z_loss, int dtype, int threads) {
    py::gil_scoped_release release;
    cpu::CrossEntropyArgs args = {};
    args.z_loss = z_loss;
    args.logits = address(logits), args.bias = address(bias), args.targets = address<const int64_t>(targets);
    args.loss = address<float>(loss), args.grad_bias = address<float>(grad_bias);
    std::tie(args.rows, args.columns, args.ignore_index) = std::tuple_cat(sizes);
    args.dtype = static_cast<DType>(dtype);
    isa.table->cross_entropy(args, threads);
  });

  isa.def("add_product", [](const cpu::Isa& isa, Memory high, Memory low, Memory product, int64_t count, bool first,
                            bool last, int dtype, int threads) {
    py::gil_scoped_release release;
    cpu::AddProductArgs args = {};
    args.high = address<uint16_t>(high), args.low = address<uint16_t>(low), args.product = address(product);
    args.count = count, args.first = first, args.last = last;
    args.dtype = static_cast<DType>(dtype);
    isa.table->add_product(args, threads);
  });

  isa.def("residual_keep", [](const cpu::Isa& isa, Memory keep, int64_t rows, int64_t columns, uint32_t threshold,
                              uint64_t seed, int threads) {
    py::gil_scoped_release release;
    isa.table->residual_keep(address<uint8_t>(keep), rows, columns, threshold, seed, threads);
  });

  // For tests: 2^x as the kernels compute it, of `count` floats at `in`.
  isa.def("exp2", [](const cpu::Isa& isa, Memory in, Memory out, int64_t count, bool short_form) {
    isa.table->exp2(address<const float>(in), address<float>(out), count, short_form);
  });
}

}  // namespace phi1
