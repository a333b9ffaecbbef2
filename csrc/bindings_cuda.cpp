// Python bindings of the CUDA kernels.
#include <stdexcept>
#include <string>
#include <tuple>

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

cuda::AttentionArgs attention_args(HeadsTensor q, HeadsTensor k, HeadsTensor v, HeadsTensor out, Memory lse,
                                   std::array<int64_t, 6> sizes, std::array<Memory, 2> cu_seqlens, int64_t documents,
                                   bool causal, float scale, uint32_t dropout_threshold, float dropout_scale,
                                   uint64_t dropout_seed, int dtype) {
  cuda::AttentionArgs args{};
  args.q = q, args.k = k, args.v = v, args.out = out;
  args.lse = address<float>(lse);
  std::tie(args.batch, args.seqlen_q, args.seqlen_k, args.heads, args.kv_heads, args.head_dim) = std::tuple_cat(sizes);
  args.cu_seqlens_q = address<const int32_t>(cu_seqlens[0]);
  args.cu_seqlens_k = address<const int32_t>(cu_seqlens[1]);
  args.documents = documents;
  args.causal = causal;
  args.scale = scale;
  args.dropout_threshold = dropout_threshold;
  args.dropout_scale = dropout_scale;
  args.dropout_seed = dropout_seed;
  args.dtype = static_cast<DType>(dtype);
  return args;
}

// sizes: batch, seq, heads of q and k, head_dim, rotary_dim / 2, width of z, inner, activated's stride.
cuda::AfterInArgs after_in_args(Memory z, Memory bias, Memory activated, std::array<int64_t, 8> sizes,
                                std::array<Memory, 2> table, int64_t table_rows, Memory position,
                                int64_t position_batch_stride, int dtype) {
  cuda::AfterInArgs args{};
  args.z = address(z), args.bias = address(bias), args.activated = address(activated);
  std::tie(args.batch, args.seq, args.turned_heads, args.head_dim, args.half, args.width, args.inner,
           args.activated_stride) = std::tuple_cat(sizes);
  args.cos = address<const float>(table[0]), args.sin = address<const float>(table[1]);
  args.table_rows = table_rows;
  args.position = address<const int64_t>(position);
  args.position_batch_stride = position_batch_stride;
  args.dtype = static_cast<DType>(dtype);
  return args;
}

// dropout: threshold, scale, seed.
cuda::ResidualArgs residual_args(Memory h, std::array<int64_t, 2> sizes, std::tuple<uint32_t, float, uint64_t> dropout,
                                 int dtype) {
  cuda::ResidualArgs args{};
  args.h = address(h);
  args.rows = sizes[0], args.columns = sizes[1];
  std::tie(args.dropout_threshold, args.dropout_scale, args.seed) = dropout;
  args.dtype = static_cast<DType>(dtype);
  return args;
}

// sizes: rows, columns, chunks, ignore_index.
cuda::CrossEntropyArgs cross_entropy_args(Memory logits, Memory bias, Memory targets, Memory loss, Memory stats,
                                          Memory partial, std::array<int64_t, 4> sizes, float z_loss, int dtype) {
  cuda::CrossEntropyArgs args{};
  args.logits = address(logits), args.bias = address(bias);
  args.targets = address<const int64_t>(targets);
  args.loss = address<float>(loss), args.stats = address<float>(stats);
  args.partial = address<float>(partial);
  std::tie(args.rows, args.columns, args.chunks, args.ignore_index) = std::tuple_cat(sizes);
  args.z_loss = z_loss;
  args.dtype = static_cast<DType>(dtype);
  return args;
}

