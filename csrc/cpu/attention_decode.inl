// Flash attention, forward, for a token or a few at a time after a long cache: K and V are read once and not packed,
// since the panels of attention_forward.inl would copy all of K and V and leave most of their lanes empty.
//
// A row is a query of a query head; rows of one key/value head go over its keys together. Scores S = Q K^T lie along
// the keys' lanes, from blocks of K^T that stay in L1; O = P V along head_dim, from V as it is. What is computed of a
// row does not depend on which others it goes with, nor results on the number of threads.

constexpr int kFewRows = 16;                    // rows that go together, at most
constexpr int kFewVecs = kLanes == 16 ? 4 : 2;  // vectors of keys in a register block
constexpr int kFewKeys = kFewVecs * kLanes;     // keys per block

template <int D>
struct DecodeScratch {
  alignas(64) float q[kFewRows * D];
  alignas(64) float out[kFewRows * D];
  alignas(64) float keys[kFewKeys * D];
  alignas(64) float columns[D * kFewKeys];  // K^T
};

// Fetches a row of K or V that comes kAhead rows later: those of a head lie far apart, and no CPU foresees where the
// next one is. On Emerald Rapids a query after 2,048 keys of 8 heads takes 0.13 ms for 0.19, with 32 or 64 rows 0.15.
constexpr int kAhead = 16;
template <int bytes>
__attribute__((always_inline)) inline void fetch(const char* row) {
#pragma GCC unroll 8
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(row + i);
}

// q's products with kLanes keys from `first`, a row each: they are summed over the lanes by a transposition.
template <typename T, int D, class Key>
__attribute__((always_inline)) inline vfloat scores_of_keys(const float* q, int64_t first, Key key) {
  vfloat part[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    const T* row = reinterpret_cast<const T*>(key(first + i));
    fetch<D * sizeof(T)>(key(first + i + kAhead));
    part[i] = vload(q) * vload(row);
#pragma GCC unroll 32
    for (int d = kLanes; d < D; d += kLanes) part[i] = fma(vload(q + d), vload(row + d), part[i]);
  }
  transpose(part);
#pragma GCC unroll 16
  for (int i = 1; i < kLanes; ++i) part[0] += part[i];
  return part[0];
}

// Rows first .. first + count of a (problem, key/value head): row i is query i % seqlen_q of query head i / seqlen_q of
// the group. scores: (kFewRows, length). kBlock: rows of a register block, 1 where there is one only.
template <typename T, int D, int kBlock>
void decode_rows(const AttentionArgs& args, const Problem& p, int64_t kv_head, int64_t first, int64_t count,
                 DecodeScratch<D>& scratch, float* scores, int64_t length) {
  const Rows k = p.rows(args.k, p.first_k, kv_head, args.dtype), v = p.rows(args.v, p.first_k, kv_head, args.dtype);
  const vfloat hidden = splat(-__builtin_inff()), log2e = splat(kLog2e), scale = splat(args.scale);
  const vint lane = lane_index();
  constexpr int out_vecs = kBlock == 1 ? D / kLanes : 2;  // vectors of head_dim in a register block

  int64_t head[kFewRows], query[kFewRows], visible[kFewRows], most[kFewRows / kBlock] = {}, all = 0;
  vfloat greatest[kFewRows];
  std::memset(scratch.q, 0, sizeof scratch.q);
  std::memset(scratch.out, 0, sizeof scratch.out);
  for (int64_t r = 0; r < kFewRows; ++r) {
    greatest[r] = hidden;
    visible[r] = 0;
    if (r >= count) continue;
    head[r] = kv_head * (args.heads / args.kv_heads) + (first + r) / p.seqlen_q;
    query[r] = (first + r) % p.seqlen_q;
    visible[r] = p.seqlen_k;
    if (args.causal) visible[r] = larger(0, smaller(p.seqlen_k, query[r] + 1 + p.seqlen_k - p.seqlen_q));
    most[r / kBlock] = larger(most[r / kBlock], visible[r]);
    all = larger(all, visible[r]);
    const Rows q = p.rows(args.q, p.first_q, head[r], args.dtype);
    read_row_typed<T>(q.data + query[r] * q.stride, scratch.q + r * D, D);
  }

  for (int64_t start = 0; start < all; start += kFewKeys) {
    // Past the end the last key again: its scores are hidden.
    const auto key = [&](int64_t j) { return k.data + smaller(start + j, p.seqlen_k - 1) * k.stride; };
    if constexpr (kBlock > 1) {
      for (int64_t j = 0; j < kFewKeys; ++j) {
        read_row_typed<T>(key(j), scratch.keys + j * D, D);
        fetch<D * sizeof(T)>(key(j + kAhead));
      }
      transpose(scratch.keys, D, kFewKeys, D, scratch.columns, kFewKeys);
    }
    for (int64_t row = 0; row < count; row += kBlock) {
      if (start >= most[row / kBlock]) continue;
      VectorBlock<DotF32, kFewVecs, kBlock> s;
      if constexpr (kBlock > 1)
        s.clear(), s.template multiply<D, kFewKeys>(scratch.q + row * D, scratch.columns, D);
      else
        for (int n = 0; n < kFewVecs; ++n) s.c[0][n] = scores_of_keys<T, D>(scratch.q, n * kLanes, key);
#pragma GCC unroll 4
      for (int m = 0; m < kBlock; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < kFewVecs; ++n) {
          const int64_t seen = visible[row + m] - start - n * kLanes;
          const vfloat x = lane < int(larger(0, smaller(seen, kLanes))) ? s.c[m][n] * scale : hidden;
          greatest[row + m] = vmax(x, greatest[row + m]);
          vstore(scores + (row + m) * length + start + n * kLanes, x);
        }
    }
  }

  float top[kFewRows];  // of the scaled scores
  double sum[kFewRows];
  for (int64_t r = 0; r < count; ++r) {
    top[r] = greatest[r][0];
    for (int i = 1; i < kLanes; ++i) top[r] = greatest[r][i] > top[r] ? greatest[r][i] : top[r];
    const vfloat base = splat(top[r] == -__builtin_inff() ? 0 : top[r]);  // as in attention_forward.inl
    vfloat sums = {};
    float* row = scores + r * length;
    for (int64_t j = 0; j < most[r / kBlock]; j += kLanes) {
      const vfloat e = exp2((vload(row + j) - base) * log2e);  // <= 0: the greatest is taken off
      sums += e;
      vstore(row + j, e);
    }
    sum[r] = 0;
    for (int i = 0; i < kLanes; ++i) sum[r] += sums[i];
  }

  for (int64_t start = 0; start < all; start += kFewKeys)
    for (int64_t row = 0; row < count; row += kBlock) {
      const int64_t end = smaller(start + kFewKeys, most[row / kBlock]);
      for (int d = 0; d < D; d += out_vecs * kLanes) {
        vfloat o[kBlock][out_vecs];
#pragma GCC unroll 4
        for (int m = 0; m < kBlock; ++m)
#pragma GCC unroll 32
          for (int n = 0; n < out_vecs; ++n) o[m][n] = vload(scratch.out + (row + m) * D + d + n * kLanes);
        for (int64_t j = start; j < end; ++j) {
          const T* values = reinterpret_cast<const T*>(v.data + j * v.stride) + d;
          if (d == 0) fetch<D * sizeof(T)>(v.data + smaller(j + kAhead, p.seqlen_k - 1) * v.stride);
          vfloat x[out_vecs];
#pragma GCC unroll 32
          for (int n = 0; n < out_vecs; ++n) x[n] = vload(values + n * kLanes);
#pragma GCC unroll 4
          for (int m = 0; m < kBlock; ++m) {
            const vfloat weight = splat(scores[(row + m) * length + j]);
#pragma GCC unroll 4
            for (int n = 0; n < out_vecs; ++n) o[m][n] = fma(weight, x[n], o[m][n]);
          }
        }
#pragma GCC unroll 4
        for (int m = 0; m < kBlock; ++m)
#pragma GCC unroll 32
          for (int n = 0; n < out_vecs; ++n) vstore(scratch.out + (row + m) * D + d + n * kLanes, o[m][n]);
      }
    }

  for (int64_t r = 0; r < count; ++r) {
    const Rows out = p.rows(args.out, p.first_q, head[r], args.dtype);
    const float factor = sum[r] == 0 ? 0 : float(1 / sum[r]);
    for (int d = 0; d < D; ++d) scratch.out[r * D + d] *= factor;
    write_row(args.dtype, out.data + query[r] * out.stride, scratch.out + r * D, D);
    args.lse[(p.batch * args.heads + head[r]) * args.seqlen_q + p.first_q + query[r]] = log_sum_exp(top[r], sum[r]);
  }
}

