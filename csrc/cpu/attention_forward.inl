// Flash attention, forward (FlashAttention-2, arXiv 2307.08691, algorithm 1).
//
// K is packed once into rows of lanes and V into V^T, blocked by keys; each (problem, head, panel of queries) is one
// piece of work, which a thread does alone: results do not depend on the number of threads.

constexpr int kForwardKeys = 128;  // keys per block: 24 KB of scores with AVX-512, in L1 while they are used

// One thread's memory.
template <class Dot, int D>
struct ForwardScratch {
  alignas(64) float q[D / Dot::k * kPanel];         // Q^T: (D / k, queries)
  static constexpr int keys = kForwardKeys;         // of a block
  alignas(64) float scores[kForwardKeys * kPanel];  // S^T, then P^T as B: (keys / k, queries)
  alignas(64) float out[D * kPanel];                // O^T, not yet divided by the sums
  alignas(64) float rows[kPanel * D];               // O, or Q before it is transposed
  uint32_t keep[kForwardKeys][kVecs];
};

// Keys and values, packed, of one (problem, key/value head) or of several in order.
struct PackedHead {
  float *k, *v;
};

// Changes the sign of every number in `count` lanes.
template <class Dot>
inline void flip(float* lanes, int64_t count) {
  const vuint sign = splat_bits(Dot::k == 2 ? 0x80008000u : 0x80000000u);
  for (int64_t i = 0; i < count; i += kLanes) vstore(lanes + i, (vfloat)((vuint)vload(lanes + i) ^ sign));
}

// Multiplies every number in `count` lanes by 0: NaN stays, and infinities become it.
template <class Dot>
inline void times_zero(float* lanes, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const vfloat x = vload(lanes + i);
    if constexpr (Dot::k == 2) {
      const vfloat low = (vfloat)((vuint)x << 16) * 0.0f, high = (vfloat)((vuint)x & 0xffff0000u) * 0.0f;
      vstore(lanes + i, (vfloat)((vuint)low >> 16 | ((vuint)high & 0xffff0000u)));
    } else {
      vstore(lanes + i, x * 0.0f);
    }
  }
}

// to = Q^T of a panel: (D / k, queries). Scores stay unscaled, exp2's argument takes the scale up: it must be positive
// for that, and is returned. Q takes over the sign.
template <class Dot, int D>
float prepare_queries(const AttentionArgs& args, const Problem& p, int64_t head, int64_t first, float* to,
                      float* rows) {
  constexpr int width = D / Dot::k;
  pack_rows<Dot, D>(p.rows(args.q, p.first_q, head, args.dtype), args.dtype, first, p.seqlen_q, kPanel, rows);
  transpose(rows, width, kPanel, width, to, kPanel);
  if (args.scale < 0) flip<Dot>(to, width * kPanel);
  if (args.scale == 0) times_zero<Dot>(to, width * kPanel);
  return args.scale == 0 ? 1.0f : __builtin_fabsf(args.scale);
}

// Writes O and lse of a panel: out_columns is O^T, not yet divided by the sums, which are of exp2(scale (S - taken)).
template <int D>
void finish_panel(const AttentionArgs& args, const Problem& p, int64_t head, int64_t first, int64_t visible,
                  const vfloat* taken, const vfloat* sum, float scale, float* out_columns, float* rows) {
  float last[kPanel], total[kPanel];
  for (int n = 0; n < kVecs; ++n) {
    vstore(last + n * kLanes, taken[n]), vstore(total + n * kLanes, sum[n]);
    const vfloat factor = sum[n] == 0.0f ? vfloat{} : args.dropout_scale / sum[n];
    for (int d = 0; d < D; ++d) {
      float* const at = out_columns + d * kPanel + n * kLanes;
      vstore(at, visible == 0 ? vfloat{} : vload(at) * factor);
    }
  }
  transpose(out_columns, kPanel, D, kPanel, rows, D);

  float* lse = args.lse + (p.batch * args.heads + head) * args.seqlen_q + p.first_q + first;
  const Rows out = p.rows(args.out, p.first_q, head, args.dtype);
  for (int64_t i = larger(0, -first); i < kPanel; ++i) {
    write_row(args.dtype, out.data + (first + i) * out.stride, rows + i * D, D);
    lse[i] = log_sum_exp(last[i] * scale, total[i]);
  }
}

