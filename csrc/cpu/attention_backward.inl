// Flash attention, backward (FlashAttention-2, arXiv 2307.08691, algorithm 2), five products per tile:
//
//   S^T = K Q^T, P^T = exp(scale S^T - lse), dP^T = V dO^T, dS^T = P^T (dP^T - delta), delta = rowsum(dO O)
//   dV += P^T dO, dK += dS^T Q, dQ^T += K^T dS^T
//
// A block of keys of one (problem, key/value head) is one piece of work: its dK and dV stay in a thread's cache while
// the queries of all its query heads pass. Blocks of one head may be under way in several threads; each adds its part
// of dQ^T to a panel of queries when the block before it has, a panel behind it. So every number is summed in one
// order, and results do not depend on the number of threads.

template <class Dot, int D>
constexpr int kBackwardKeys = Dot::template backward_keys<D>;  // keys per block, a multiple of kGroup
constexpr int kBackwardPanels = 2;                             // panels of queries per pass, a longer sum for dV and dK

// What is kept of a query head while the keys pass: a panel after the other.
template <class Dot, int D>
struct BackwardPanel {
  static constexpr int width = D / Dot::k;
  alignas(64) float q_columns[width * kPanel];     // Q^T: (D / k, queries)
  alignas(64) float grad_columns[width * kPanel];  // dO^T
  alignas(64) float grad_q[D * kPanel];            // dQ^T / scale: (D, queries)
  alignas(64) float lse[kPanel];                   // see lse_to_take_off
  alignas(64) float delta[kPanel];
  alignas(64) int64_t summed;  // the keys below it are in grad_q; through std::atomic_ref
};

// One thread's block of keys.
template <class Dot, int D>
struct BackwardTile {
  static constexpr int width = D / Dot::k, columns = kBackwardPanels * kPanel / Dot::k;
  alignas(64) float k[kBackwardKeys<Dot, D> * width];          // K: (keys, D / k)
  alignas(64) float v[kBackwardKeys<Dot, D> * width];          // V
  alignas(64) float k_columns[kBackwardKeys<Dot, D> * width];  // K^T: (D, keys / k)
  alignas(64) float p[kBackwardKeys<Dot, D> * kPanel];         // P^T of a panel, before dropout
  alignas(64) float dropped[kBackwardKeys<Dot, D> * columns];  // P^T after dropout, as A: (keys, queries / k)
  alignas(64) float ds[kBackwardKeys<Dot, D> * columns];       // dS^T, as A
  alignas(64) float ds_columns[kBackwardKeys<Dot, D> / Dot::k * kPanel];  // dS^T of a panel, as B: (keys / k, queries)
  alignas(64) float grad_k[kBackwardKeys<Dot, D> * D];                    // dK / scale
  alignas(64) float grad_v[kBackwardKeys<Dot, D> * D];                    // dV / dropout_scale
  alignas(64) float rows[kPanel * D];
  alignas(64) float pairs[kBackwardKeys<Dot, D> / Dot::k * D];
  uint32_t keep[kBackwardKeys<Dot, D>][kVecs];
};

// The memory of one (problem, key/value head) with all its query heads, cut for the longest problem.
template <class Dot, int D>
struct BackwardHead {
  BackwardPanel<Dot, D>* panels;  // (group, panels of the longest)
  float *q, *grad;                // Q, dO as B: (group, queries / k, D)

  static size_t bytes(int64_t panels) { return size_t(panels) * (sizeof(BackwardPanel<Dot, D>) + 2 * lanes(1) * 4); }
  static size_t lanes(int64_t panels) { return size_t(panels) * kPanel * (D / Dot::k); }

  // `panel_count`: of all its query heads together.
  BackwardHead(char* data, int64_t panel_count)
      : panels(reinterpret_cast<BackwardPanel<Dot, D>*>(data)),
        q(reinterpret_cast<float*>(panels + panel_count)),
        grad(q + lanes(panel_count)) {}
};

// What P = exp(scale S - lse) takes for lse. +inf, which makes P = 0, for a row without a score above -inf.
// P is known to a factor of e^(the rounding of lse): from 2^24 on that says nothing any more. There lse is lowered by
// more than it and the products have been rounded by, and with P <= 1, as it is in truth, a lone greatest score has
// P = 1 and its gradient.
inline float lse_to_take_off(float lse) {
  if (lse == -__builtin_inff()) return __builtin_inff();
  if (__builtin_fabsf(lse) < 0x1p24f) return lse;
  return lse * (lse > 0 ? 1 - 0x1p-21f : 1 + 0x1p-21f);
}

