// Every CUDA kernel once under the emulator, on heap blocks that end where the data ends, for AddressSanitizer; or one
// access too far, which must die. The argument says which: none, global, shared, local.
#include <cmath>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "cuda/block.cuh"
#include "cuda/kernels.h"

using namespace phi1;
using namespace phi1::cuda;

namespace {

// `count` elements, not one byte more.
template <typename T>
struct Buffer {
  std::unique_ptr<T[]> data;
  explicit Buffer(int64_t count) : data(new T[size_t(count)]) {
    for (int64_t i = 0; i < count; ++i) {
      const float x = std::sin(float(i) + 0.5f);
      if constexpr (sizeof(T) == 2)
        data[size_t(i)].bits = uint16_t(float_to_bits(x) >> 16);
      else
        data[size_t(i)] = T(x);
    }
  }
  T* get() const { return data.get(); }
};

constexpr int64_t kBatch = 2, kSeq = 37, kHeads = 2, kKvHeads = 1, kDim = 64, kInner = 24, kHidden = 40, kHalf = 16;
constexpr int64_t kTokens = kBatch * kSeq, kQkv = (kHeads + 2 * kKvHeads) * kDim, kWidth = kQkv + kInner;
constexpr int64_t kChunks = 5, kLeft = kHeads * kDim, kBoth = kLeft + kInner;

void layer_norm(int64_t rows) {
  Buffer<bf16> x(kTokens * kHidden), weight(kHidden), bias(kHidden), y(kTokens * kHidden), grad(kTokens * kHidden);
  Buffer<bf16> grad_weight(kHidden), grad_bias(kHidden), residual(kTokens * kHidden);
  Buffer<float> stats(kTokens * 2), partial(kChunks * 2 * kHidden);
  LayerNormArgs args{};
  args.x = x.get(), args.weight = weight.get(), args.bias = bias.get(), args.y = y.get(), args.stats = stats.get();
  args.rows = rows, args.hidden = args.x_stride = kHidden, args.chunks = kChunks;
  args.eps = 1e-5f, args.dtype = DType::bf16;
  layer_norm_forward(args, nullptr);
  args.grad_y = grad.get(), args.residual = residual.get(), args.partial = partial.get();
  args.grad_weight = grad_weight.get(), args.grad_bias = grad_bias.get();
  layer_norm_backward(args, nullptr);
}

void block() {
  Buffer<bf16> z(kTokens * kWidth), bias(kWidth), grad_z(kTokens * kWidth), grad_bias(kWidth), g(kTokens * kBoth);
  Buffer<float> cos(kSeq * kHalf), sin(kSeq * kHalf), partial(kChunks * kWidth);
  AfterInArgs args{};
  args.z = z.get(), args.bias = bias.get(), args.activated = g.get() + kLeft, args.activated_stride = kBoth;
  args.batch = kBatch, args.seq = kSeq, args.turned_heads = kHeads + kKvHeads, args.head_dim = kDim, args.half = kHalf;
  args.width = kWidth, args.inner = kInner;
  args.cos = cos.get(), args.sin = sin.get(), args.table_rows = kSeq;
  args.dtype = DType::bf16;
  after_in(args, nullptr);
  args.grad_z = grad_z.get(), args.grad_bias = grad_bias.get(), args.partial = partial.get(), args.chunks = kChunks;
  after_in_backward(args, nullptr);

  Buffer<bf16> h(kTokens * kHidden), x(kTokens * kHidden);
  for (const uint32_t threshold : {0u, 80u}) {
    ResidualArgs out{};
    out.h = h.get(), out.x = x.get(), out.bias = bias.get(), out.grad_y = x.get(), out.grad_bias = grad_bias.get();
    out.partial = partial.get();
    out.rows = kTokens, out.columns = kHidden, out.chunks = kChunks;
    out.dropout_threshold = threshold, out.dropout_scale = 1.5f, out.seed = 3;
    out.dtype = DType::bf16;
    residual(out, nullptr);
    residual_backward(out, nullptr);
  }
}

void cross_entropy() {
  Buffer<bf16> logits(kTokens * kHidden), bias(kHidden);
  Buffer<int64_t> targets(kTokens);
  Buffer<float> loss(kTokens), stats(kTokens * 2), partial(kChunks * kHidden);
  for (int64_t i = 0; i < kTokens; ++i) targets.get()[i] = i % 7 ? i % kHidden : -100;
  CrossEntropyArgs args{};
  args.logits = logits.get(), args.bias = bias.get(), args.targets = targets.get();
  args.loss = loss.get(), args.stats = stats.get(), args.bias_sums = partial.get();
  args.rows = kTokens, args.columns = kHidden, args.chunks = kChunks, args.ignore_index = -100;
  args.dtype = DType::bf16;
  cuda::cross_entropy(args, nullptr);
  cross_entropy_backward(args, nullptr);
}

// A (batch, seq, heads, head_dim) view of rows `width` apart.
HeadsTensor heads(const Buffer<bf16>& rows, int64_t column, int64_t width) {
  return {rows.get() + column, kSeq * width, width, kDim};
}

void attention() {
  Buffer<bf16> z(kTokens * kQkv), grad_z(kTokens * kQkv), out(kTokens * kLeft), grad_out(kTokens * kLeft);
  Buffer<float> lse(kTokens * kHeads), row_stats(kTokens * kHeads * 2);
  const int64_t k = kLeft, v = kLeft + kKvHeads * kDim;
  AttentionArgs args{};
  args.q = heads(z, 0, kQkv), args.k = heads(z, k, kQkv), args.v = heads(z, v, kQkv), args.out = heads(out, 0, kLeft);
  args.grad_q = heads(grad_z, 0, kQkv), args.grad_k = heads(grad_z, k, kQkv), args.grad_v = heads(grad_z, v, kQkv);
  args.grad_out = heads(grad_out, 0, kLeft);
  args.lse = lse.get(), args.row_stats = row_stats.get();
  args.batch = kBatch, args.seqlen_q = args.seqlen_k = kSeq;
  args.heads = kHeads, args.kv_heads = kKvHeads, args.head_dim = kDim;
  args.scale = 0.125f, args.dropout_threshold = 35, args.dropout_scale = 1.2f, args.seed = 5;
  args.causal = true, args.dtype = DType::bf16;
  attention_forward(args, nullptr);
  attention_backward(args, nullptr);

  Buffer<float> cos(kSeq * kHalf), sin(kSeq * kHalf);
  RotaryArgs turn{};
  turn.in[0] = turn.out[0] = args.q, turn.in[1] = turn.out[1] = args.k;
  turn.heads[0] = kHeads, turn.heads[1] = kKvHeads;
  turn.batch = kBatch, turn.seq = kSeq, turn.head_dim = kDim, turn.half = kHalf;
  turn.cos = cos.get(), turn.sin = sin.get(), turn.dtype = DType::bf16;
  rotary(turn, nullptr);
}

// With half of the shared memory that it needs: an error of the emulator.
void too_little_shared_memory() {
  Buffer<float> partial(kChunks * kHidden);
  Buffer<bf16> sum(kHidden);
  const BlockSumArgs args{partial.get(), sum.get(), kChunks, kHidden};
  const std::vector<emulator::Region> regions = {{partial.get(), kChunks * kHidden * 4}, {sum.get(), kHidden * 2}};
  emulator::run({"block_sum", 2, kSumThreads, kSumSharedBytes / 2, regions}, [&] { block_sum_kernel<bf16>(args); });
}

// Eight numbers of a thread's own, and the ninth.
void past_a_local_array() {
  emulator::run({"local", 1, 64, 0, {}}, [] {
    volatile float x[8] = {};
    bar_sync();  // every thread on its own stack
    x[thread_index() % 9] = 1.0f;
    (void)x[0];
  });
}

}  // namespace

int main(int, char** arguments) {
  const std::string planted = arguments[1];
  try {  // the stacks of fibers that never came to their end are used again below
    too_little_shared_memory();
    return 2;
  } catch (const emulator::Error&) {
  }
  layer_norm(planted == "global" ? kTokens + 1 : kTokens);  // a row more than the tensor has
  block();
  cross_entropy();
  attention();
  if (planted == "shared") too_little_shared_memory();
  if (planted == "local") past_a_local_array();
  std::printf("ok\n");
}