// A panel of kPanel queries of one head from `first`, which may be negative, against all keys that they see.
template <class Dot, int D, bool Dropout>
void forward_panel(const AttentionArgs& args, const Problem& p, int64_t plane, int64_t head, int64_t first,
                   const PackedHead& packed, ForwardScratch<Dot, D>& scratch) {
  constexpr int width = D / Dot::k;
  const int64_t offset = p.seqlen_k - p.seqlen_q, end = first + kPanel;
  const int64_t visible = args.causal ? larger(0, smaller(p.seqlen_k, end + offset)) : p.seqlen_k;

  const float positive = prepare_queries<Dot, D>(args, p, head, first, scratch.q, scratch.rows);
  const vfloat scale = splat(kLog2e * positive), hidden = splat(-__builtin_inff());
  // P = exp2(scale (S - greatest)). With the greatest taken off first it has P = 1 however large it is; after a product
  // that rounds it would have 2^(the rounding).
  vfloat greatest[kVecs], sum[kVecs] = {};
  for (int n = 0; n < kVecs; ++n) greatest[n] = hidden;

  for (int64_t start = 0; start < visible; start += kForwardKeys) {
    const int64_t keys = smaller(kForwardKeys, visible - start);
    // Keys below `bare` are seen by every query, from `first` on.
    const int64_t bare = args.causal ? smaller(keys, first + offset + 1 - start) : keys;
    int seen[kVecs];
    for (int n = 0; n < kVecs; ++n) seen[n] = seen_keys<Dot>(args, p, first + n * kLanes, start, keys);
    const vint lane = lane_index();
    vfloat before[kVecs];
    for (int n = 0; n < kVecs; ++n) before[n] = greatest[n];

    auto score_rows = [&](int r, auto from, auto mask) __attribute__((always_inline)) {
      Block<Dot, kVecs> block;
      block.template clear<from>();
      block.template multiply<width, kPanel, from>(packed.k + (start + r) * width, scratch.q, width);
      auto& s = block.template vectors<from>();
#pragma GCC unroll 8
      for (int m = 0; m < Dot::rows; ++m) {
        // Lanes of the panel below this see nothing of the key: key j is seen by queries from j - offset on.
        const int64_t key = start + r + m;
        const int limit = int(key >= visible ? kPanel : args.causal ? larger(0, key - offset - first) : 0);
#pragma GCC unroll 8
        for (int n = from; n < kVecs; ++n) {
          if constexpr (mask) s[m][n] = lane >= limit - n * kLanes ? s[m][n] : hidden;
          greatest[n] = vmax(s[m][n], greatest[n]);
          vstore(scratch.scores + (r + m) * kPanel + n * kLanes, s[m][n]);
        }
      }
    };
    int r = 0;
    for_vectors([&](auto from) __attribute__((always_inline)) {
      if constexpr (from == 0)
        for (; r < seen[0] && r + Dot::rows <= bare; r += Dot::rows) score_rows(r, from, std::false_type());
      for (; r < seen[from]; r += Dot::rows) score_rows(r, from, std::true_type());
    });

    if constexpr (Dropout) dropout_bits(args, plane, first, start, round_up(keys, kGroup), scratch.keep);

    // What is taken off: where no score is above -inf yet, 0 instead, so that P = exp2(-inf) and not of -inf + inf.
    vfloat base[kVecs], shrink[kVecs];
    for (int n = 0; n < kVecs; ++n) {
      base[n] = greatest[n] == hidden ? vfloat{} : greatest[n];
      shrink[n] = exp2((before[n] - base[n]) * scale);  // <= 0: before <= greatest, and -inf where that is
      sum[n] *= shrink[n];
    }
    // P^T in place: a lane's k rows are read before the lane is written, at or below them.
    r = 0;
    for_vectors([&](auto from) __attribute__((always_inline)) {
      for (; r < seen[from]; r += Dot::k)
#pragma GCC unroll 8
        for (int n = from; n < kVecs; ++n) {
          vfloat x[Dot::k];
#pragma GCC unroll 2
          for (int i = 0; i < Dot::k; ++i) {
            // <= 0: the greatest is taken off.
            x[i] = Dot::exp2((vload(scratch.scores + (r + i) * kPanel + n * kLanes) - base[n]) * scale);
            sum[n] += x[i];
            if constexpr (Dropout) x[i] = keep_lanes(scratch.keep[r + i][n], x[i]);
          }
          Dot::store_rows(scratch.scores + r / Dot::k * kPanel + n * kLanes, x);
        }
    });

    // O^T = O^T shrink + V^T P^T
    const float* v = packed.v + start * width;
    for (int d = 0; d < D; d += Dot::rows) {
      Block<Dot, kVecs> o;
      float* out = scratch.out + d * kPanel;
      o.clear();
      if (start > 0) o.template load<kPanel>(out, shrink);
      multiply_seen<Dot, kForwardKeys>(v + d * (kForwardKeys / Dot::k), scratch.scores, seen, o);
      o.template store<kPanel>(out);
    }
  }

  finish_panel<D>(args, p, head, first, visible, greatest, sum, positive, scratch.out, scratch.rows);
}

