// The parallel block's elementwise parts, one pass over memory each: after the product with W_in (bias, rotary of q and
// k, the activation of u) and after the product with W_out (bias, dropout, residual).

// Turns x + bias by the angles of cos and sin, or with sign -1 back; the rest of the head gets its bias.
template <typename T>
inline void turn_head(T* x, const T* bias, const float* cos, const float* sin, float sign, int64_t half, int64_t dim) {
  for_lanes(half, [&](int64_t i, auto n) {
    vfloat a = vload(x + i, n), b = vload(x + half + i, n);
    if (bias) a += vload(bias + i, n), b += vload(bias + half + i, n);
    const vfloat c = vload(cos + i, n), s = sign * vload(sin + i, n);
    vstore(x + i, a * c - b * s, n);
    vstore(x + half + i, b * c + a * s, n);
  });
  if (bias)
    for_lanes(dim - 2 * half, [&](int64_t i, auto n) {
      const int64_t at = 2 * half + i;
      vstore(x + at, vload(x + at, n) + vload(bias + at, n), n);
    });
}

inline int64_t table_row(const AfterInArgs& args, int64_t token) {
  const int64_t b = token / args.seq, t = token % args.seq;
  return (args.position ? args.position[b * args.position_batch_stride + t] : t) * args.half;
}

template <typename T, class A>
void after_in_typed(const AfterInArgs& args, int threads) {
  const T* bias = static_cast<const T*>(args.bias);
  const int64_t turned = args.turned_heads * args.head_dim, first_u = args.width - args.inner;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t token = 0; token < args.batch * args.seq; ++token) {
    T* z = static_cast<T*>(args.z) + token * args.width;
    const float *cos = args.cos + table_row(args, token), *sin = args.sin + table_row(args, token);
    for (int64_t h = 0; h < turned; h += args.head_dim)
      turn_head(z + h, bias + h, cos, sin, 1.0f, args.half, args.head_dim);
    for_lanes(first_u - turned, [&](int64_t i, auto n) {
      vstore(z + turned + i, vload(z + turned + i, n) + vload(bias + turned + i, n), n);
    });
    T* activated = static_cast<T*>(args.activated) + token * args.activated_stride;
    for_lanes(args.inner, [&](int64_t i, auto n) {
      const Activated y = A::template of<false>(vload(z + first_u + i, n) + vload(bias + first_u + i, n));
      vstore(activated + i, y.value, n);
    });
  }
}

template <typename T, class A>
void after_in_backward_typed(const AfterInArgs& args, int threads) {
  const T* bias = static_cast<const T*>(args.bias);
  const int64_t turned = args.turned_heads * args.head_dim, first_u = args.width - args.inner;
  const int64_t tokens = args.batch * args.seq;
  ColumnSums sums(tokens, args.width);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < sums.chunks; ++chunk) {
      float* column = sums.chunk(chunk);
      for (int64_t token = chunk * kSumRows; token < smaller((chunk + 1) * kSumRows, tokens); ++token) {
        const T* z = static_cast<const T*>(args.z) + token * args.width;
        T* grad = static_cast<T*>(args.grad_z) + token * args.width;
        const float *cos = args.cos + table_row(args, token), *sin = args.sin + table_row(args, token);
        for (int64_t h = 0; h < turned; h += args.head_dim)
          turn_head<T>(grad + h, nullptr, cos, sin, -1.0f, args.half, args.head_dim);
        for_lanes(first_u, [&](int64_t i, auto n) { add_to(column + i, vload(grad + i, n), n); });
        T* activated = static_cast<T*>(args.activated) + token * args.activated_stride;
        for_lanes(args.inner, [&](int64_t i, auto n) {
          const Activated y = A::template of<true>(vload(z + first_u + i, n) + vload(bias + first_u + i, n));
          const vfloat d = vload(activated + i, n) * y.slope;
          vstore(grad + first_u + i, d, n);
          add_to(column + first_u + i, d, n);
          vstore(activated + i, y.value, n);
        });
      }
    }
#pragma omp for schedule(static)
    for (int64_t first = 0; first < args.width; first += 256)
      sums.total(first, smaller(256, args.width - first), static_cast<T*>(args.grad_bias) + first);
  }
}

template <typename T, bool kDropout>
void residual_typed(const ResidualArgs& args, int threads) {
  const T* bias = static_cast<const T*>(args.bias);
  Workspace memory(kDropout ? size_t(threads) * ResidualFactors::bytes(args) : 1);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    ResidualFactors factors(args,
                            memory.data + (kDropout ? size_t(omp_get_thread_num()) * ResidualFactors::bytes(args) : 0));
#pragma omp for schedule(static)
    for (int64_t row = 0; row < args.rows; ++row) {
      const T* x = static_cast<const T*>(args.x) + row * args.columns;
      T* h = static_cast<T*>(args.h) + row * args.columns;
      const float* factor = kDropout ? factors.row(row) : nullptr;
      for_lanes(args.columns, [&](int64_t i, auto n) {
        vfloat y = vload(h + i, n) + vload(bias + i, n);
        if constexpr (kDropout) y *= vload(factor + i, n);
        vstore(h + i, vload(x + i, n) + y, n);
      });
    }
  }
}

template <typename T, bool kDropout>
void residual_backward_typed(const ResidualArgs& args, int threads) {
  ColumnSums sums(args.rows, args.columns);
  Workspace memory(kDropout ? size_t(threads) * ResidualFactors::bytes(args) : 1);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    ResidualFactors factors(args,
                            memory.data + (kDropout ? size_t(omp_get_thread_num()) * ResidualFactors::bytes(args) : 0));
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < sums.chunks; ++chunk) {
      float* column = sums.chunk(chunk);
      for (int64_t row = chunk * kSumRows; row < smaller((chunk + 1) * kSumRows, args.rows); ++row) {
        const T* grad = static_cast<const T*>(args.grad_y) + row * args.columns;
        const float* factor = kDropout ? factors.row(row) : nullptr;
        for_lanes(args.columns, [&](int64_t i, auto n) {
          vfloat d = vload(grad + i, n);
          if constexpr (kDropout) {
            d *= vload(factor + i, n);
            vstore(static_cast<T*>(args.h) + row * args.columns + i, d, n);
          }
          add_to(column + i, d, n);
        });
      }
    }
#pragma omp for schedule(static)
    for (int64_t first = 0; first < args.columns; first += 256)
      sums.total(first, smaller(256, args.columns - first), static_cast<T*>(args.grad_bias) + first);
  }
}

// Calls f(zero of the element type, the activation's functor).
template <class F>
void with_type_and_activation(const AfterInArgs& args, F&& f) {
  with_type(args.dtype, [&](auto zero) { with_activation(args.activation, [&](auto functor) { f(zero, functor); }); });
}

void after_in(const AfterInArgs& args, int threads) {
  with_type_and_activation(
      args, [&](auto zero, auto functor) { after_in_typed<decltype(zero), decltype(functor)>(args, threads); });
}

void after_in_backward(const AfterInArgs& args, int threads) {
  with_type_and_activation(args, [&](auto zero, auto functor) {
    after_in_backward_typed<decltype(zero), decltype(functor)>(args, threads);
  });
}

void residual(const ResidualArgs& args, int threads) {
  with_type(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    args.dropout_threshold > 0 ? residual_typed<T, true>(args, threads) : residual_typed<T, false>(args, threads);
  });
}

void residual_backward(const ResidualArgs& args, int threads) {
  with_type(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    args.dropout_threshold > 0 ? residual_backward_typed<T, true>(args, threads)
                               : residual_backward_typed<T, false>(args, threads);
  });
}
