// The residual mask of kernels.reference.residual_keep: one draw for each lane of consecutive Philox counters, so
// 8 kLanes columns of a pair of rows at a time.

// Calls f(half, column, kept) for every column of rows 2 pair and (half 1) 2 pair + 1.
template <class F>
inline void residual_rows(int64_t pair, int64_t columns, uint32_t threshold, uint64_t seed, F&& f) {
  constexpr uint32_t offset = 1;  // reference.RESIDUAL_OFFSET
  for (int64_t start = 0; start < columns; start += 8 * kLanes) {
    vuint words[4] = {(vuint)lane_index() + uint32_t(start / 8), splat_bits(uint32_t(pair)), vuint{},
                      splat_bits(offset)};
    philox(words, seed);
    const int64_t count = smaller(8 * kLanes, columns - start);
    for (int half = 0; half < 2; ++half) {
      uint32_t in_order[2 * kLanes];
      for (int lane = 0; lane < kLanes; ++lane)
        in_order[2 * lane] = words[2 * half][lane], in_order[2 * lane + 1] = words[2 * half + 1][lane];
      uint8_t bytes[8 * kLanes];
      for (int i = 0; i < 8 * kLanes; ++i) bytes[i] = uint8_t(in_order[i / 4] >> i % 4 * 8);
      for (int64_t i = 0; i < count; ++i) f(half, start + i, bytes[i] >= threshold);
    }
  }
}

// What dropout multiplies the elements of a row with, 0 or the scale. A pair of rows is drawn at a time: for a thread
// that asks for one row after another.
class ResidualFactors {
 public:
  // Bytes of a thread's memory.
  static size_t bytes(const ResidualArgs& args) { return size_t(2 * args.columns) * sizeof(float); }

  ResidualFactors(const ResidualArgs& args, char* memory) : args_(args), factor_(reinterpret_cast<float*>(memory)) {}

  const float* row(int64_t row) {
    if (row / 2 != pair_) {
      pair_ = row / 2;
      residual_rows(pair_, args_.columns, args_.dropout_threshold, args_.seed,
                    [&](int half, int64_t column, bool kept) {
                      factor_[half * args_.columns + column] = kept ? args_.dropout_scale : 0.0f;
                    });
    }
    return factor_ + row % 2 * args_.columns;
  }

 private:
  const ResidualArgs& args_;
  float* factor_;
  int64_t pair_ = -1;
};

void residual_keep(uint8_t* keep, int64_t rows, int64_t columns, uint32_t threshold, uint64_t seed, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t pair = 0; pair < (rows + 1) / 2; ++pair)
    residual_rows(pair, columns, threshold, seed, [&](int half, int64_t column, bool kept) {
      if (2 * pair + half < rows) keep[(2 * pair + half) * columns + column] = uint8_t(kept);
    });
}
