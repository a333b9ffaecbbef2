// One-pass kernels over rows of numbers: what LayerNorm, the block's elementwise parts and the loss share.

// Calls f(i, n) for each vector of a row: n is a compile-time kLanes but for the last one, which may be shorter.
template <class F>
__attribute__((always_inline)) inline void for_lanes(int64_t count, F&& f) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) f(i, std::integral_constant<int, kLanes>());
  if (i < count) f(i, int(count - i));
}

inline vfloat vload(const float* p, std::integral_constant<int, kLanes>) { return vload(p); }
inline vfloat vload(const bf16* p, std::integral_constant<int, kLanes>) { return vload(p); }
inline vfloat vload(const f16* p, std::integral_constant<int, kLanes>) { return vload(p); }

// The first n lanes from memory, zeros in the others.
template <typename T>
inline vfloat vload(const T* p, int n) {
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, size_t(n) * sizeof(T));
  return vload(lanes);
}

template <typename T>
inline void vstore(T* p, vfloat v, std::integral_constant<int, kLanes>) {
  vstore(p, v);
}

template <typename T>
inline void vstore(T* p, vfloat v, int n) {
  T lanes[kLanes];
  vstore(lanes, v);
  std::memcpy(p, lanes, size_t(n) * sizeof(T));
}

// The lanes' sum, in an order that does not depend on the compiler.
inline float sum_lanes(vfloat v) {
  float x[kLanes];
  vstore(x, v);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
}

// Calls f(zero of the element type).
template <class F>
void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: return f(float());
    case DType::bf16: return f(bf16());
    case DType::f16: return f(f16());
  }
}

// Sums over rows are made in chunks of this many rows, and the chunks added up in order: the result does not depend on
// the number of threads. 64 rows of hidden 2,048 in bf16 are 256 KiB, and their sums 8 KiB stay in L1.
constexpr int64_t kSumRows = 64;

struct ColumnSums {
  int64_t chunks, columns;
  Workspace memory;
  ColumnSums(int64_t rows, int64_t columns)
      : chunks((rows + kSumRows - 1) / kSumRows), columns(columns), memory(size_t(chunks * columns) * 4 + 64) {}

  // The sums of one chunk, zero at first.
  float* chunk(int64_t i) {
    float* sums = reinterpret_cast<float*>(memory.data) + i * columns;
    std::memset(sums, 0, size_t(columns) * 4);
    return sums;
  }

  // to[c] = sum over the chunks of column first + c, c < count.
  template <typename T>
  void total(int64_t first, int64_t count, T* to) const {
    const float* sums = reinterpret_cast<const float*>(memory.data) + first;
    for_lanes(count, [&](int64_t c, auto n) {
      vfloat total = {};
      for (int64_t i = 0; i < chunks; ++i) total += vload(sums + i * columns + c, n);
      vstore(to + c, total, n);
    });
  }
};

template <class N>
inline void add_to(float* sums, vfloat x, N n) {
  vstore(sums, vload(sums, n) + x, n);
}
