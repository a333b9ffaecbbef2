// Attention's forward pass by tiles: the next strip of 16 keys is multiplied, and a panel of O^T added to for the block
// of keys before, while the exponentials of a strip are computed. So tiles and vectors work at the same time.
//
// Measured on Emerald Rapids (LOG.md, 2026-11-27): with a tile instruction under way one of a core's two ports takes no
// 512-bit multiplication, maximum or vscalefps, only additions, integers and permutations; and a tile store that
// follows its product within some 60 cycles, or a product that needs the tile being stored, stops everything.

// 2^x from instructions for both ports. x = r + g, r a multiple of 1/16: 2^(r - floor(r)) by table, 2^g by a polynomial
// of degree 2. Error below 2^-18, 1 of 0; NaN of -inf. Denormal results become zero, as in DotTiles::exp2.
inline vfloat exp2_beside_tiles(vfloat x) {
  alignas(64) static constexpr float table[kLanes] = {0x1.000000p+0f, 0x1.0b5586p+0f, 0x1.172b84p+0f, 0x1.2387a6p+0f,
                                                      0x1.306fe0p+0f, 0x1.3dea64p+0f, 0x1.4bfdaep+0f, 0x1.5ab07ep+0f,
                                                      0x1.6a09e6p+0f, 0x1.7a1148p+0f, 0x1.8ace54p+0f, 0x1.9c4918p+0f,
                                                      0x1.ae89fap+0f, 0x1.c199bep+0f, 0x1.d5818ep+0f, 0x1.ea4afap+0f};
  const vfloat magic = splat(0x1.8p19f), sum = x + magic;  // whose last four bits count sixteenths
  const vfloat r = sum - magic, g = x - r;
  const vfloat p = fma(fma(splat(0x1.ebfbdep-3f), g, splat(0x1.62e430p-1f)), g, splat(1.0f));
  const vfloat part = (vfloat)_mm512_permutexvar_ps((__m512i)sum, _mm512_load_ps(table));
  return _mm512_scalef_ps(p * part, r);
}

// Whether a comparison holds in all lanes.
inline bool all(vint yes) { return _mm512_movepi32_mask((__m512i)yes) == 0xffff; }

// One thread's memory.
template <int D>
struct TilesScratch {
  static constexpr int width = D / 2;
  static constexpr int keys = D;  // of a block: a strip for each panel of O^T
  static constexpr int strips = keys / kTileLanes;
  alignas(64) float q[width * kPanel];                          // Q^T: (D / 2, queries)
  alignas(64) float scores[2][kTileLanes * kPanel];             // S^T of this strip and the next one
  alignas(64) float block_scores[strips][kTileLanes * kPanel];  // S^T of a block that is done again
  alignas(64) float p[2][keys / 2 * kPanel];                    // P^T as B, of this block and the one before
  alignas(64) float out[D * kPanel];                            // O^T, not yet divided by the sums
  alignas(64) float rows[kPanel * D];                           // O, or Q before it is transposed
  uint32_t keep[kTileLanes][kVecs];
};

// The tile instructions that go along with a strip's vector work, in parts: the panel of O^T of the strip before is
// stored, the next strip's scores are made, and stored late, and a panel of O^T is added to.
template <int D>
struct StripProducts {
  static constexpr int width = D / 2, steps = width / kTileLanes;
  static constexpr int parts = kTileLanes / 2 * kVecs;  // two rows of keys and a vector of queries each
  // Where they begin. On Emerald Rapids the exact places made no difference.
  static constexpr int kScore = 3, kScored = 10, kStoreScores = 14, kAdd = 16;

  const float *k, *q, *v, *p;    // K of the next strip, Q^T; V^T's rows and P^T of the block before
  float *scores, *out, *before;  // where S^T, this panel of O^T and the one of the strip before belong

  // Operation i of `steps` times 1 + kVecs of them: C += A B.
  template <int i>
  __attribute__((always_inline)) static void multiply(const float* a, const float* b) {
    constexpr int step = i / (1 + kVecs) * kTileLanes, n = i % (1 + kVecs) - 1;
    if constexpr (n < 0) {
      tile_load<kWhole.a, width>(a + step);
    } else {
      tile_load<kWhole.b, kPanel>(b + step * kPanel + n * kLanes);
      tile_multiply<n, kWhole.a, kWhole.b>();
    }
  }

  // Calls f(i) for those of `count` operations spread evenly over parts `begin` ... `end` - 1 that fall into `part`.
  template <int part, int begin, int end, int count, class F>
  __attribute__((always_inline)) static void spread(F&& f) {
    if constexpr (part >= begin && part < end) {
      constexpr int from = count * (part - begin) / (end - begin), to = count * (part + 1 - begin) / (end - begin);
      [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
        (f(std::integral_constant<int, from + i>()), ...);
      }(std::make_integer_sequence<int, to - from>());
    }
  }