// Where these rows are faster than panels, measured on Zen 4 after 2,048 keys.
template <class Dot>
inline bool few_queries(const AttentionArgs& args, const Problem& p) {
  return p.seqlen_q <= (Dot::k == 2 ? 8 : 16) && args.dropout_threshold == 0;
}

// The problems of few queries.
template <class Dot, typename T, int D>
void decode(const AttentionArgs& args, int threads) {
  const int64_t problems = problem_count(args), group = args.heads / args.kv_heads;
  int64_t queries = 0, most_queries = 0, most_keys = 0, products = 0;
  for (int64_t i = 0; i < problems; ++i) {
    const Problem p = problem(args, i);
    if (p.seqlen_q == 0 || !few_queries<Dot>(args, p)) continue;
    queries += p.seqlen_q;
    products += p.seqlen_q * p.seqlen_k;
    most_queries = larger(most_queries, p.seqlen_q);
    most_keys = larger(most_keys, p.seqlen_k);
  }
  if (queries == 0) return;
  const int64_t length = round_up(most_keys, kFewKeys);
  // Below about 20 microseconds of work, waking the other threads costs more than they save.
  if (args.heads * products * D < 1 << 19) threads = 1;
  // Fewer rows together where there would not be work for all threads.
  const int64_t together = larger(1, smaller(kFewRows, args.heads * queries / threads)),
                parts = (group * most_queries + together - 1) / together;
  const size_t bytes = sizeof(DecodeScratch<D>) + size_t(kFewRows * length) * 4;
  Workspace workspace(size_t(threads) * bytes);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
  for (int64_t item = 0; item < problems * args.kv_heads * parts; ++item) {
    const int64_t head = item / parts, first = item % parts * together;
    const Problem p = problem(args, head / args.kv_heads);
    const int64_t rows = group * p.seqlen_q;
    if (first >= rows || !few_queries<Dot>(args, p)) continue;
    auto* scratch = reinterpret_cast<DecodeScratch<D>*>(workspace.data + size_t(omp_get_thread_num()) * bytes);
    const auto run = rows == 1 ? decode_rows<T, D, 1> : decode_rows<T, D, 4>;
    run(args, p, head % args.kv_heads, first, smaller(together, rows - first), *scratch,
        reinterpret_cast<float*>(scratch + 1), length);
  }
}

template <class Dot, int D>
void decode(const AttentionArgs& args, int threads) {
  switch (args.dtype) {
    case DType::f32: return decode<Dot, float, D>(args, threads);
    case DType::bf16: return decode<Dot, bf16, D>(args, threads);
    case DType::f16: return decode<Dot, f16, D>(args, threads);
  }
}
