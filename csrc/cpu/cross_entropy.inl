// Cross-entropy over a chunk of logits that the product has just written, and its gradient in their place.
//
// First a pass over the rows for the log-sum-exp, a strip of a row at a time with the maximum so far, one exponential
// an element. Then, with gradients, a pass over strips of columns, every row in each: softmax - one-hot, and the column
// sums for the bias, added up row after row whatever the number of threads.

constexpr int64_t kStrip = 1024;  // 4 KiB of sums, in L1

// softmax(x) = 2^(log2e (x - top)) / total: with x - top first, large logits lose nothing. Of no logits yet: the least
// float and 0, so that those of -inf add nothing and never meet -inf - -inf.
struct Softmax {
  float top = -3.40282347e38f, total = 0.0f;
  float lse() const { return top + __builtin_logf(total); }
  // What the exponentials are multiplied with in the gradient.
  float scale(float z_loss) const { return (1.0f + 2.0f * z_loss * lse()) / total; }
};

template <class N>
inline vfloat exp_of(vfloat x, vfloat top, N n) {
  const vfloat e = exp2((x - top) * splat(kLog2e));  // <= 0: no logit is above top
  if constexpr (std::is_same_v<N, int>) return keep_lanes((1u << n) - 1, e);
  return e;
}

template <typename T>
Softmax row_softmax(const T* logits, const T* bias, int64_t columns) {
  Softmax row;
  for (int64_t first = 0; first < columns; first += kStrip) {
    const int64_t count = smaller(kStrip, columns - first);
    const auto biased = [&](int64_t i, auto n) { return vload(logits + first + i, n) + vload(bias + first + i, n); };
    vfloat highest = splat(-__builtin_inff()), sum = {};
    for_lanes(count, [&](int64_t i, auto n) {
      const vfloat x = biased(i, n);
      if constexpr (std::is_same_v<decltype(n), int>) {
        for (int lane = 0; lane < n; ++lane) highest[lane] = x[lane] > highest[lane] ? x[lane] : highest[lane];
      } else {
        highest = vmax(x, highest);
      }
    });
    const float above = max_lanes(highest);
    if (above > row.top) {
      if (row.total > 0) row.total *= __builtin_expf(row.top - above);
      row.top = above;
    }
    for_lanes(count, [&](int64_t i, auto n) { sum += exp_of(biased(i, n), splat(row.top), n); });
    row.total += sum_lanes(sum);
  }
  return row;
}

template <typename T>
void cross_entropy_typed(const CrossEntropyArgs& args, int threads) {
  T* logits = static_cast<T*>(args.logits);
  const T* bias = static_cast<const T*>(args.bias);
  const int64_t columns = args.columns;
  Workspace memory(size_t(args.rows) * sizeof(Softmax));
  Softmax* softmax = reinterpret_cast<Softmax*>(memory.data);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < args.rows; ++row) {
      const int64_t target = args.targets[row];
      args.loss[row] = 0.0f;
      if (target == args.ignore_index) continue;
      softmax[row] = row_softmax(logits + row * columns, bias, columns);
      const float logit = load(logits[row * columns + target]) + load(bias[target]);
      const float lse = softmax[row].lse();
      args.loss[row] = __builtin_logf(softmax[row].total) + (softmax[row].top - logit) + args.z_loss * lse * lse;
    }
    if (args.bias_sums) {
#pragma omp for schedule(static)
      for (int64_t first = 0; first < columns; first += kStrip) {
        const int64_t count = smaller(kStrip, columns - first);
        for (int64_t row = 0; row < args.rows; ++row) {
          T* x = logits + row * columns + first;
          const int64_t target = args.targets[row];
          if (target == args.ignore_index) {
            std::memset(x, 0, size_t(count) * sizeof(T));
            continue;
          }
          const vfloat top = splat(softmax[row].top), scale = splat(softmax[row].scale(args.z_loss));
          const bool here = target >= first && target < first + count;
          float at_target = 0.0f;
          if (here) at_target = load(x[target - first]) + load(bias[target]);
          for_lanes(count, [&](int64_t i, auto n) {
            const vfloat p = exp_of(vload(x + i, n) + vload(bias + first + i, n), top, n) * scale;
            vstore(x + i, p, n);
            add_to(args.bias_sums + first + i, p, n);
          });
          if (here) {
            store(x[target - first],
                  __builtin_expf(at_target - softmax[row].top) * softmax[row].scale(args.z_loss) - 1.0f);
            args.bias_sums[target] -= 1.0f;
          }
        }
      }
    }
  }
}

void cross_entropy(const CrossEntropyArgs& args, int threads) {
  with_type(args.dtype, [&](auto zero) { cross_entropy_typed<decltype(zero)>(args, threads); });
}
