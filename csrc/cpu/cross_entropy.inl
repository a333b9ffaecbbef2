// Cross-entropy over a chunk of logits that the product W h^T has just written, a column of the vocabulary after the
// other, and its gradient in their place. The rows of the chunk are lanes.
//
// First the log-sum-exp: a thread takes a strip of columns, for which it keeps each row's maximum and sum so far, and
// the strips' are put together. Then, with gradients, strips again: softmax - one-hot, and its sum over the rows for
// the bias. What is added to what does not depend on the number of threads.

constexpr int64_t kStrip = 256;
// Logits that are read twice, for the maximum and for the sum: 32 KiB of float32.
constexpr int64_t kTileColumns = 32, kTileRows = 256;

// A number for each row and what pads them to whole vectors.
struct RowNumbers {
  float *top, *total;  // softmax(x) = exp(x - top) / total
};

// exp(x - top) = 2^(log2e (x - top)): with x - top first, large logits lose nothing. None is above top. For logits of 8
// or 11 bits 2^x has 18.
template <typename T>
inline vfloat exp_below(vfloat x, vfloat top) {
  return exp2<sizeof(T) == 2>((x - top) * splat(kLog2e));
}

// The columns [first, last). Of no logits yet: the least float and 0, so that those of -inf add nothing and never meet
// -inf - -inf.
template <typename T>
void strip_softmax(const CrossEntropyArgs& args, int64_t first, int64_t last, RowNumbers strip) {
  const T *logits = static_cast<const T*>(args.logits), *bias = static_cast<const T*>(args.bias);
  for (int64_t row = 0; row < args.rows; row += kTileRows) {
    const int64_t count = smaller(kTileRows, args.rows - row);
    float *top = strip.top + row, *total = strip.total + row;
    for (int64_t i = 0; i < count; i += kLanes) vstore(top + i, splat(-3.40282347e38f)), vstore(total + i, vfloat{});
    for (int64_t column = first; column < last; column += kTileColumns) {
      const int64_t columns = smaller(kTileColumns, last - column);
      float b[kTileColumns];
      for (int64_t c = 0; c < columns; ++c) b[c] = load(bias[column + c]);
      for_lanes(count, [&](int64_t i, auto n) {
        const auto biased = [&](int64_t c) {
          return vload(logits + (column + c) * args.rows + row + i, n) + splat(b[c]);
        };
        const vfloat before = vload(top + i);
        vfloat highest = before;
        for (int64_t c = 0; c < columns; ++c) highest = vmax(biased(c), highest);
        vfloat sum = vload(total + i) * exp_below<T>(before, highest);
        for (int64_t c = 0; c < columns; ++c) sum += exp_below<T>(biased(c), highest);
        vstore(top + i, highest);
        vstore(total + i, sum);
      });
    }
  }
}

// What the rows' gradients are made with.
struct RowGradients {
  float *top, *scale;  // softmax with z-loss: exp(x - top) scale
  float* logit;        // of the target
  int32_t* keep;       // all bits, or none where the target is ignored, and in the padding
};

// The strips' numbers of kLanes rows from `row` on put together, and the rows' losses.
template <typename T>
void finish_rows(const CrossEntropyArgs& args, int64_t row, const RowNumbers& strips, int64_t count, int64_t padded,
                 const RowGradients& to) {
  const T *logits = static_cast<const T*>(args.logits), *bias = static_cast<const T*>(args.bias);
  vfloat highest = vload(strips.top + row), sum = {};
  for (int64_t s = 1; s < count; ++s) highest = vmax(vload(strips.top + s * padded + row), highest);
  for (int64_t s = 0; s < count; ++s) {
    const int64_t at = s * padded + row;
    sum += vload(strips.total + at) * exp_below<T>(vload(strips.top + at), highest);
  }
  vstore(to.top + row, highest);
  for (int64_t i = row; i < row + kLanes; ++i) {
    to.scale[i] = to.logit[i] = 0.0f, to.keep[i] = 0;
    if (i >= args.rows) continue;
    const int64_t target = args.targets[i];
    args.loss[i] = 0.0f;
    if (target == args.ignore_index) continue;
    const float total = sum[i - row], log_total = __builtin_logf(total), lse = to.top[i] + log_total;
    to.logit[i] = load(logits[target * args.rows + i]) + load(bias[target]);
    to.scale[i] = (1.0f + 2.0f * args.z_loss * lse) / total;
    to.keep[i] = -1;
    args.loss[i] = log_total + (to.top[i] - to.logit[i]) + args.z_loss * lse * lse;
  }
}

// Of the columns [first, last).
template <typename T>
void strip_gradient(const CrossEntropyArgs& args, int64_t first, int64_t last, const RowGradients& rows) {
  T* logits = static_cast<T*>(args.logits);
  const T* bias = static_cast<const T*>(args.bias);
  for (int64_t column = first; column < last; ++column) {
    T* x = logits + column * args.rows;
    const vfloat b = splat(load(bias[column]));
    vfloat sum = {};
    for_lanes(args.rows, [&](int64_t i, auto n) {
      vint keep;
      std::memcpy(&keep, rows.keep + i, sizeof keep);
      const vfloat p = exp_below<T>(vload(x + i, n) + b, vload(rows.top + i)) * vload(rows.scale + i);
      const vfloat kept = (vfloat)((vint)p & keep);
      vstore(x + i, kept, n);
      sum += kept;
    });
    args.bias_sums[column] += sum_lanes(sum);
  }
  for (int64_t row = 0; row < args.rows; ++row) {
    const int64_t target = args.targets[row];
    if (!rows.keep[row] || target < first || target >= last) continue;
    store(logits[target * args.rows + row], __builtin_expf(rows.logit[row] - rows.top[row]) * rows.scale[row] - 1.0f);
    args.bias_sums[target] -= 1.0f;
  }
}

template <typename T>
void cross_entropy_typed(const CrossEntropyArgs& args, int threads) {
  const int64_t padded = round_up(args.rows, kLanes), strips = (args.columns + kStrip - 1) / kStrip;
  Workspace memory(size_t(2 * strips + 4) * size_t(padded) * sizeof(float));
  float* numbers = reinterpret_cast<float*>(memory.data);
  const RowNumbers all = {numbers, numbers + strips * padded};
  float* rest = numbers + 2 * strips * padded;
  const RowGradients rows = {rest, rest + padded, rest + 2 * padded, reinterpret_cast<int32_t*>(rest + 3 * padded)};
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t s = 0; s < strips; ++s)
      strip_softmax<T>(args, s * kStrip, smaller((s + 1) * kStrip, args.columns),
                       {all.top + s * padded, all.total + s * padded});
#pragma omp for schedule(static)
    for (int64_t row = 0; row < padded; row += kLanes) finish_rows<T>(args, row, all, strips, padded, rows);
    if (args.bias_sums) {
#pragma omp for schedule(static)
      for (int64_t s = 0; s < strips; ++s)
        strip_gradient<T>(args, s * kStrip, smaller((s + 1) * kStrip, args.columns), rows);
    }
  }
}

void cross_entropy(const CrossEntropyArgs& args, int threads) {
  with_type(args.dtype, [&](auto zero) { cross_entropy_typed<decltype(zero)>(args, threads); });
}
