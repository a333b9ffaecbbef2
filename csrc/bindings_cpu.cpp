// Python bindings of the CPU kernels.

#include "bindings.h"
#include "cpu/kernels.h"

namespace py = pybind11;

namespace phi1 {
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
             Dropout dropout, int dtype, int threads) {
            py::gil_scoped_release release;
            isa.table->attention_forward(
                attention_args(q, k, v, out, lse, sizes, documents, causal, scale, dropout, dtype), threads);
          });

  isa.def("attention_backward",
          [](const cpu::Isa& isa, const std::array<HeadsTensor, 4>& grads, HeadsTensor q, HeadsTensor k, HeadsTensor v,
             HeadsTensor out, Memory lse, std::array<int64_t, 6> sizes, std::tuple<Memory, Memory, int64_t> documents,
             bool causal, float scale, Dropout dropout, int dtype, int threads) {
            py::gil_scoped_release release;
            AttentionArgs args = attention_args(q, k, v, out, lse, sizes, documents, causal, scale, dropout, dtype);
            add_gradients(args, grads);
            isa.table->attention_backward(args, threads);
          });

  isa.def("layer_norm_forward", [](const cpu::Isa& isa, Memory x, Memory weight, Memory bias, Memory y, Memory stats,
                                   std::array<int64_t, 3> sizes, float eps, int dtype, int threads) {
    py::gil_scoped_release release;
    LayerNormArgs args = layer_norm_args(x, weight, stats, sizes, dtype);
    args.bias = address(bias), args.y = address(y), args.eps = eps;
    isa.table->layer_norm_forward(args, threads);
  });

  isa.def("layer_norm_backward",
          [](const cpu::Isa& isa, Memory grad_y, Memory x, Memory weight, Memory stats, Memory residual, Memory grad_x,
             Memory grad_weight, Memory grad_bias, std::array<int64_t, 3> sizes, int dtype, int threads) {
            py::gil_scoped_release release;
            LayerNormArgs args = layer_norm_args(x, weight, stats, sizes, dtype);
            args.grad_y = address(grad_y), args.residual = address(residual);
            args.y = address(grad_x), args.grad_weight = address(grad_weight), args.grad_bias = address(grad_bias);
            isa.table->layer_norm_backward(args, threads);
          });

  isa.def("after_in", [](const cpu::Isa& isa, Memory z, Memory bias, Memory activated, std::array<int64_t, 8> sizes,
                         std::tuple<Memory, Memory, int64_t> table, Memory position, int64_t position_batch_stride,
                         int activation, int dtype, int threads) {
    py::gil_scoped_release release;
    isa.table->after_in(
        after_in_args(z, bias, activated, sizes, table, position, position_batch_stride, activation, dtype), threads);
  });

  isa.def("after_in_backward",
          [](const cpu::Isa& isa, Memory grad_z, Memory grad_bias, Memory z, Memory bias, Memory activated,
             std::array<int64_t, 8> sizes, std::tuple<Memory, Memory, int64_t> table, Memory position,
             int64_t position_batch_stride, int activation, int dtype, int threads) {
            py::gil_scoped_release release;
            AfterInArgs args =
                after_in_args(z, bias, activated, sizes, table, position, position_batch_stride, activation, dtype);
            args.grad_z = address(grad_z), args.grad_bias = address(grad_bias);
            isa.table->after_in_backward(args, threads);
          });

  isa.def("residual", [](const cpu::Isa& isa, Memory h, Memory bias, Memory x, std::array<int64_t, 2> sizes,
                         Dropout dropout, int dtype, int threads) {
    py::gil_scoped_release release;
    ResidualArgs args = residual_args(h, sizes, dropout, dtype);
    args.bias = address(bias), args.x = address(x);
    isa.table->residual(args, threads);
  });

  isa.def("residual_backward", [](const cpu::Isa& isa, Memory grad_y, Memory grad_h, Memory grad_bias,
                                  std::array<int64_t, 2> sizes, Dropout dropout, int dtype, int threads) {
    py::gil_scoped_release release;
    ResidualArgs args = residual_args(grad_h, sizes, dropout, dtype);
    args.grad_y = address(grad_y), args.grad_bias = address(grad_bias);
    isa.table->residual_backward(args, threads);
  });

  isa.def("cross_entropy", [](const cpu::Isa& isa, Memory logits, Memory bias, Memory targets, Memory loss,
                              Memory bias_sums, std::array<int64_t, 3> sizes, float z_loss, int dtype, int threads) {
    py::gil_scoped_release release;
    isa.table->cross_entropy(cross_entropy_args(logits, bias, targets, loss, bias_sums, sizes, z_loss, dtype), threads);
  });

  isa.def("add_product", [](const cpu::Isa& isa, Memory high, Memory low, Memory product, int64_t count, bool first,
                            bool last, int dtype, int threads) {
    py::gil_scoped_release release;
    AddProductArgs args = {};
    args.high = address<uint16_t>(high), args.low = address<uint16_t>(low), args.product = address(product);
    args.count = count, args.first = first, args.last = last;
    args.dtype = static_cast<DType>(dtype);
    isa.table->add_product(args, threads);
  });

  // sizes: rows, columns, width, strides of x's and of weight's rows.
  isa.def("product", [](const cpu::Isa& isa, Memory x, Memory weight, Memory y, std::array<int64_t, 5> sizes, int dtype,
                        int threads) {
    py::gil_scoped_release release;
    ProductArgs args = {};
    args.x = address(x), args.weight = address(weight), args.y = address(y);
    std::tie(args.rows, args.columns, args.width, args.x_stride, args.weight_stride) = std::tuple_cat(sizes);
    args.dtype = static_cast<DType>(dtype);
    isa.table->product(args, threads);
  });

  isa.def("residual_keep", [](const cpu::Isa& isa, Memory keep, int64_t rows, int64_t columns, uint32_t threshold,
                              uint64_t seed, int threads) {
    py::gil_scoped_release release;
    isa.table->residual_keep(address<uint8_t>(keep), rows, columns, threshold, seed, threads);
  });

  // For tests: 2^x as the kernels compute it, of `count` floats at `in`.
  isa.def("exp2", [](const cpu::Isa& isa, Memory in, Memory out, int64_t count, int form) {
    isa.table->exp2(address<const float>(in), address<float>(out), count, static_cast<cpu::Exp2>(form));
  });
}

}  // namespace phi1