// Everything of a panel of queries from `first` that the tiles need, and dQ^T = 0. q_lanes, grad_lanes: its rows as B.
template <class Dot, int D>
void backward_prepare(const AttentionArgs& args, const Problem& p, int64_t head, int64_t first,
                      BackwardPanel<Dot, D>& panel, float* q_lanes, float* grad_lanes, float* rows) {
  constexpr int width = D / Dot::k;
  const Rows q = p.rows(args.q, p.first_q, head, args.dtype);
  const Rows grad = p.rows(args.grad_out, p.first_q, head, args.dtype);
  const Rows out = p.rows(args.out, p.first_q, head, args.dtype);
  const float* lse = args.lse + (p.batch * args.heads + head) * args.seqlen_q + p.first_q;
  pack_rows<Dot, D>(q, args.dtype, first, p.seqlen_q, kPanel, rows);
  transpose(rows, width, kPanel, width, panel.q_columns, kPanel);
  pack_rows<Dot, D>(grad, args.dtype, first, p.seqlen_q, kPanel, rows);
  transpose(rows, width, kPanel, width, panel.grad_columns, kPanel);
  pack_pairs<Dot, D>(q, args.dtype, first, p.seqlen_q, kPanel, q_lanes);
  pack_pairs<Dot, D>(grad, args.dtype, first, p.seqlen_q, kPanel, grad_lanes);
  std::memset(panel.grad_q, 0, sizeof panel.grad_q);
  panel.summed = 0;
  for (int64_t i = 0; i < kPanel; ++i) {
    panel.lse[i] = __builtin_inff();
    panel.delta[i] = 0;
    if (first + i < 0) continue;
    panel.lse[i] = lse_to_take_off(lse[first + i]);
    float a[D], b[D];
    read_row(args.dtype, grad.data + (first + i) * grad.stride, a, D);
    read_row(args.dtype, out.data + (first + i) * out.stride, b, D);
    vfloat sum = {};
    for (int d = 0; d < D; d += kLanes) sum = fma(vload(a + d), vload(b + d), sum);
    for (int lane = 0; lane < kLanes; ++lane) panel.delta[i] += sum[lane];
  }
}