  template <int part>
  __attribute__((always_inline)) void run() const {
    spread<part, 0, kScore, kVecs>([&](auto n) { tile_store<n, kPanel>(before + n * kLanes); });
    spread<part, kScore, kScored, 1 + (1 + kVecs) * steps>([&](auto i) {
      if constexpr (i == 0)
        TileBlock<kVecs>().clear();
      else
        multiply<i - 1>(k, q);
    });
    spread<part, kStoreScores, kAdd, kVecs>([&](auto n) { tile_store<n, kPanel>(scores + n * kLanes); });
    spread<part, kAdd, parts, kVecs + (1 + kVecs) * steps>([&](auto i) {
      if constexpr (i < kVecs)
        tile_load<i, kPanel>(out + i * kLanes);
      else
        multiply<i - kVecs>(v, p);
    });
  }
};

// A panel as in attention_forward.inl, but for what is taken off the scores: of the first block of keys their greatest,
// and anew where a block's sum has grown beyond 2^14. So P is below that, and no maximum has to be kept.
template <class Dot, int D, bool Dropout>
void forward_panel(const AttentionArgs& args, const Problem& p, int64_t plane, int64_t head, int64_t first,
                   const PackedHead& packed, TilesScratch<D>& scratch) {
  constexpr int width = D / 2, kKeys = TilesScratch<D>::keys, kStrip = kTileLanes;
  const int64_t offset = p.seqlen_k - p.seqlen_q, end = first + kPanel;
  const int64_t visible = args.causal ? larger(0, smaller(p.seqlen_k, end + offset)) : p.seqlen_k;
  const float positive = prepare_queries<Dot, D>(args, p, head, first, scratch.q, scratch.rows);
  const vfloat scale = splat(kLog2e * positive), hidden = splat(-__builtin_inff());
  const vint lane = lane_index();
  // Taken off the scores, and of lanes without a score above -inf yet 0: P = exp2(-inf), not of -inf + inf.
  vfloat taken[kVecs], base[kVecs], sum[kVecs] = {};
  for (int n = 0; n < kVecs; ++n) taken[n] = hidden, base[n] = vfloat{};

  // Whether every query sees all keys of the strip.
  const auto whole = [&](int64_t key) {
    return key + kStrip <= visible && (!args.causal || key + kStrip <= first + offset + 1);
  };
  const auto score = [&](int64_t key, float* to) {
    Block<Dot, kVecs> block;
    block.clear();
    block.template multiply<width, kPanel>(packed.k + key * width, scratch.q, width);
    block.template store<kPanel>(to);
  };
  // Row m of a strip's scores, -inf where a query does not see the key.
  const auto score_at = [&](const float* scores, int64_t key, int m, int n, auto mask) __attribute__((always_inline)) {
    const vfloat s = vload(scores + m * kPanel + n * kLanes);
    if constexpr (!mask) return s;
    const int64_t at = key + m;
    const int limit = int(at >= visible ? kPanel : args.causal ? larger(0, at - offset - first) : 0);
    return lane >= limit - n * kLanes ? s : hidden;
  };
  // P^T of a strip, and its sums added to `total`.
  const auto soften = [&](const float* scores, int64_t key, float* to, vfloat* total) {
    if constexpr (Dropout) dropout_bits(args, plane, first, key, kStrip, scratch.keep);
    const auto rows = [&](auto mask) __attribute__((always_inline)) {
      for (int m = 0; m < kStrip; m += 2)
#pragma GCC unroll 3
        for (int n = 0; n < kVecs; ++n) {
          vfloat x[2];
#pragma GCC unroll 2
          for (int i = 0; i < 2; ++i) {
            // At most 15 where the result stands, any number where the block is done again: it may be infinite.
            x[i] = Dot::exp2((score_at(scores, key, m + i, n, mask) - base[n]) * scale);
            total[n] += x[i];
            if constexpr (Dropout) x[i] = keep_lanes(scratch.keep[m + i][n], x[i]);
          }
          Dot::store_rows(to + m / 2 * kPanel + n * kLanes, x);
        }
    };
    whole(key) ? rows(std::false_type()) : rows(std::true_type());
  };
  // The same of a strip that all queries see, and `products` meanwhile.
  const auto soften_beside = [&](const StripProducts<D>& products, const float* scores, int64_t key, float* to,
                                 vfloat* total) __attribute__((always_inline)) {
    if constexpr (Dropout) dropout_bits(args, plane, first, key, kStrip, scratch.keep);
    vfloat level[kVecs], sums[kVecs];  // in registers
#pragma GCC unroll 3
    for (int n = 0; n < kVecs; ++n) level[n] = base[n], sums[n] = total[n];
    const auto part = [&](auto i) __attribute__((always_inline)) {
      constexpr int m = i / kVecs * 2, n = i % kVecs;
      products.template run<i>();
      vfloat x[2];
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        x[j] = exp2_beside_tiles((vload(scores + (m + j) * kPanel + n * kLanes) - level[n]) * scale);
        sums[n] += x[j];
        if constexpr (Dropout) x[j] = keep_lanes(scratch.keep[m + j][n], x[j]);
      }
      Dot::store_rows(to + m / 2 * kPanel + n * kLanes, x);
    };
    [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
      (part(std::integral_constant<int, i>()), ...);
    }(std::make_integer_sequence<int, StripProducts<D>::parts>());
#pragma GCC unroll 3
    for (int n = 0; n < kVecs; ++n) total[n] = sums[n];
  };

  // The block whose P^T waits to be multiplied: rows of O^T from d on. full: every query sees all its keys.
  int64_t waiting = -1;
  int d = D, seen[kVecs] = {};
  bool full = false;
  const auto add_values = [&](int until) {
    for (; d < until; d += kTileLanes) {
      const float *v = packed.v + waiting * width + d * (kKeys / 2), *p_columns = scratch.p[waiting / kKeys % 2];
      float* const out = scratch.out + d * kPanel;
      Block<Dot, kVecs> o;
      o.clear();
      if (waiting > 0) o.template load<kPanel>(out);
      if (full)
        o.template multiply<kKeys / 2, kPanel>(v, p_columns, kKeys / 2);
      else
        multiply_seen<Dot, kKeys>(v, p_columns, seen, o);
      o.template store<kPanel>(out);
    }
  };
  float* in_tiles = nullptr;  // the panel of O^T that soften_beside has left in tiles
  const auto store_tiles = [&] {
    if (in_tiles != nullptr) Block<Dot, kVecs>().template store<kPanel>(in_tiles);
    in_tiles = nullptr;
  };

  float *scores = scratch.scores[0], *next_scores = scratch.scores[1];
  for (int64_t start = 0; start < visible; start += kKeys) {
    const int64_t stop = smaller(start + kKeys, visible);
    float* const p_columns = scratch.p[start / kKeys % 2];
    vfloat total[kVecs] = {};
    // Of the first block nothing is known yet to take off.
    if (start == 0 && stop < visible) score(stop, scores);
    for (int64_t key = start; start > 0 && key < stop; key += kStrip, std::swap(scores, next_scores)) {
      float* const to = p_columns + (key - start) / 2 * kPanel;
      const int64_t next = key + kStrip;
      if (next < visible && start + kKeys <= visible && whole(key) && waiting > 0 && full) {
        float* const out = scratch.out + d * kPanel;
        soften_beside({packed.k + next * width, scratch.q, packed.v + waiting * width + d * (kKeys / 2),
                       scratch.p[waiting / kKeys % 2], next_scores, out, in_tiles ? in_tiles : scratch.rows},
                      scores, key, to, total);
        in_tiles = out;
        d += kTileLanes;
        continue;
      }
      store_tiles();
      if (next < visible) score(next, next_scores);
      add_values(int(smaller(D, next - start)));
      soften(scores, key, to, total);
    }

    bool again = false;
    for (int n = 0; n < kVecs; ++n)  // also of NaN, which exp2_beside_tiles makes of -inf
      again |= seen_keys<Dot>(args, p, first + n * kLanes, start, stop - start) > 0 &&
               !all((total[n] <= 0x1p14f) & (taken[n] > hidden));
    if (again || d < D) store_tiles(), add_values(D);
    if (again) {
      const auto strip = [&](int64_t key) { return scratch.block_scores[(key - start) / kStrip]; };
      for (int64_t key = start; key < stop; key += kStrip) score(key, strip(key));
      for (int n = 0; n < kVecs; ++n) {
        vfloat greatest = taken[n];
        for (int64_t key = start; key < stop; key += kStrip)
          for (int m = 0; m < kStrip; ++m) greatest = vmax(score_at(strip(key), key, m, n, std::true_type()), greatest);
        base[n] = greatest == hidden ? vfloat{} : greatest;
        const vfloat shrink = Dot::exp2((taken[n] - base[n]) * scale);  // <= 0, and -inf where nothing was taken
        taken[n] = greatest;
        sum[n] *= shrink;
        total[n] = vfloat{};
        for (int i = 0; i < D && start > 0; ++i) {
          float* const at = scratch.out + i * kPanel + n * kLanes;
          vstore(at, vload(at) * shrink);
        }
      }
      for (int64_t key = start; key < stop; key += kStrip)
        soften(strip(key), key, p_columns + (key - start) / 2 * kPanel, total);
    }
    waiting = start, d = 0, full = start + kKeys <= visible && whole(stop - kStrip);
    for (int n = 0; n < kVecs; ++n) {
      sum[n] += total[n];
      if (!full) seen[n] = seen_keys<Dot>(args, p, first + n * kLanes, start, stop - start);
    }
  }
  store_tiles();
  add_values(D);
  finish_panel<D>(args, p, head, first, visible, taken, sum, positive, scratch.out, scratch.rows);
}
