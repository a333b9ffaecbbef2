// One pass over q and k: each head's first 2 * half elements are read, turned and written, the rest copied.
// Work is split over tokens, so the result does not depend on the number of threads.

template <typename T>
void rotate_head(const T* in, T* out, const float* cos, const float* sin, float sign, int64_t half, int64_t dim) {
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const float a = load(in[i]), b = load(in[i + half]), s = sign * sin[i];
    store(out[i], a * cos[i] - b * s);
    store(out[i + half], b * cos[i] + a * s);
  }
  if (in != out) std::memcpy(out + 2 * half, in + 2 * half, size_t(dim - 2 * half) * sizeof(T));
}

template <typename T>
void rotary_typed(const RotaryArgs& args, int threads) {
  const float sign = args.inverse ? -1.0f : 1.0f;
  const int64_t tokens = args.batch * args.seq;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t token = 0; token < tokens; ++token) {
    const int64_t b = token / args.seq, t = token % args.seq;
    const int64_t row = args.position ? args.position[b * args.position_batch_stride + t] : t;
    const float *cos = args.cos + row * args.half, *sin = args.sin + row * args.half;
    for (int which = 0; which < 2; ++which) {
      const HeadsTensor &from = args.in[which], &to = args.out[which];
      const T* in = static_cast<const T*>(from.data) + b * from.batch_stride + t * from.seq_stride;
      T* out = static_cast<T*>(to.data) + b * to.batch_stride + t * to.seq_stride;
      for (int64_t h = 0; h < args.heads[which]; ++h)
        rotate_head(in + h * from.head_stride, out + h * to.head_stride, cos, sin, sign, args.half, args.head_dim);
    }
  }
}

void rotary(const RotaryArgs& args, int threads) {
  switch (args.dtype) {
    case DType::f32: return rotary_typed<float>(args, threads);
    case DType::bf16: return rotary_typed<bf16>(args, threads);
    case DType::f16: return rotary_typed<f16>(args, threads);
  }
}
