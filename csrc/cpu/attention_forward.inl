// Flash attention, forward (FlashAttention-2, arXiv 2307.08691, algorithm 1).
//
// K is packed once into rows of lanes and V into V^T, blocked by keys; then each (problem, head, panel of queries)
// is one piece of work, which a thread does alone: results do not depend on the number of threads.

constexpr int kForwardKeys = 128;  // keys per block: 24 KB of scores with AVX-512, in L1 while they are used

// One thread's memory.
template <class Dot, int D>
struct ForwardScratch {
  alignas(64) float q[D / Dot::k * kPanel];         // Q^T: (D / k, queries)
  alignas(64) float scores[kForwardKeys * kPanel];  // S^T, then P^T as B: (keys / k, queries)
  alignas(64) float out[D * kPanel];                // O^T, not yet divided by the sums
  alignas(64) float rows[kPanel * D];               // O, or Q before it is transposed
  uint32_t keep[kForwardKeys][kVecs];
};

// Keys and values of one (problem, key/value head).
struct PackedHead {
  const float *k, *v;
};

// Changes the sign of every number in `count` lanes, or makes them zeros.
template <class Dot>
inline void flip_or_clear(float* lanes, int64_t count, bool clear) {
  const vuint sign = splat_bits(Dot::k == 2 ? 0x80008000u : 0x80000000u);
  for (int64_t i = 0; i < count; i += kLanes)
    vstore(lanes + i, clear ? vfloat{} : (vfloat)((vuint)vload(lanes + i) ^ sign));
}

// A panel of up to kPanel queries of one head against all keys that it sees.
template <class Dot, int D, bool Dropout>
void forward_panel(const AttentionArgs& args, const Problem& p, int64_t plane, int64_t head, int64_t first,
                   const PackedHead& packed, ForwardScratch<Dot, D>& scratch) {
  constexpr int width = D / Dot::k;
  const int64_t queries = smaller(kPanel, p.seqlen_q - first), offset = p.seqlen_k - p.seqlen_q;
  const int64_t visible = args.causal ? larger(0, smaller(p.seqlen_k, first + queries + offset)) : p.seqlen_k;

  pack_rows<Dot, D>(p.rows(args.q, p.first_q, head, args.dtype), args.dtype, first, p.seqlen_q, kPanel, scratch.rows);
  transpose(scratch.rows, width, kPanel, width, scratch.q, kPanel);

  // Scores stay unscaled, exp2's argument takes the scale up: it must be positive for that. Q takes over the sign.
  if (args.scale <= 0) flip_or_clear<Dot>(scratch.q, width * kPanel, args.scale == 0);
  const vfloat scale = splat(args.scale == 0 ? 1.0f : kLog2e * __builtin_fabsf(args.scale));
  const vfloat hidden = splat(-__builtin_inff());
  // P = exp2(scale S - base): base is the scale times the greatest score so far, rounded, or 0 before there is one.
  // lse takes up the base that was used, so its rounding does no harm.
  vfloat greatest[kVecs], base[kVecs] = {}, sum[kVecs] = {};
  for (int n = 0; n < kVecs; ++n) greatest[n] = hidden;

  for (int64_t start = 0; start < visible; start += kForwardKeys) {
    const int64_t keys = smaller(kForwardKeys, visible - start);
    const int rows = int(round_up(keys, kRows));
    // Lanes of the panel below this see nothing of a key: key j is seen by queries from j - offset on.
    const bool masked = rows != keys || (args.causal && start + keys - 1 - offset > first);
    const vint lane = lane_index();

    auto score_rows = [&](int r, auto mask) __attribute__((always_inline)) {
      vfloat s[kRows][kVecs] = {};
      multiply<Dot, width, kPanel>(packed.k + (start + r) * width, scratch.q, width, s);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        const int64_t key = start + r + m;
        const int limit = int(key >= visible ? kPanel : args.causal ? larger(0, key - offset - first) : 0);
#pragma GCC unroll 8
        for (int n = 0; n < kVecs; ++n) {
          if constexpr (mask) s[m][n] = lane >= limit - n * kLanes ? s[m][n] : hidden;
          greatest[n] = vmax(s[m][n], greatest[n]);
          vstore(scratch.scores + (r + m) * kPanel + n * kLanes, s[m][n]);
        }
      }
    };
    if (masked)
      for (int r = 0; r < rows; r += kRows) score_rows(r, std::true_type());
    else
      for (int r = 0; r < rows; r += kRows) score_rows(r, std::false_type());

    if constexpr (Dropout) dropout_bits(args, plane, first, start, round_up(keys, kGroup), scratch.keep);

    vfloat shrink[kVecs];
    for (int n = 0; n < kVecs; ++n) {
      const vfloat next = greatest[n] == hidden ? vfloat{} : greatest[n] * scale;
      shrink[n] = exp2(base[n] - next);
      sum[n] *= shrink[n];
      base[n] = next;
    }
    // P^T in place: a lane's k rows are read before the lane is written, at or below them.
    for (int r = 0; r < rows; r += Dot::k)
#pragma GCC unroll 8
      for (int n = 0; n < kVecs; ++n) {
        vfloat x[Dot::k];
#pragma GCC unroll 2
        for (int i = 0; i < Dot::k; ++i) {
          x[i] = exp2(fma(vload(scratch.scores + (r + i) * kPanel + n * kLanes), scale, -base[n]));
          sum[n] += x[i];
          if constexpr (Dropout) x[i] = keep_lanes(scratch.keep[r + i][n], x[i]);
        }
        Dot::store_rows(scratch.scores + r / Dot::k * kPanel + n * kLanes, x);
      }

    // O^T = O^T shrink + V^T P^T
    const float* v = packed.v + start * width;
    for (int d = 0; d < D; d += kRows) {
      vfloat o[kRows][kVecs] = {};
      if (start > 0)
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
          for (int n = 0; n < kVecs; ++n) o[m][n] = vload(scratch.out + (d + m) * kPanel + n * kLanes) * shrink[n];
      multiply<Dot, kForwardKeys / Dot::k, kPanel>(v + d * (kForwardKeys / Dot::k), scratch.scores, rows / Dot::k, o);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < kVecs; ++n) vstore(scratch.out + (d + m) * kPanel + n * kLanes, o[m][n]);
    }
  }

  float last[kPanel], total[kPanel], factor[kPanel];
  for (int n = 0; n < kVecs; ++n) vstore(last + n * kLanes, base[n]), vstore(total + n * kLanes, sum[n]);
  for (int i = 0; i < kPanel; ++i) factor[i] = total[i] == 0 ? 0 : args.dropout_scale / total[i];
  if (visible == 0)
    std::memset(scratch.rows, 0, sizeof scratch.rows);
  else
    transpose(scratch.out, kPanel, D, kPanel, scratch.rows, D);

  float* lse = args.lse + (p.batch * args.heads + head) * args.seqlen_q + p.first_q + first;
  const Rows out = p.rows(args.out, p.first_q, head, args.dtype);
  for (int64_t i = 0; i < queries; ++i) {
    float* row = scratch.rows + i * D;
    for (int d = 0; d < D; ++d) row[d] *= factor[i];
    write_row(args.dtype, out.data + (first + i) * out.stride, row, D);
    lse[i] = float((last[i] + __builtin_log2(total[i])) * 0.69314718055994531);  // ln 2; log2(0) = -inf
  }
}