#if defined(__AMX_BF16__)
#include "cpu/attention_tiles_forward.inl"
#endif

template <class Dot, int D>
struct ScratchOf {
  using Type = ForwardScratch<Dot, D>;
};
#if defined(__AMX_BF16__)
template <int D>
struct ScratchOf<DotTiles, D> {
  using Type = TilesScratch<D>;
};
#endif
// One thread's memory for forward_panel, and `keys`, how many a block of packed keys has.
template <class Dot, int D>
using Scratch = typename ScratchOf<Dot, D>::Type;

// The keys and panels of all problems but those of few queries (attention_decode.inl), counted through: those of a
// (problem, key/value head) lie side by side.
template <class Dot, int D>
struct ForwardWork {
  const AttentionArgs& args;
  int64_t problems;
  Workspace tables;
  int64_t *key_start, *panel_start;  // of each problem, and at last how many there are

  explicit ForwardWork(const AttentionArgs& args)
      : args(args), problems(problem_count(args)), tables(size_t(problems + 1) * 2 * sizeof(int64_t)) {
    key_start = reinterpret_cast<int64_t*>(tables.data);
    panel_start = key_start + problems + 1;
    key_start[0] = panel_start[0] = 0;
    for (int64_t i = 0; i < problems; ++i) {
      const Problem p = problem(args, i);
      const bool few = few_queries<Dot>(args, p);
      key_start[i + 1] = key_start[i] + (few ? 0 : padded_keys(p) * args.kv_heads);
      panel_start[i + 1] = panel_start[i] + (few ? 0 : query_panels(p) * args.heads);
    }
  }

  static int64_t padded_keys(const Problem& p) { return round_up(p.seqlen_k, Scratch<Dot, D>::keys); }
  int64_t heads() const { return problems * args.kv_heads; }

  // The first of the numbers of key/value head `head` of all problems, in key_start or panel_start.
  int64_t begin(const int64_t* start, int64_t head) const {
    const int64_t i = head / args.kv_heads;
    return i == problems ? start[i] : start[i] + (start[i + 1] - start[i]) / args.kv_heads * (head % args.kv_heads);
  }

  // The problem that `at` falls into.
  int64_t find(const int64_t* start, int64_t at) const {
    int64_t low = 0, high = problems;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (start[middle] <= at ? low : high) = middle;
    }
    while (start[low + 1] <= at) ++low;  // skips empty problems
    return low;
  }
};