// A turn of a loop that waits for another thread.
inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// What one panel makes with the keys from `start`: dropped, ds (columns from `column`) and dQ^T += K^T dS^T. seen: see
// seen_keys, of the panel's vectors; dropped and ds are written where a vector sees the key.
template <class Dot, int D, bool Dropout>
void backward_panel(const AttentionArgs& args, const Problem& p, int64_t plane, int64_t first, int64_t start,
                    BackwardTile<Dot, D>& tile, BackwardPanel<Dot, D>& panel, int column, const int* seen) {
  constexpr int width = D / Dot::k, columns = BackwardTile<Dot, D>::columns;
  const int64_t keys = smaller(kBackwardKeys<Dot, D>, p.seqlen_k - start), offset = p.seqlen_k - p.seqlen_q;
  // Keys below `bare` are seen by every query, from `first` on; by none before query 0, whose P must be no product of
  // a zero with an infinite key.
  const int64_t bare = first < 0 ? 0 : args.causal ? smaller(keys, first + offset + 1 - start) : keys;
  const vfloat scale = splat(args.scale), log2e = splat(kLog2e), dropout_scale = splat(args.dropout_scale);
  const vint lane = lane_index();

  if constexpr (Dropout) dropout_bits(args, plane, first, start, round_up(keys, kGroup), tile.keep);

  auto probability_rows = [&](int r, auto from, auto mask) __attribute__((always_inline)) {
    Block<Dot, kVecs> block;
    block.template clear<from>();
    block.template multiply<width, kPanel, from>(tile.k + r * width, panel.q_columns, width);
    auto& s = block.template vectors<from>();
#pragma GCC unroll 8
    for (int m = 0; m < Dot::rows; ++m) {
      const int64_t key = start + r + m;
      const int64_t blind = larger(0, -first);
      const int limit = int(key >= p.seqlen_k ? kPanel : args.causal ? larger(blind, key - offset - first) : blind);
#pragma GCC unroll 8
      for (int n = from; n < kVecs; ++n) {
        // At most 0, where rounding would make P more than 1.
        const vfloat log_p = vmin(vfloat{}, fma(s[m][n], scale, -vload(panel.lse + n * kLanes)));
        vfloat x = Dot::exp2(log_p * log2e);
        if constexpr (mask) x = lane >= limit - n * kLanes ? x : vfloat{};
        vstore(tile.p + (r + m) * kPanel + n * kLanes, x);
        if constexpr (Dropout) x = keep_lanes(tile.keep[r + m][n], x);
        Dot::store_row(tile.dropped + (r + m) * columns + (column + n * kLanes) / Dot::k, x);
      }
    }
  };
  auto ds_rows = [&](int r, auto from) __attribute__((always_inline)) {
    Block<Dot, kVecs> block;
    block.template clear<from>();
    block.template multiply<width, kPanel, from>(tile.v + r * width, panel.grad_columns, width);
    auto& ds = block.template vectors<from>();
#pragma GCC unroll 8
    for (int n = from; n < kVecs; ++n) {
      const vfloat delta = vload(panel.delta + n * kLanes);
#pragma GCC unroll 8
      for (int m = 0; m < Dot::rows; m += Dot::k) {
        vfloat x[Dot::k];
#pragma GCC unroll 2
        for (int i = 0; i < Dot::k; ++i) {
          x[i] = ds[m + i][n];
          if constexpr (Dropout) x[i] = keep_lanes(tile.keep[r + m + i][n], x[i]) * dropout_scale;
          x[i] = vload(tile.p + (r + m + i) * kPanel + n * kLanes) * (x[i] - delta);
          Dot::store_row(tile.ds + (r + m + i) * columns + (column + n * kLanes) / Dot::k, x[i]);
        }
        Dot::store_rows(tile.ds_columns + (r + m) / Dot::k * kPanel + n * kLanes, x);
      }
    }
  };
  int r = 0;
  for_vectors([&](auto from) __attribute__((always_inline)) {
    if constexpr (from == 0)
      for (; r < seen[0] && r + Dot::rows <= bare; r += Dot::rows) probability_rows(r, from, std::false_type());
    for (; r < seen[from]; r += Dot::rows) probability_rows(r, from, std::true_type());
  });
  r = 0;
  for_vectors([&](auto from) __attribute__((always_inline)) {
    for (; r < seen[from]; r += Dot::rows) ds_rows(r, from);
  });

  const std::atomic_ref<int64_t> summed(panel.summed);
  // Spins for 25 microseconds, a panel takes 10; a core that is given up may be gone for milliseconds.
  for (int64_t spins = 0; summed.load(std::memory_order_acquire) < start; ++spins)
    spins < 1000 ? pause() : std::this_thread::yield();
  for (int d = 0; d < D; d += Dot::rows) {
    Block<Dot, kVecs> sum;
    float* to = panel.grad_q + d * kPanel;
    sum.template load<kPanel>(to);
    multiply_seen<Dot, kBackwardKeys<Dot, D>>(tile.k_columns + d * (kBackwardKeys<Dot, D> / Dot::k), tile.ds_columns,
                                              seen, sum);
    sum.template store<kPanel>(to);
  }
  summed.store(start + kBackwardKeys<Dot, D>, std::memory_order_release);
}

// to (keys, D) += a (keys, queries / k) b (queries / k, D) over `vectors` vectors of queries, without those at the
// start that see nothing of a row. seen: see seen_keys.
template <class Dot, int D>
void backward_sum(const float* a, const float* b, int rows, const int* seen, int vectors, float* to) {
  constexpr int columns = BackwardTile<Dot, D>::columns, lanes = kLanes / Dot::k;
  constexpr int vecs = D < Dot::sum_vecs * kLanes ? D / kLanes : Dot::sum_vecs;
  static_assert(D % (vecs * kLanes) == 0);
  for (int d = 0; d < D; d += vecs * kLanes)
    for (int r = 0, blind = 0; r < rows; r += Dot::rows) {
      while (blind < vectors && seen[blind] <= r) ++blind;
      Block<Dot, vecs> sum;
      sum.template load<D>(to + r * D + d);
      sum.template multiply<columns, D>(a + r * columns + blind * lanes, b + blind * lanes * D + d,
                                        (vectors - blind) * lanes);
      sum.template store<D>(to + r * D + d);
    }
}