template <class Dot, int D>
void forward(const AttentionArgs& args, int threads) {
  constexpr int width = D / Dot::k;
  const int64_t problems = problem_count(args), group = args.heads / args.kv_heads;
  // Where each problem's keys and panels begin: all heads of the problems before it.
  Workspace tables(size_t(problems + 1) * 2 * sizeof(int64_t));
  int64_t* key_start = reinterpret_cast<int64_t*>(tables.data);
  int64_t* item_start = key_start + problems + 1;
  key_start[0] = item_start[0] = 0;
  for (int64_t i = 0; i < problems; ++i) {
    const Problem p = problem(args, i);
    key_start[i + 1] = key_start[i] + round_up(p.seqlen_k, kForwardKeys) * args.kv_heads;
    item_start[i + 1] = item_start[i] + round_up(p.seqlen_q, kPanel) / kPanel * args.heads;
  }
  auto find = [&](const int64_t* start, int64_t at) {  // the problem that `at` falls into
    int64_t low = 0, high = problems;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (start[middle] <= at ? low : high) = middle;
    }
    while (start[low + 1] <= at) ++low;  // skips empty problems
    return low;
  };

  const int64_t all_keys = key_start[problems], items = item_start[problems];
  const size_t packed_bytes = size_t(all_keys) * width * 4;
  Workspace workspace(2 * packed_bytes + size_t(threads) * sizeof(ForwardScratch<Dot, D>));
  float* packed_k = reinterpret_cast<float*>(workspace.data);
  float* packed_v = reinterpret_cast<float*>(workspace.data + packed_bytes);
  auto* scratches = reinterpret_cast<ForwardScratch<Dot, D>*>(workspace.data + 2 * packed_bytes);

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    ForwardScratch<Dot, D>& scratch = scratches[omp_get_thread_num()];
#pragma omp for schedule(dynamic)
    for (int64_t block = 0; block < all_keys / kForwardKeys; ++block) {
      const int64_t at = block * kForwardKeys, i = find(key_start, at);
      const Problem p = problem(args, i);
      const int64_t per_head = round_up(p.seqlen_k, kForwardKeys);
      const int64_t head = (at - key_start[i]) / per_head, first = (at - key_start[i]) % per_head;
      pack_rows<Dot, D>(p.rows(args.k, p.first_k, head, args.dtype), args.dtype, first, p.seqlen_k, kForwardKeys,
                        packed_k + at * width);
      // V^T of the block: (D, keys / k)
      float pairs[kForwardKeys / Dot::k * D];
      pack_pairs<Dot, D>(p.rows(args.v, p.first_k, head, args.dtype), args.dtype, first, p.seqlen_k, kForwardKeys,
                         pairs);
      transpose(pairs, D, kForwardKeys / Dot::k, D, packed_v + at * width, kForwardKeys / Dot::k);
    }
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < items; ++item) {
      const int64_t i = find(item_start, item);
      const Problem p = problem(args, i);
      const int64_t panels = round_up(p.seqlen_q, kPanel) / kPanel;
      const int64_t head = (item - item_start[i]) / panels;
      // Longest first within a head: in the causal case the last queries see most.
      const int64_t first = (panels - 1 - (item - item_start[i]) % panels) * kPanel;
      const int64_t at = (key_start[i] + head / group * round_up(p.seqlen_k, kForwardKeys)) * width;
      const PackedHead packed = {packed_k + at, packed_v + at};
      if (args.dropout_threshold > 0)
        forward_panel<Dot, D, true>(args, p, i * args.heads + head, head, first, packed, scratch);
      else
        forward_panel<Dot, D, false>(args, p, i * args.heads + head, head, first, packed, scratch);
    }
  }
}

void attention_forward(const AttentionArgs& args, int threads) {
  with_kernel(args, [&](auto dot, auto dim) {
    if (few_queries(args))
      decode<decltype(dim)::value>(args, threads);
    else
      forward<decltype(dot), decltype(dim)::value>(args, threads);
  });
}
