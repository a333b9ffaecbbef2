// Flash attention, backward (FlashAttention-2, arXiv 2307.08691, algorithm 2), five products per tile:
//
//   S^T = K Q^T, P^T = exp(scale S^T - lse), dP^T = V dO^T, dS^T = P^T (dP^T - delta), delta = rowsum(dO O)
//   dV += P^T dO, dK += dS^T Q, dQ^T += K^T dS^T
//
// A (problem, key/value head) is one piece of work, which a thread does alone with all its query heads: no two
// threads add to the same number, and results do not depend on how many there are. dK and dV of a block of keys
// stay in L1 while the queries pass; dQ^T is summed in float32 over the blocks of keys, in order.

constexpr int kBackwardKeys = 64;   // keys per block
constexpr int kBackwardPanels = 2;  // panels of queries per pass, a longer sum for dV and dK
static_assert(kBackwardKeys % kGroup == 0);

// What is kept of a query head while the keys pass: a panel after the other.
template <class Dot, int D>
struct BackwardPanel {
  static constexpr int width = D / Dot::k;
  alignas(64) float q_columns[width * kPanel];     // Q^T: (D / k, queries)
  alignas(64) float grad_columns[width * kPanel];  // dO^T
  alignas(64) float grad_q[D * kPanel];            // dQ^T / scale: (D, queries)
  alignas(64) float lse[kPanel];                   // log2(e) lse; +inf where the query sees no key or is none: P = 0
  alignas(64) float delta[kPanel];
};

// One thread's tile.
template <class Dot, int D>
struct BackwardTile {
  static constexpr int columns = kBackwardPanels * kPanel / Dot::k;
  alignas(64) float p[kBackwardKeys * kPanel];                    // P^T of a panel, before dropout
  alignas(64) float dropped[kBackwardKeys * columns];             // P^T after dropout, as A: (keys, queries / k)
  alignas(64) float ds[kBackwardKeys * columns];                  // dS^T, as A
  alignas(64) float ds_columns[kBackwardKeys / Dot::k * kPanel];  // dS^T of a panel, as B: (keys / k, queries)
  alignas(64) float grad_k[kBackwardKeys * D];                    // dK / scale
  alignas(64) float grad_v[kBackwardKeys * D];                    // dV / dropout_scale
  alignas(64) float rows[kPanel * D];
  alignas(64) float pairs[kBackwardKeys / Dot::k * D];
  uint32_t keep[kBackwardKeys][kVecs];
};

// The memory of one thread, cut for the longest problem.
template <class Dot, int D>
struct BackwardScratch {
  static constexpr int width = D / Dot::k;
  BackwardTile<Dot, D>* tile;
  BackwardPanel<Dot, D>* panels;  // (group, panels)
  float *q, *grad;                // (group, queries / k, D)
  float *k, *v, *k_columns;       // K, V: (keys, D / k); K^T of a block of keys: (D, keys / k)

  // Cuts the scratch of thread `thread` out of `data`, or with null only counts the bytes of one thread.
  BackwardScratch(char* data, int64_t thread, int64_t group, int64_t panel_count, int64_t keys, size_t& bytes) {
    size_t at = 0;
    auto take = [&](size_t size) { return std::exchange(at, at + (size + 63) / 64 * 64); };
    const size_t tile_at = take(sizeof *tile), panels_at = take(size_t(group * panel_count) * sizeof *panels);
    const size_t rows = size_t(group * panel_count * kPanel * width) * 4, lanes = size_t(keys * width) * 4;
    const size_t q_at = take(rows), grad_at = take(rows), k_at = take(lanes), v_at = take(lanes), t_at = take(lanes);
    bytes = at;
    if (data == nullptr) return;
    data += size_t(thread) * at;
    tile = reinterpret_cast<BackwardTile<Dot, D>*>(data + tile_at);
    panels = reinterpret_cast<BackwardPanel<Dot, D>*>(data + panels_at);
    q = reinterpret_cast<float*>(data + q_at);
    grad = reinterpret_cast<float*>(data + grad_at);
    k = reinterpret_cast<float*>(data + k_at);
    v = reinterpret_cast<float*>(data + v_at);
    k_columns = reinterpret_cast<float*>(data + t_at);
  }
};