// Writes rows first .. first + count of `to`: `rows` (count, D) times factor.
template <int D>
void write_rows(const Rows& to, DType dtype, int64_t first, int64_t count, float* rows, float factor) {
  for (int64_t i = 0; i < count; ++i) {
    for (int d = 0; d < D; ++d) rows[i * D + d] *= factor;
    write_row(dtype, to.data + (first + i) * to.stride, rows + i * D, D);
  }
}

// dK and dV of the block of keys from `start`, and its part of dQ^T.
template <class Dot, int D, bool Dropout>
void backward_keys(const AttentionArgs& args, int64_t index, int64_t kv_head, int64_t start,
                   const BackwardHead<Dot, D>& shared, BackwardTile<Dot, D>& tile) {
  constexpr int width = D / Dot::k;
  const Problem p = problem(args, index);
  const int64_t group = args.heads / args.kv_heads, offset = p.seqlen_k - p.seqlen_q;
  const int64_t panels = query_panels(p), keys = smaller(kBackwardKeys<Dot, D>, p.seqlen_k - start);
  const int rows = int(round_up(keys, Dot::rows));

  const Rows k = p.rows(args.k, p.first_k, kv_head, args.dtype), v = p.rows(args.v, p.first_k, kv_head, args.dtype);
  pack_rows<Dot, D>(k, args.dtype, start, p.seqlen_k, kBackwardKeys<Dot, D>, tile.k);
  pack_rows<Dot, D>(v, args.dtype, start, p.seqlen_k, kBackwardKeys<Dot, D>, tile.v);
  pack_pairs<Dot, D>(k, args.dtype, start, p.seqlen_k, kBackwardKeys<Dot, D>, tile.pairs);
  transpose(tile.pairs, D, kBackwardKeys<Dot, D> / Dot::k, D, tile.k_columns, kBackwardKeys<Dot, D> / Dot::k);
  std::memset(tile.grad_k, 0, sizeof tile.grad_k);
  std::memset(tile.grad_v, 0, sizeof tile.grad_v);
  // The first panel with a query that sees a key of this block.
  const int64_t first_panel = args.causal ? larger(0, start - offset - first_query(p, panels, 0)) / kPanel : 0;
  for (int64_t g = 0; g < group; ++g) {
    const int64_t plane = index * args.heads + kv_head * group + g;
    for (int64_t from = first_panel / kBackwardPanels * kBackwardPanels; from < panels; from += kBackwardPanels) {
      const int64_t end = smaller(from + kBackwardPanels, panels), first = first_query(p, panels, from);
      const int vectors = int(end - from) * kVecs;
      int seen[kBackwardPanels * kVecs];
      for (int n = 0; n < vectors; ++n) seen[n] = seen_keys<Dot>(args, p, first + n * kLanes, start, keys);
      for (int64_t i = larger(from, first_panel); i < end; ++i)
        backward_panel<Dot, D, Dropout>(args, p, plane, first_query(p, panels, i), start, tile,
                                        shared.panels[g * panels + i], int(i - from) * kPanel,
                                        seen + (i - from) * kVecs);
      const int64_t lanes = (g * panels + from) * kPanel * width;
      backward_sum<Dot, D>(tile.dropped, shared.grad + lanes, rows, seen, vectors, tile.grad_v);
      backward_sum<Dot, D>(tile.ds, shared.q + lanes, rows, seen, vectors, tile.grad_k);
    }
  }
  write_rows<D>(p.rows(args.grad_k, p.first_k, kv_head, args.dtype), args.dtype, start, keys, tile.grad_k, args.scale);
  write_rows<D>(p.rows(args.grad_v, p.first_k, kv_head, args.dtype), args.dtype, start, keys, tile.grad_v,
                args.dropout_scale);
}