// With heads enough a thread packs a key/value head and does its panels: what it reads again and again lies in its own
// caches, and no thread waits for another. Otherwise all heads are packed first and their panels shared out.
template <class Dot, int D>
void forward(const AttentionArgs& args, int threads) {
  constexpr int width = D / Dot::k, kKeys = Scratch<Dot, D>::keys;
  const ForwardWork<Dot, D> work(args);
  if (work.panel_start[work.problems] == 0) return;
  const int64_t heads = work.heads(), group = args.heads / args.kv_heads;
  const bool alone = heads_alone(heads, threads);
  int64_t most_keys = 0;  // packed at a time
  for (int64_t i = 0; i < work.problems; ++i)
    most_keys = larger(most_keys, (work.key_start[i + 1] - work.key_start[i]) / args.kv_heads);
  if (!alone) most_keys = work.key_start[work.problems];
  const int64_t lanes = most_keys * width;
  Workspace workspace(size_t(alone ? threads : 1) * 2 * size_t(lanes) * 4 + size_t(threads) * sizeof(Scratch<Dot, D>));
  auto* scratches = reinterpret_cast<Scratch<Dot, D>*>(workspace.data);
  float* packed_lanes = reinterpret_cast<float*>(scratches + threads);

  // `packed` holds the keys from number `from` on.
  const auto pack_block = [&](int64_t key, const PackedHead& packed, int64_t from) {
    const int64_t i = work.find(work.key_start, key);
    const Problem p = problem(args, i);
    const int64_t per_head = work.padded_keys(p), at = (key - from) * width;
    const int64_t head = (key - work.key_start[i]) / per_head, first = (key - work.key_start[i]) % per_head;
    pack_rows<Dot, D>(p.rows(args.k, p.first_k, head, args.dtype), args.dtype, first, p.seqlen_k, kKeys, packed.k + at);
    // V^T of the block: (D, keys / k)
    float pairs[kKeys / Dot::k * D];
    pack_pairs<Dot, D>(p.rows(args.v, p.first_k, head, args.dtype), args.dtype, first, p.seqlen_k, kKeys, pairs);
    transpose(pairs, D, kKeys / Dot::k, D, packed.v + at, kKeys / Dot::k);
  };
  const auto panel_of = [&](int64_t panel, const PackedHead& packed, int64_t from, Scratch<Dot, D>& scratch) {
    const int64_t i = work.find(work.panel_start, panel), of_problem = panel - work.panel_start[i];
    const Problem p = problem(args, i);
    // Longest first within a head: in the causal case the last queries see most.
    const int64_t panels = query_panels(p), head = of_problem / panels;
    const int64_t first = first_query(p, panels, panels - 1 - of_problem % panels);
    const int64_t at = (work.key_start[i] + head / group * work.padded_keys(p) - from) * width;
    const PackedHead own = {packed.k + at, packed.v + at};
    if (args.dropout_threshold > 0)
      forward_panel<Dot, D, true>(args, p, i * args.heads + head, head, first, own, scratch);
    else
      forward_panel<Dot, D, false>(args, p, i * args.heads + head, head, first, own, scratch);
  };

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int thread = omp_get_thread_num();
    [[maybe_unused]] const typename Dot::Setup setup;
    if (alone) {
      const PackedHead packed = {packed_lanes + 2 * thread * lanes, packed_lanes + (2 * thread + 1) * lanes};
#pragma omp for schedule(dynamic)
      for (int64_t head = 0; head < heads; ++head) {
        const int64_t from = work.begin(work.key_start, head), end = work.begin(work.key_start, head + 1);
        for (int64_t key = from; key < end; key += kKeys) pack_block(key, packed, from);
        const int64_t last = work.begin(work.panel_start, head + 1);
        for (int64_t panel = work.begin(work.panel_start, head); panel < last; ++panel)
          panel_of(panel, packed, from, scratches[thread]);
      }
    } else {
      const PackedHead packed = {packed_lanes, packed_lanes + lanes};
#pragma omp for schedule(dynamic)
      for (int64_t key = 0; key < most_keys; key += kKeys) pack_block(key, packed, 0);
#pragma omp for schedule(dynamic)
      for (int64_t panel = 0; panel < work.panel_start[work.problems]; ++panel)
        panel_of(panel, packed, 0, scratches[thread]);
    }
  }
}

void attention_forward(const AttentionArgs& args, int threads) {
  with_kernel(args, [&](auto dot, auto dim) {
    decode<decltype(dot), decltype(dim)::value>(args, threads);
    forward<decltype(dot), decltype(dim)::value>(args, threads);
  });
}