// Everything of a query head that the tiles need, and dQ^T = 0. q, grad: its (queries / k, D) lanes.
template <class Dot, int D>
void backward_prepare(const AttentionArgs& args, const Problem& p, int64_t head, BackwardPanel<Dot, D>* panels,
                      float* q_lanes, float* grad_lanes, float* rows) {
  constexpr int width = D / Dot::k;
  const Rows q = p.rows(args.q, p.first_q, head, args.dtype);
  const Rows grad = p.rows(args.grad_out, p.first_q, head, args.dtype);
  const Rows out = p.rows(args.out, p.first_q, head, args.dtype);
  const float* lse = args.lse + (p.batch * args.heads + head) * args.seqlen_q + p.first_q;
  const int64_t panel_count = round_up(p.seqlen_q, kPanel) / kPanel;
  for (int64_t panel = 0; panel < panel_count; ++panel, ++panels) {
    const int64_t first = first_query(p, panel_count, panel), lanes = panel * kPanel * width;
    pack_rows<Dot, D>(q, args.dtype, first, p.seqlen_q, kPanel, rows);
    transpose(rows, width, kPanel, width, panels->q_columns, kPanel);
    pack_rows<Dot, D>(grad, args.dtype, first, p.seqlen_q, kPanel, rows);
    transpose(rows, width, kPanel, width, panels->grad_columns, kPanel);
    pack_pairs<Dot, D>(q, args.dtype, first, p.seqlen_q, kPanel, q_lanes + lanes);
    pack_pairs<Dot, D>(grad, args.dtype, first, p.seqlen_q, kPanel, grad_lanes + lanes);
    std::memset(panels->grad_q, 0, sizeof panels->grad_q);
    for (int64_t i = 0; i < kPanel; ++i) {
      panels->lse[i] = __builtin_inff();
      panels->delta[i] = 0;
      if (first + i < 0) continue;
      if (lse[first + i] != -__builtin_inff()) panels->lse[i] = lse[first + i] * kLog2e;
      float a[D], b[D];
      read_row(args.dtype, grad.data + (first + i) * grad.stride, a, D);
      read_row(args.dtype, out.data + (first + i) * out.stride, b, D);
      vfloat sum = {};
      for (int d = 0; d < D; d += kLanes) sum = fma(vload(a + d), vload(b + d), sum);
      for (int lane = 0; lane < kLanes; ++lane) panels->delta[i] += sum[lane];
    }
  }
}