// With heads enough a thread does a head after the other, by itself. Otherwise as many heads as there are threads are
// prepared, their blocks of keys shared out, and dQ written, by all threads together.
template <class Dot, int D>
void backward(const AttentionArgs& args, int threads) {
  const int64_t problems = problem_count(args), heads = problems * args.kv_heads, group = args.heads / args.kv_heads;
  int64_t panels = 0, keys = 0;  // of the longest problem
  for (int64_t i = 0; i < problems; ++i) {
    panels = larger(panels, query_panels(problem(args, i)));
    keys = larger(keys, problem(args, i).seqlen_k);
  }
  const int64_t blocks = round_up(keys, kBackwardKeys<Dot, D>) / kBackwardKeys<Dot, D>;
  threads = int(larger(1, smaller(threads, heads * blocks)));
  const bool alone = heads_alone(heads, threads);
  const int64_t slots = smaller(heads, threads);
  const size_t head_bytes = BackwardHead<Dot, D>::bytes(group * panels);
  Workspace workspace(size_t(threads) * sizeof(BackwardTile<Dot, D>) + size_t(slots) * head_bytes);
  auto* tiles = reinterpret_cast<BackwardTile<Dot, D>*>(workspace.data);
  const auto memory = [&](int64_t slot) {
    return BackwardHead<Dot, D>(reinterpret_cast<char*>(tiles + threads) + size_t(slot) * head_bytes, group * panels);
  };

  // Steps of head `head` of all problems, which has memory `slot`; those that a shorter problem has not do nothing.
  const auto prepare = [&](int64_t head, int64_t slot, int64_t step, BackwardTile<Dot, D>& tile) {
    const Problem p = problem(args, head / args.kv_heads);
    const int64_t count = query_panels(p), lanes = step * kPanel * (D / Dot::k);
    if (step >= group * count) return;
    const BackwardHead<Dot, D> shared = memory(slot);
    backward_prepare<Dot, D>(args, p, head % args.kv_heads * group + step / count, first_query(p, count, step % count),
                             shared.panels[step], shared.q + lanes, shared.grad + lanes, tile.rows);
  };
  const auto block = [&](int64_t head, int64_t slot, int64_t step, BackwardTile<Dot, D>& tile) {
    const int64_t index = head / args.kv_heads, start = step * kBackwardKeys<Dot, D>;
    if (start >= problem(args, index).seqlen_k) return;
    if (args.dropout_threshold > 0)
      backward_keys<Dot, D, true>(args, index, head % args.kv_heads, start, memory(slot), tile);
    else
      backward_keys<Dot, D, false>(args, index, head % args.kv_heads, start, memory(slot), tile);
  };
  const auto write = [&](int64_t head, int64_t slot, int64_t step, BackwardTile<Dot, D>& tile) {
    const Problem p = problem(args, head / args.kv_heads);
    const int64_t count = query_panels(p);
    if (step >= group * count) return;
    const Rows grad_q = p.rows(args.grad_q, p.first_q, head % args.kv_heads * group + step / count, args.dtype);
    transpose(memory(slot).panels[step].grad_q, kPanel, D, kPanel, tile.rows, D);
    const int64_t first = first_query(p, count, step % count), dead = larger(0, -first);
    write_rows<D>(grad_q, args.dtype, first + dead, kPanel - dead, tile.rows + dead * D, args.scale);
  };

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int thread = omp_get_thread_num();
    BackwardTile<Dot, D>& tile = tiles[thread];
    [[maybe_unused]] const typename Dot::Setup setup;
    if (alone) {
#pragma omp for schedule(dynamic)
      for (int64_t head = 0; head < heads; ++head) {
        for (int64_t step = 0; step < group * panels; ++step) prepare(head, thread, step, tile);
        for (int64_t step = 0; step < blocks; ++step) block(head, thread, step, tile);
        for (int64_t step = 0; step < group * panels; ++step) write(head, thread, step, tile);
      }
    } else {
      for (int64_t from = 0; from < heads; from += slots) {
        const int64_t count = smaller(slots, heads - from);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count * group * panels; ++i) prepare(from + i % count, i % count, i / count, tile);
        // In order: a block waits for the ones before it, which are done or in the hands of other threads. With a
        // head for each thread, they tend to stay with the same one.
#pragma omp for schedule(monotonic : dynamic)
        for (int64_t i = 0; i < count * blocks; ++i) block(from + i % count, i % count, i / count, tile);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count * group * panels; ++i) write(from + i % count, i % count, i / count, tile);
      }
    }
  }
}

void attention_backward(const AttentionArgs& args, int threads) {
  with_kernel(args, [&](auto dot, auto dim) { backward<decltype(dot), decltype(dim)::value>(args, threads); });
}
