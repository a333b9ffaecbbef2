// Flash attention, forward, for a token or a few at a time after a long cache: bound by reading K and V once.
//
// Each (batch entry, head, query) is one piece of work: a row of scores with head_dim along the lanes, its softmax,
// and the weighted sum of V's rows. Nothing is packed: the panels of attention_forward.inl would copy all of K and V
// and leave most of their lanes empty.

constexpr int64_t kFewQueries = 4;

template <typename T, int D>
void decode_query(const AttentionArgs& args, const Problem& p, int64_t head, int64_t query, float* scores) {
  constexpr int vectors = D / kLanes;
  const int64_t kv_head = head / (args.heads / args.kv_heads);
  const Rows k = p.rows(args.k, 0, kv_head, args.dtype), v = p.rows(args.v, 0, kv_head, args.dtype);
  const Rows q = p.rows(args.q, 0, head, args.dtype), out = p.rows(args.out, 0, head, args.dtype);
  const int64_t visible =
      args.causal ? larger(0, smaller(p.seqlen_k, query + 1 + p.seqlen_k - p.seqlen_q)) : p.seqlen_k;
  const vfloat hidden = splat(-__builtin_inff()), log2e = splat(kLog2e);
  const vint lane = lane_index();

  vfloat x[vectors];
  for (int d = 0; d < vectors; ++d) x[d] = vload(reinterpret_cast<const T*>(q.data + query * q.stride) + d * kLanes);
  vfloat greatest = hidden;
  for (int64_t start = 0; start < visible; start += kLanes) {
    vfloat part[kLanes];  // of key start + i: products that are still to be summed over the lanes
    for (int i = 0; i < kLanes; ++i) {
      const T* row = reinterpret_cast<const T*>(k.data + smaller(start + i, visible - 1) * k.stride);
      part[i] = x[0] * vload(row);
#pragma GCC unroll 32
      for (int d = 1; d < vectors; ++d) part[i] = fma(x[d], vload(row + d * kLanes), part[i]);
    }
    transpose(part);
    vfloat s = part[0];
#pragma GCC unroll 16
    for (int i = 1; i < kLanes; ++i) s += part[i];
    s = lane < int(smaller(visible - start, kLanes)) ? s * splat(args.scale) : hidden;
    greatest = vmax(s, greatest);
    vstore(scores + start, s);
  }

  float base = greatest[0];
  for (int i = 1; i < kLanes; ++i) base = greatest[i] > base ? greatest[i] : base;
  base = visible == 0 ? 0 : base * kLog2e;
  vfloat sums = {};
  for (int64_t start = 0; start < visible; start += kLanes) {
    const vfloat e = exp2(fma(vload(scores + start), log2e, splat(-base)));
    sums += e;
    vstore(scores + start, e);
  }
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += sums[i];

  vfloat o[vectors] = {};
  for (int64_t j = 0; j < visible; ++j) {
    const T* row = reinterpret_cast<const T*>(v.data + j * v.stride);
#pragma GCC unroll 32
    for (int d = 0; d < vectors; ++d) o[d] = fma(splat(scores[j]), vload(row + d * kLanes), o[d]);
  }
  float row[D];
  for (int d = 0; d < vectors; ++d) vstore(row + d * kLanes, o[d] * splat(sum == 0 ? 0 : float(1 / sum)));
  write_row(args.dtype, out.data + query * out.stride, row, D);
  args.lse[(p.batch * args.heads + head) * args.seqlen_q + query] =
      float((base + __builtin_log2(sum)) * 0.69314718055994531);
}

template <typename T, int D>
void decode(const AttentionArgs& args, int threads) {
  const int64_t items = args.batch * args.heads * args.seqlen_q, length = round_up(args.seqlen_k, kLanes);
  // Below about 20 microseconds of work, waking the other threads costs more than they save.
  if (items * args.seqlen_k * D < 1 << 19) threads = 1;
  Workspace workspace(size_t(threads) * size_t(length) * 4);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t item = 0; item < items; ++item) {
    float* scores = reinterpret_cast<float*>(workspace.data) + omp_get_thread_num() * length;
    const int64_t row = item / args.seqlen_q;
    decode_query<T, D>(args, problem(args, row / args.heads), row % args.heads, item % args.seqlen_q, scores);
  }
}

template <int D>
void decode(const AttentionArgs& args, int threads) {
  switch (args.dtype) {
    case DType::f32: return decode<float, D>(args, threads);
    case DType::bf16: return decode<bf16, D>(args, threads);
    case DType::f16: return decode<f16, D>(args, threads);
  }
}

inline bool few_queries(const AttentionArgs& args) {
  return args.starts_q == nullptr && args.seqlen_q <= kFewQueries && args.dropout_threshold == 0;
}
