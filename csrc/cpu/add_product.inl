// Float32 sums of 16-bit products whose upper halves stand in the result's own memory, raw bits for bf16 and fp16
// alike.

// The 32 bits whose halves stand at high and low.
template <class N>
inline vuint join(const uint16_t* high, const uint16_t* low, N n) {
  // A bf16 is the upper half of a float.
  const auto upper = [&](const uint16_t* p) { return (vuint)vload(reinterpret_cast<const bf16*>(p), n); };
  return upper(high) | upper(low) >> 16;
}

template <class N>
inline void split(vuint bits, uint16_t* high, uint16_t* low, N n) {
  const vhalf upper = __builtin_convertvector(bits >> 16, vhalf), lower = __builtin_convertvector(bits, vhalf);
  std::memcpy(high, &upper, size_t(n) * sizeof *high);
  std::memcpy(low, &lower, size_t(n) * sizeof *low);
}

template <typename T>
void add_product_typed(const AddProductArgs& args, int threads) {
  constexpr int64_t kBlock = 4096;  // 24 KiB of the three
  const T* product = static_cast<const T*>(args.product);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t begin = 0; begin < args.count; begin += kBlock) {
    for_lanes(smaller(kBlock, args.count - begin), [&](int64_t offset, auto n) {
      const int64_t i = begin + offset;
      vfloat sum = vload(product + i, n);
      if (!args.first) sum += (vfloat)join(args.high + i, args.low + i, n);
      if (args.last) {
        vstore(reinterpret_cast<T*>(args.high + i), sum, n);
      } else {
        split((vuint)sum, args.high + i, args.low + i, n);
      }
    });
  }
}

void add_product(const AddProductArgs& args, int threads) {
  if (args.dtype == DType::bf16) return add_product_typed<bf16>(args, threads);
  if (args.dtype == DType::f16) return add_product_typed<f16>(args, threads);
  throw std::invalid_argument("add_product: a float32 product needs no halves");
}
