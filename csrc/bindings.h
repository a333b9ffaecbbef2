// What the parts of the Python module kernels._native share: tensors, sizes and strides in. No torch.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <tuple>

#include "arguments.h"

namespace phi1 {

// Where a tensor's elements are; None gives null. A binding takes the tensor itself, as this or as a HeadsTensor: the
// call's arguments hold it until the kernel is done. Of an address as a number nobody would know what keeps it valid.
struct Memory {
  void* start = nullptr;
};

template <typename T = void>
T* address(Memory memory) {
  return static_cast<T*>(memory.start);
}

inline RotaryArgs rotary_args(HeadsTensor q, HeadsTensor k, HeadsTensor q_out, HeadsTensor k_out,
                              std::array<int64_t, 5> sizes, Memory cos, Memory sin, int64_t half, Memory position,
                              int64_t position_batch_stride, bool inverse, int dtype) {
  const auto [batch, seq, heads, kv_heads, head_dim] = sizes;
  return {{q, k},
          {q_out, k_out},
          {heads, kv_heads},
          batch,
          seq,
          head_dim,
          half,
          address<const float>(cos),
          address<const float>(sin),
          address<const int64_t>(position),
          position_batch_stride,
          inverse,
          static_cast<DType>(dtype)};
}

// The arguments of one call, as kernels/native.py packs them, without its threads or stream.
// Threshold, scale, seed, and where the seed is instead (a GPU's), or null.
using Dropout = std::tuple<uint32_t, float, uint64_t, Memory>;

// Into AttentionArgs or ResidualArgs.
template <typename Args>
void set_dropout(Args& args, const Dropout& dropout) {
  Memory seed;
  std::tie(args.dropout_threshold, args.dropout_scale, args.seed, seed) = dropout;
  args.seed_memory = address<const uint64_t>(seed);
}

// sizes: batch, seqlen_q, seqlen_k, heads, kv_heads, head_dim. documents: the offsets of queries and keys, and how
// many.
inline AttentionArgs attention_args(HeadsTensor q, HeadsTensor k, HeadsTensor v, HeadsTensor out, Memory lse,
                                    std::array<int64_t, 6> sizes, std::tuple<Memory, Memory, int64_t> documents,
                                    bool causal, float scale, Dropout dropout, int dtype) {
  AttentionArgs args = {};
  args.q = q, args.k = k, args.v = v, args.out = out;
  args.lse = address<float>(lse);
  std::tie(args.batch, args.seqlen_q, args.seqlen_k, args.heads, args.kv_heads, args.head_dim) = std::tuple_cat(sizes);
  args.cu_seqlens_q = address<const int32_t>(std::get<0>(documents));
  args.cu_seqlens_k = address<const int32_t>(std::get<1>(documents));
  args.documents = std::get<2>(documents);
  args.causal = causal;
  args.scale = scale;
  set_dropout(args, dropout);
  args.dtype = static_cast<DType>(dtype);
  return args;
}

// grads: of out, q, k and v.
inline void add_gradients(AttentionArgs& args, const std::array<HeadsTensor, 4>& grads) {
  args.grad_out = grads[0], args.grad_q = grads[1], args.grad_k = grads[2], args.grad_v = grads[3];
}

// sizes: batch, seq, heads of q and k, head_dim, rotary_dim / 2, width of z, inner, activated's stride.
inline AfterInArgs after_in_args(Memory z, Memory bias, Memory activated, std::array<int64_t, 8> sizes,
                                 std::tuple<Memory, Memory, int64_t> table, Memory position,
                                 int64_t position_batch_stride, int activation, int dtype) {
  AfterInArgs args = {};
  args.z = address(z), args.bias = address(bias), args.activated = address(activated);
  std::tie(args.batch, args.seq, args.turned_heads, args.head_dim, args.half, args.width, args.inner,
           args.activated_stride) = std::tuple_cat(sizes);
  args.cos = address<const float>(std::get<0>(table)), args.sin = address<const float>(std::get<1>(table));
  args.table_rows = std::get<2>(table);
  args.position = address<const int64_t>(position);
  args.position_batch_stride = position_batch_stride;
  args.activation = static_cast<Activation>(activation);
  args.dtype = static_cast<DType>(dtype);
  return args;
}

inline ResidualArgs residual_args(Memory h, std::array<int64_t, 2> sizes, Dropout dropout, int dtype) {
  ResidualArgs args = {};
  args.h = address(h);
  args.rows = sizes[0], args.columns = sizes[1];
  set_dropout(args, dropout);
  args.dtype = static_cast<DType>(dtype);
  return args;
}

// sizes: rows, hidden, elements between x's rows.
inline LayerNormArgs layer_norm_args(Memory x, Memory weight, Memory stats, std::array<int64_t, 3> sizes, int dtype) {
  LayerNormArgs args = {};
  args.x = address(x), args.weight = address(weight);
  args.stats = address<float>(stats);
  std::tie(args.rows, args.hidden, args.x_stride) = std::tuple_cat(sizes);
  args.dtype = static_cast<DType>(dtype);
  return args;
}

// sizes: rows, columns, ignore_index.
inline CrossEntropyArgs cross_entropy_args(Memory logits, Memory bias, Memory targets, Memory loss, Memory bias_sums,
                                           std::array<int64_t, 3> sizes, float z_loss, int dtype) {
  CrossEntropyArgs args = {};
  args.logits = address(logits), args.bias = address(bias);
  args.targets = address<const int64_t>(targets);
  args.loss = address<float>(loss), args.bias_sums = address<float>(bias_sums);
  std::tie(args.rows, args.columns, args.ignore_index) = std::tuple_cat(sizes);
  args.z_loss = z_loss;
  args.dtype = static_cast<DType>(dtype);
  return args;
}

// Each adds its functions to the module: bindings_cpu.cpp, bindings_cuda.cpp.
void bind_cpu(pybind11::module_& m);
void bind_cuda(pybind11::module_& m);

}  // namespace phi1

