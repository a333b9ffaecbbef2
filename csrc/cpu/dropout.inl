// The residual mask of kernels.reference.residual_keep: plane 0. One draw for each lane of consecutive Philox counters,
// so kLanes * 8 columns at a time; rows are split over the threads.

// Calls f(column, kept) for every column of a row.
template <class F>
inline void residual_row(int64_t row, int64_t columns, uint32_t threshold, uint64_t seed, F&& f) {
  constexpr uint32_t offset = 1;  // reference.RESIDUAL_OFFSET
  static constexpr int column_of_slot[8] = {0, 1, 8, 9, 16, 17, 24, 25};
  for (int64_t start = 0; start < columns; start += kLanes * 8) {
    vuint words[4] = {(vuint)lane_index() + uint32_t(start / 8), splat_bits(uint32_t(row)), vuint{},
                      splat_bits(offset)};
    philox(words, seed);
    for (int slot = 0; slot < 8; ++slot) {
      const vuint word = words[slot / 2];
      const uint32_t bits = at_least(slot % 2 ? word >> 16 : word & 0xffffu, threshold);
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t column = start + lane / 4 * 32 + column_of_slot[slot] + lane % 4 * 2;
        if (column < columns) f(column, bits >> lane & 1);
      }
    }
  }
}

// factor[column]: what dropout multiplies the row's elements with, 0 or the scale.
inline void residual_factors(const ResidualArgs& args, int64_t row, float* factor) {
  const float factors[2] = {0.0f, args.dropout_scale};
  residual_row(row, args.columns, args.dropout_threshold, args.seed,
               [&](int64_t column, uint32_t kept) { factor[column] = factors[kept]; });
}

void residual_keep(uint8_t* keep, int64_t rows, int64_t columns, uint32_t threshold, uint64_t seed, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < rows; ++row)
    residual_row(row, columns, threshold, seed,
                 [&](int64_t column, uint32_t kept) { keep[row * columns + column] = uint8_t(kept); });
}
