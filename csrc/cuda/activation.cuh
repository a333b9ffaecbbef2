// The MLP's activations, each a value and its slope: `Activation` of arguments.h, kernels/reference.py's ACTIVATIONS.
#pragma once

#include "arguments.h"
#include "cuda/ptx.cuh"

namespace phi1::cuda {

struct Activated {
  float value, slope;
};

// GELU, tanh approximation (arXiv 1606.08415): y sigmoid(2 c (y + 0.044715 y^3)), c = sqrt(2 / pi).
struct GeluNew {
  static PHI1_DEVICE Activated of(float y) {
    constexpr float c = 0.797884560802865f, cubic = 0.044715f, log2e = 1.44269504088896f;
    // Beyond 9.9 the sigmoid is 1, or less than 2^-122: there it and the slope are taken of 9.9, and no square runs
    // over.
    const float above = -min_nan(-y, 9.9f), t = min_nan(above, 9.9f), square = t * t;
    const float sigmoid = rcp(1.0f + ex2(t * (square * (-2 * c * cubic * log2e) + -2 * c * log2e)));
    const float value = above * sigmoid, inner = square * (6 * c * cubic) + 2 * c;
    return {value, value * (1.0f - sigmoid) * inner + sigmoid};
  }
};

// The square of ReLU (Primer, arXiv 2109.08668). NaN stays.
struct Relu2 {
  static PHI1_DEVICE Activated of(float y) {
    const float positive = -min_nan(-y, 0.0f);
    return {positive * positive, positive + positive};
  }
};

// Calls f with the activation's functor.
template <typename F>
void with_activation(Activation activation, F f) {
  switch (activation) {
    case Activation::gelu_new: return f(GeluNew{});
    case Activation::relu2: return f(Relu2{});
  }
}

}  // namespace phi1::cuda