// The launcher of an attention kernel. version 0: mma.sync, any card; 1: wgmma, compute capability 9.0 only.
using AttentionLauncher = void (*)(const cuda::AttentionArgs&, void*);
AttentionLauncher attention_version(int version, AttentionLauncher mma, AttentionLauncher hopper) {
  if (version == 0) return mma;
  if (version == 1 && hopper) return hopper;
  throw std::invalid_argument("attention: version = " + std::to_string(version) + ": this build has " +
                              (kHasHopper ? "0 (mma) and 1 (hopper)" : "0 (mma); build with 90a in PHI1_CUDA_ARCHS"));
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

  m.def("attention_forward_cuda",
        [](HeadsTensor q, HeadsTensor k, HeadsTensor v, HeadsTensor out, Memory lse, std::array<int64_t, 6> sizes,
           std::array<Memory, 2> cu_seqlens, int64_t documents, bool causal, float scale, uint32_t dropout_threshold,
           float dropout_scale, uint64_t dropout_seed, int dtype, uintptr_t stream, int version) {
          py::gil_scoped_release release;
          const auto forward = attention_version(version, cuda::attention_forward, PHI1_HOPPER(attention_forward));
          forward(attention_args(q, k, v, out, lse, sizes, cu_seqlens, documents, causal, scale, dropout_threshold,
                                 dropout_scale, dropout_seed, dtype),
                  stream_of(stream));
        });

  m.def("attention_backward_cuda", [](const std::array<HeadsTensor, 4>& grads, Memory row_stats, HeadsTensor q,
                                      HeadsTensor k, HeadsTensor v, HeadsTensor out, Memory lse,
                                      std::array<int64_t, 6> sizes, std::array<Memory, 2> cu_seqlens, int64_t documents,
                                      bool causal, float scale, uint32_t dropout_threshold, float dropout_scale,
                                      uint64_t dropout_seed, int dtype, uintptr_t stream, int version) {
    py::gil_scoped_release release;
    cuda::AttentionArgs args = attention_args(q, k, v, out, lse, sizes, cu_seqlens, documents, causal, scale,
                                              dropout_threshold, dropout_scale, dropout_seed, dtype);
    args.grad_out = grads[0], args.grad_q = grads[1];
    args.grad_k = grads[2], args.grad_v = grads[3];
    args.row_stats = address<float>(row_stats);
    attention_version(version, cuda::attention_backward, PHI1_HOPPER(attention_backward))(args, stream_of(stream));
  });

  m.def("layer_norm_forward_cuda", [](Memory x, Memory weight, Memory bias, Memory y, Memory stats,
                                      std::array<int64_t, 3> sizes, float eps, int dtype, uintptr_t stream) {
    py::gil_scoped_release release;
    cuda::LayerNormArgs args{};
    args.x = address(x), args.weight = address(weight), args.bias = address(bias), args.y = address(y);
    args.stats = address<float>(stats);
    args.rows = sizes[0], args.hidden = sizes[1], args.x_stride = sizes[2];
    args.eps = eps;
    args.dtype = static_cast<DType>(dtype);
    cuda::layer_norm_forward(args, stream_of(stream));
  });

  m.def("layer_norm_backward_cuda",
        [](Memory grad_y, Memory x, Memory weight, Memory stats, Memory grad_x, Memory grad_weight, Memory grad_bias,
           Memory partial, Memory residual, std::array<int64_t, 4> sizes, int dtype, uintptr_t stream) {
          py::gil_scoped_release release;
          cuda::LayerNormArgs args{};
          args.grad_y = address(grad_y), args.x = address(x), args.weight = address(weight), args.y = address(grad_x);
          args.grad_weight = address(grad_weight), args.grad_bias = address(grad_bias);
          args.stats = address<float>(stats), args.partial = address<float>(partial);
          args.residual = address(residual);
          args.rows = sizes[0], args.hidden = sizes[1], args.x_stride = sizes[2], args.chunks = sizes[3];
          args.dtype = static_cast<DType>(dtype);
          cuda::layer_norm_backward(args, stream_of(stream));
        });

  m.def("after_in_cuda", [](Memory z, Memory bias, Memory activated, std::array<int64_t, 8> sizes,
                            std::array<Memory, 2> table, int64_t table_rows, Memory position,
                            int64_t position_batch_stride, int dtype, uintptr_t stream) {
    py::gil_scoped_release release;
    cuda::after_in(after_in_args(z, bias, activated, sizes, table, table_rows, position, position_batch_stride, dtype),
                   stream_of(stream));
  });

  m.def("after_in_backward_cuda",
        [](Memory grad_z, Memory grad_bias, Memory partial, int64_t chunks, Memory z, Memory bias, Memory activated,
           std::array<int64_t, 8> sizes, std::array<Memory, 2> table, int64_t table_rows, Memory position,
           int64_t position_batch_stride, int dtype, uintptr_t stream) {
          py::gil_scoped_release release;
          cuda::AfterInArgs args =
              after_in_args(z, bias, activated, sizes, table, table_rows, position, position_batch_stride, dtype);
          args.grad_z = address(grad_z), args.grad_bias = address(grad_bias);
          args.partial = address<float>(partial), args.chunks = chunks;
          cuda::after_in_backward(args, stream_of(stream));
        });

  m.def("residual_cuda", [](Memory h, Memory bias, Memory x, std::array<int64_t, 2> sizes,
                            std::tuple<uint32_t, float, uint64_t> dropout, int dtype, uintptr_t stream) {
    py::gil_scoped_release release;
    cuda::ResidualArgs args = residual_args(h, sizes, dropout, dtype);
    args.bias = address(bias), args.x = address(x);
    cuda::residual(args, stream_of(stream));
  });

  m.def("residual_backward_cuda",
        [](Memory grad_y, Memory grad_h, Memory grad_bias, Memory partial, int64_t chunks, std::array<int64_t, 2> sizes,
           std::tuple<uint32_t, float, uint64_t> dropout, int dtype, uintptr_t stream) {
          py::gil_scoped_release release;
          cuda::ResidualArgs args = residual_args(grad_h, sizes, dropout, dtype);
          args.grad_y = address(grad_y), args.grad_bias = address(grad_bias);
          args.partial = address<float>(partial), args.chunks = chunks;
          cuda::residual_backward(args, stream_of(stream));
        });

  // With a null `partial` the loss only.
  m.def("cross_entropy_cuda", [](Memory logits, Memory bias, Memory targets, Memory loss, Memory stats, Memory partial,
                                 std::array<int64_t, 4> sizes, float z_loss, int dtype, uintptr_t stream) {
    py::gil_scoped_release release;
    const cuda::CrossEntropyArgs args =
        cross_entropy_args(logits, bias, targets, loss, stats, partial, sizes, z_loss, dtype);
    cuda::cross_entropy(args, stream_of(stream));
    if (args.partial != nullptr) cuda::cross_entropy_backward(args, stream_of(stream));
  });
}

}  // namespace phi1
