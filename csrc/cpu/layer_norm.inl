// LayerNorm. A row stays in the L1 cache between the passes over it, so memory sees it once.

template <typename T>
void layer_norm_forward_typed(const LayerNormArgs& args, int threads) {
  const T *weight = static_cast<const T*>(args.weight), *bias = static_cast<const T*>(args.bias);
  const int64_t hidden = args.hidden;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < args.rows; ++row) {
    const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
    T* y = static_cast<T*>(args.y) + row * hidden;
    vfloat sum = {}, squares = {};
    for_lanes(hidden, [&](int64_t i, auto n) { sum += vload(x + i, n); });
    const float mean = sum_lanes(sum) / float(hidden);
    for_lanes(hidden, [&](int64_t i, auto n) {
      vfloat d = vload(x + i, n) - mean;
      if constexpr (std::is_same_v<decltype(n), int>) d = keep_lanes((1u << n) - 1, d);
      squares = fma(d, d, squares);
    });
    const float factor = 1.0f / __builtin_sqrtf(sum_lanes(squares) / float(hidden) + args.eps);
    for_lanes(hidden, [&](int64_t i, auto n) {
      const vfloat normed = (vload(x + i, n) - mean) * factor;
      vstore(y + i, fma(normed, vload(weight + i, n), vload(bias + i, n)), n);
    });
    args.stats[2 * row] = mean;
    args.stats[2 * row + 1] = factor;
  }
}

// Gradient of x: with n = (x - mean) factor and d = grad_y weight, factor (d - mean(d) - n mean(d n)).
template <typename T>
void layer_norm_backward_typed(const LayerNormArgs& args, int threads) {
  const T* weight = static_cast<const T*>(args.weight);
  const int64_t hidden = args.hidden;
  ColumnSums sums(args.rows, 2 * hidden);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < sums.chunks; ++chunk) {
      float *weight_sums = sums.chunk(chunk), *bias_sums = weight_sums + hidden;
      for (int64_t row = chunk * kSumRows; row < smaller((chunk + 1) * kSumRows, args.rows); ++row) {
        const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
        const T* grad = static_cast<const T*>(args.grad_y) + row * hidden;
        const T* residual = args.residual ? static_cast<const T*>(args.residual) + row * hidden : nullptr;
        T* to = static_cast<T*>(args.y) + row * hidden;
        const float mean = args.stats[2 * row], factor = args.stats[2 * row + 1];
        vfloat sum = {}, sum_n = {};
        for_lanes(hidden, [&](int64_t i, auto n) {
          const vfloat g = vload(grad + i, n), d = g * vload(weight + i, n), normed = (vload(x + i, n) - mean) * factor;
          sum += d;
          sum_n = fma(d, normed, sum_n);
          add_to(weight_sums + i, g * normed, n);
          add_to(bias_sums + i, g, n);
        });
        const float mean_d = sum_lanes(sum) / float(hidden), mean_dn = sum_lanes(sum_n) / float(hidden);
        for_lanes(hidden, [&](int64_t i, auto n) {
          const vfloat normed = (vload(x + i, n) - mean) * factor;
          vfloat d = (vload(grad + i, n) * vload(weight + i, n) - mean_d - normed * mean_dn) * factor;
          if (residual) d += vload(residual + i, n);
          vstore(to + i, d, n);
        });
      }
    }
#pragma omp for schedule(static)
    for (int which = 0; which < 2; ++which)
      sums.total(which * hidden, hidden, static_cast<T*>(which ? args.grad_bias : args.grad_weight));
  }
}

void layer_norm_forward(const LayerNormArgs& args, int threads) {
  with_type(args.dtype, [&](auto zero) { layer_norm_forward_typed<decltype(zero)>(args, threads); });
}

void layer_norm_backward(const LayerNormArgs& args, int threads) {
  with_type(args.dtype, [&](auto zero) { layer_norm_backward_typed<decltype(zero)>(args, threads); });
}
