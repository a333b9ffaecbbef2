// The MLP's activations, each a value and its slope: `Activation` of arguments.h, kernels/reference.py's ACTIVATIONS.

struct Activated {
  vfloat value, slope;
};

// GELU, tanh approximation (arXiv 1606.08415): y sigmoid(2 c (y + 0.044715 y^3)), c = sqrt(2 / pi).
struct GeluNew {
  template <bool kSlope>
  static Activated of(vfloat y) {
    constexpr float c = 0.797884560802865f, cubic = 0.044715f;
    // Beyond 9.9 the sigmoid is 1, or less than 2^-122: there it and the slope are taken of 9.9, where exp2's argument
    // is 122.7 and no square runs over. NaN stays.
    const vfloat above = vmax(splat(-9.9f), y), t = vmin(splat(9.9f), above), square = t * t;
    const vfloat x = t * fma(square, splat(-2 * c * cubic * kLog2e), splat(-2 * c * kLog2e));
    const vfloat sigmoid = 1.0f / (1.0f + exp2(x)), value = above * sigmoid;
    if constexpr (!kSlope) return {value, value};
    const vfloat inner = fma(square, splat(6 * c * cubic), splat(2 * c));
    return {value, fma(value * (1.0f - sigmoid), inner, sigmoid)};
  }
};

// The square of ReLU (Primer, arXiv 2109.08668).
struct Relu2 {
  template <bool kSlope>
  static Activated of(vfloat y) {
    const vfloat positive = vmax(splat(0.0f), y);
    return {positive * positive, positive + positive};
  }
};

// Calls f with the activation's functor.
template <class F>
void with_activation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::gelu_new: return f(GeluNew());
    case Activation::relu2: return f(Relu2());
  }
}
