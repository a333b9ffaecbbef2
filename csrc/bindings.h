// What the parts of the Python module kernels._native share: tensors, sizes and strides in. No torch.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "rotary.h"

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