namespace pybind11::detail {

// A method of a tensor without arguments, by its interned name.
inline object call(handle tensor, PyObject* name) {
  object result = reinterpret_steal<object>(PyObject_CallMethodNoArgs(tensor.ptr(), name));
  if (!result) throw error_already_set();
  return result;
}

inline void* first_element(handle tensor) {
  static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
  void* start = PyLong_AsVoidPtr(call(tensor, data_ptr).ptr());
  if (start != nullptr) return start;
  if (PyErr_Occurred()) throw error_already_set();
  const auto elements = tensor.attr("numel")().cast<int64_t>();
  if (elements != 0) {
    const auto device = str(tensor.attr("device")).cast<std::string>();
    throw value_error("a native kernel was given " + std::to_string(elements) + " elements without memory, on " +
                      device);
  }
  return nullptr;
}

template <>
struct type_caster<phi1::Memory> {
  PYBIND11_TYPE_CASTER(phi1::Memory, const_name("Tensor | None"));
  bool load(handle source, bool) {
    value.start = source.is_none() ? nullptr : first_element(source);
    return true;
  }
};

// Of (batch, seq, heads, head_dim).
template <>
struct type_caster<phi1::HeadsTensor> {
  PYBIND11_TYPE_CASTER(phi1::HeadsTensor, const_name("Tensor"));
  bool load(handle source, bool) {
    static PyObject* const stride = PyUnicode_InternFromString("stride");
    const auto strides = reinterpret_steal<tuple>(call(source, stride).release());
    if (strides.size() != 4) return false;
    int64_t of[3];
    for (int i = 0; i < 3; ++i) of[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides.ptr(), i));
    if (PyErr_Occurred()) throw error_already_set();
    value = {first_element(source), of[0], of[1], of[2]};
    return true;
  }
};

}  // namespace pybind11::detail