// The part of a tile that one panel makes: dropped, ds (columns from `column`) and dQ^T += K^T dS^T. seen: see
// seen_keys, of the panel's vectors; dropped and ds are written where a vector sees the key.
template <class Dot, int D, bool Dropout>
void backward_panel(const AttentionArgs& args, const Problem& p, int64_t plane, int64_t first, int64_t start,
                    const BackwardScratch<Dot, D>& scratch, BackwardPanel<Dot, D>& panel, int column, const int* seen) {
  constexpr int width = D / Dot::k, columns = BackwardTile<Dot, D>::columns;
  BackwardTile<Dot, D>& tile = *scratch.tile;
  const int64_t keys = smaller(kBackwardKeys, p.seqlen_k - start), offset = p.seqlen_k - p.seqlen_q;
  // Keys below `bare` are seen by every query, from `first` on.
  const int64_t bare = args.causal ? smaller(keys, first + offset + 1 - start) : keys;
  const vfloat scale = splat(args.scale), log2e = splat(kLog2e), dropout_scale = splat(args.dropout_scale);
  const vint lane = lane_index();

  if constexpr (Dropout) dropout_bits(args, plane, first, start, round_up(keys, kGroup), tile.keep);

  auto probability_rows = [&](int r, auto from, auto mask) __attribute__((always_inline)) {
    Block<Dot, kVecs> block;
    block.template clear<from>();
    block.template multiply<width, kPanel, from>(scratch.k + (start + r) * width, panel.q_columns, width);
    auto& s = block.template vectors<from>();
#pragma GCC unroll 8
    for (int m = 0; m < Dot::rows; ++m) {
      const int64_t key = start + r + m;
      const int limit = int(key >= p.seqlen_k ? kPanel : args.causal ? larger(0, key - offset - first) : 0);
#pragma GCC unroll 8
      for (int n = from; n < kVecs; ++n) {
        vfloat x = exp2<Dot::k == 2>(fma(s[m][n] * scale, log2e, -vload(panel.lse + n * kLanes)));
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
    block.template multiply<width, kPanel, from>(scratch.v + (start + r) * width, panel.grad_columns, width);
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

  const float* k = scratch.k_columns + start * width;
  for (int d = 0; d < D; d += Dot::rows) {
    Block<Dot, kVecs> sum;
    float* to = panel.grad_q + d * kPanel;
    sum.template load<kPanel>(to);
    multiply_seen<Dot, kBackwardKeys>(k + d * (kBackwardKeys / Dot::k), tile.ds_columns, seen, sum);
    sum.template store<kPanel>(to);
  }
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

template <class Dot, int D, bool Dropout>
void backward_head(const AttentionArgs& args, int64_t index, int64_t kv_head, const BackwardScratch<Dot, D>& scratch) {
  constexpr int width = D / Dot::k;
  BackwardTile<Dot, D>& tile = *scratch.tile;
  const Problem p = problem(args, index);
  const int64_t group = args.heads / args.kv_heads, offset = p.seqlen_k - p.seqlen_q;
  const int64_t panels = round_up(p.seqlen_q, kPanel) / kPanel;

  for (int64_t g = 0; g < group; ++g)
    backward_prepare<Dot, D>(args, p, kv_head * group + g, scratch.panels + g * panels,
                             scratch.q + g * panels * kPanel * width, scratch.grad + g * panels * kPanel * width,
                             tile.rows);
  const Rows k = p.rows(args.k, p.first_k, kv_head, args.dtype), v = p.rows(args.v, p.first_k, kv_head, args.dtype);
  for (int64_t start = 0; start < p.seqlen_k; start += kBackwardKeys) {
    pack_rows<Dot, D>(k, args.dtype, start, p.seqlen_k, kBackwardKeys, scratch.k + start * width);
    pack_rows<Dot, D>(v, args.dtype, start, p.seqlen_k, kBackwardKeys, scratch.v + start * width);
    pack_pairs<Dot, D>(k, args.dtype, start, p.seqlen_k, kBackwardKeys, tile.pairs);
    transpose(tile.pairs, D, kBackwardKeys / Dot::k, D, scratch.k_columns + start * width, kBackwardKeys / Dot::k);

    const int64_t keys = smaller(kBackwardKeys, p.seqlen_k - start);
    const int rows = int(round_up(keys, Dot::rows));
    std::memset(tile.grad_k, 0, sizeof tile.grad_k);
    std::memset(tile.grad_v, 0, sizeof tile.grad_v);
    // The first panel with a query that sees a key of this block.
    const int64_t first_panel = args.causal ? larger(0, start - offset - first_query(p, panels, 0)) / kPanel : 0;
    for (int64_t g = 0; g < group; ++g) {
      const int64_t head = kv_head * group + g;
      for (int64_t from = first_panel / kBackwardPanels * kBackwardPanels; from < panels; from += kBackwardPanels) {
        const int64_t end = smaller(from + kBackwardPanels, panels), first = first_query(p, panels, from);
        const int vectors = int(end - from) * kVecs;
        int seen[kBackwardPanels * kVecs];
        for (int n = 0; n < vectors; ++n) seen[n] = seen_keys<Dot>(args, p, first + n * kLanes, start, keys);
        for (int64_t i = larger(from, first_panel); i < end; ++i)
          backward_panel<Dot, D, Dropout>(args, p, index * args.heads + head, first_query(p, panels, i), start, scratch,
                                          scratch.panels[g * panels + i], int(i - from) * kPanel,
                                          seen + (i - from) * kVecs);
        const int64_t lanes = (g * panels + from) * kPanel * width;
        backward_sum<Dot, D>(tile.dropped, scratch.grad + lanes, rows, seen, vectors, tile.grad_v);
        backward_sum<Dot, D>(tile.ds, scratch.q + lanes, rows, seen, vectors, tile.grad_k);
      }
    }
    write_rows<D>(p.rows(args.grad_k, p.first_k, kv_head, args.dtype), args.dtype, start, keys, tile.grad_k,
                  args.scale);
    write_rows<D>(p.rows(args.grad_v, p.first_k, kv_head, args.dtype), args.dtype, start, keys, tile.grad_v,
                  args.dropout_scale);
  }

  for (int64_t g = 0; g < group; ++g) {
    const Rows grad_q = p.rows(args.grad_q, p.first_q, kv_head * group + g, args.dtype);
    for (int64_t i = 0; i < panels; ++i) {
      transpose(scratch.panels[g * panels + i].grad_q, kPanel, D, kPanel, tile.rows, D);
      const int64_t first = first_query(p, panels, i), dead = larger(0, -first);
      write_rows<D>(grad_q, args.dtype, first + dead, kPanel - dead, tile.rows + dead * D, args.scale);
    }
  }
}

template <class Dot, int D>
void backward(const AttentionArgs& args, int threads) {
  const int64_t problems = problem_count(args);
  int64_t panels = 0, keys = 0;
  for (int64_t i = 0; i < problems; ++i) {
    const Problem p = problem(args, i);
    panels = larger(panels, round_up(p.seqlen_q, kPanel) / kPanel);
    keys = larger(keys, round_up(p.seqlen_k, kBackwardKeys));
  }
  const int64_t items = problems * args.kv_heads, group = args.heads / args.kv_heads;
  threads = int(smaller(threads, items));
  size_t bytes = 0;
  BackwardScratch<Dot, D>(nullptr, 0, group, panels, keys, bytes);
  Workspace workspace(bytes * size_t(threads));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    size_t own;
    [[maybe_unused]] const typename Dot::Setup setup;
    const BackwardScratch<Dot, D> scratch(workspace.data, omp_get_thread_num(), group, panels, keys, own);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < items; ++item) {
      if (args.dropout_threshold > 0)
        backward_head<Dot, D, true>(args, item / args.kv_heads, item % args.kv_heads, scratch);
      else
        backward_head<Dot, D, false>(args, item / args.kv_heads, item % args.kv_heads, scratch);
    }
  }
}

void attention_backward(const AttentionArgs& args, int threads) {
  with_kernel(args, [&](auto dot, auto dim) { backward<decltype(dot), decltype(dim)::value>(args, threads); });
}
