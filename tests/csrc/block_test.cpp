// csrc/cpu's LayerNorm, block and loss kernels without Python: one instruction set against the definitions in double,
// on buffers that end where the data ends, for sanitizers and mutations. Exits with 1 if a number is off. With the
// argument bf16: in this one only.
// Build: g++ -std=c++20 -fopenmp -Icsrc -DPHI1_ISA=tested [-march=native] tests/csrc/block_test.cpp
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "cpu/kernels.cpp"
#include "dropout.h"
#include "tiles.h"

namespace {

using phi1::DType;
using namespace phi1::cpu;
using namespace phi1::cpu::PHI1_ISA;

std::mt19937 generator(7);

// `count` elements in a heap block that has no byte to spare.
template <typename T>
struct Buffer {
  std::unique_ptr<T[]> data;
  int64_t count;
  explicit Buffer(int64_t n, float shift = 0) : data(new T[size_t(n)]), count(n) {
    std::normal_distribution<float> normal(shift);
    for (int64_t i = 0; i < n; ++i) store(data[size_t(i)], normal(generator));
  }
  double operator[](int64_t i) const { return load(data[size_t(i)]); }
  std::vector<double> copy() const {
    std::vector<double> x;
    for (int64_t i = 0; i < count; ++i) x.push_back((*this)[i]);
    return x;
  }
  T* get() const { return data.get(); }
};

// The greatest error of a kernel's results, relative to 1 + |expected|.
struct Errors {
  double worst = 0;
  void operator()(double found, double expected) {
    const double error = std::abs(found - expected) / (1 + std::abs(expected));
    worst = std::isnan(error) ? INFINITY : std::max(worst, error);
  }
};

// 0 if whole vectors are rounded to T as single numbers are, ties, infinities and NaN among them.
template <typename T>
double rounding_error(DType) {
  const float special[] = {0.0f, -0.0f, INFINITY, -INFINITY, NAN, 1.00390625f, 1.01171875f, 1.00048828125f, 3e38f};
  std::normal_distribution<float> normal;
  for (int i = 0; i < 4000; ++i) {
    float in[kLanes];
    for (float& x : in) x = i % 2 ? normal(generator) : special[generator() % std::size(special)];
    T vector[kLanes], single[kLanes];
    vstore(vector, vload(in));
    for (int lane = 0; lane < kLanes; ++lane) store(single[lane], in[lane]);
    if (std::memcmp(vector, single, sizeof single) != 0) return INFINITY;
  }
  return 0;
}

template <typename T>
double layer_norm_error(DType dtype) {
  const int64_t rows = 67, hidden = 50, stride = 53;
  const Buffer<T> x((rows - 1) * stride + hidden, 3), weight(hidden), bias(hidden), grad(rows * hidden),
      residual(rows * hidden), y(rows * hidden), dx(rows * hidden), dweight(hidden), dbias(hidden);
  const Buffer<float> stats(2 * rows);
  phi1::LayerNormArgs args = {};
  args.x = x.get(), args.weight = weight.get(), args.bias = bias.get(), args.y = y.get(), args.stats = stats.get();
  args.rows = rows, args.hidden = hidden, args.x_stride = stride, args.eps = 0.1f, args.dtype = dtype;
  layer_norm_forward(args, 2);
  args.grad_y = grad.get(), args.residual = residual.get(), args.y = dx.get();
  args.grad_weight = dweight.get(), args.grad_bias = dbias.get();
  layer_norm_backward(args, 2);

  Errors compare;
  std::vector<double> dw(hidden), db(hidden), n(hidden);
  for (int64_t r = 0; r < rows; ++r) {
    double mean = 0, variance = 0, d_mean = 0, dn_mean = 0;
    for (int64_t i = 0; i < hidden; ++i) mean += x[r * stride + i] / hidden;
    for (int64_t i = 0; i < hidden; ++i) variance += std::pow(x[r * stride + i] - mean, 2) / hidden;
    const double factor = 1 / std::sqrt(variance + 0.1);
    compare(stats[2 * r], mean);
    compare(stats[2 * r + 1], factor);
    for (int64_t i = 0; i < hidden; ++i) {
      const double g = grad[r * hidden + i];
      n[i] = (x[r * stride + i] - mean) * factor;
      compare(y[r * hidden + i], n[i] * weight[i] + bias[i]);
      dw[i] += g * n[i], db[i] += g;
      d_mean += g * weight[i] / hidden, dn_mean += g * weight[i] * n[i] / hidden;
    }
    for (int64_t i = 0; i < hidden; ++i) {
      const double d = factor * (grad[r * hidden + i] * weight[i] - d_mean - n[i] * dn_mean);
      compare(dx[r * hidden + i], d + residual[r * hidden + i]);
    }
  }
  for (int64_t i = 0; i < hidden; ++i) compare(dweight[i], dw[i]), compare(dbias[i], db[i]);
  return compare.worst;
}

double activation_of(phi1::Activation activation, double y) {
  if (activation == phi1::Activation::relu2) return y > 0 ? y * y : 0;
  return y / 2 * (1 + std::tanh(std::sqrt(2 / M_PI) * (y + 0.044715 * y * y * y)));
}

template <typename T>
double block_error(DType dtype, bool positions, phi1::Activation activation) {
  const int64_t batch = 2, seq = 35, turned = 3, dim = 32, half = 5, inner = 83, stride = 90;
  const int64_t tokens = batch * seq, first_u = (turned + 1) * dim, width = first_u + inner;
  const Buffer<T> z(tokens * width), bias(width), activated((tokens - 1) * stride + inner), dz(tokens * width),
      dbias(width);
  const Buffer<float> cos(40 * half), sin(40 * half);
  const std::unique_ptr<int64_t[]> position(new int64_t[size_t(tokens)]);
  for (int64_t i = 0; i < tokens; ++i) position[size_t(i)] = i * 7 % 40;
  const std::vector<double> z_before = z.copy();
  phi1::AfterInArgs args = {};
  args.z = z.get(), args.bias = bias.get(), args.activated = activated.get(), args.activated_stride = stride;
  args.batch = batch, args.seq = seq, args.turned_heads = turned, args.head_dim = dim, args.half = half;
  args.width = width, args.inner = inner, args.cos = cos.get(), args.sin = sin.get(), args.dtype = dtype;
  args.activation = activation;
  if (positions) args.position = position.get(), args.position_batch_stride = seq;
  const auto row_of = [&](int64_t t) { return positions ? t * 7 % 40 : t % seq; };

  Errors compare;
  after_in(args, 2);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t c = 0; c < first_u; ++c) {
      const auto biased = [&](int64_t i) { return z_before[size_t(t * width + i)] + bias[i]; };
      double expected = biased(c);
      if (c < turned * dim && c % dim < 2 * half) {
        const int64_t i = c % dim % half;
        const double co = cos[row_of(t) * half + i], si = sin[row_of(t) * half + i];
        expected = c % dim < half ? biased(c) * co - biased(c + half) * si : biased(c) * co + biased(c - half) * si;
      }
      compare(z[t * width + c], expected);
    }
    for (int64_t i = 0; i < inner; ++i) {
      const double u = z_before[size_t(t * width + first_u + i)];
      compare(z[t * width + first_u + i], u);
      compare(activated[t * stride + i], activation_of(activation, u + bias[first_u + i]));
    }
  }

  const Buffer<T> grads((tokens - 1) * stride + inner);  // of activated, then activated
  const std::vector<double> dz_before = dz.copy(), grads_before = grads.copy();
  args.activated = grads.get(), args.grad_z = dz.get(), args.grad_bias = dbias.get();
  after_in_backward(args, 2);
  std::vector<double> sums(static_cast<size_t>(width));
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t c = 0; c < width; ++c) {
      const auto before = [&](int64_t i) { return dz_before[size_t(t * width + i)]; };
      double expected = before(c);
      if (c < turned * dim && c % dim < 2 * half) {
        const int64_t i = c % dim % half;
        const double co = cos[row_of(t) * half + i], si = sin[row_of(t) * half + i];
        expected = c % dim < half ? before(c) * co + before(c + half) * si : before(c) * co - before(c - half) * si;
      } else if (c >= first_u) {
        const double y = z[t * width + c] + bias[c], step = 1e-5;
        const double slope = (activation_of(activation, y + step) - activation_of(activation, y - step)) / (2 * step);
        expected = grads_before[size_t(t * stride + c - first_u)] * slope;
        compare(grads[t * stride + c - first_u], activation_of(activation, y));
      }
      compare(dz[t * width + c], expected);
      sums[size_t(c)] += expected;
    }
  for (int64_t c = 0; c < width; ++c) compare(dbias[c], sums[size_t(c)]);
  return compare.worst;
}

template <typename T>
double residual_error(DType dtype, uint32_t threshold) {
  const int64_t rows = 67, columns = 77;
  const Buffer<T> h(rows * columns), bias(columns), x(rows * columns), grad(rows * columns), dh(rows * columns),
      dbias(columns);
  const std::vector<double> before = h.copy();
  phi1::ResidualArgs args = {};
  args.h = h.get(), args.bias = bias.get(), args.x = x.get(), args.rows = rows, args.columns = columns;
  args.dropout_threshold = threshold, args.dropout_scale = 1.25f, args.seed = 0x123456789abcdefull;
  args.dtype = dtype;
  residual(args, 2);
  args.grad_y = grad.get(), args.h = dh.get(), args.grad_bias = dbias.get();
  residual_backward(args, 2);
  Errors compare;
  std::vector<double> sums(static_cast<size_t>(columns));
  for (int64_t i = 0; i < rows * columns; ++i) {
    double factor = 1;
    if (threshold > 0) factor = residual_kept(args.seed, threshold, i / columns, i % columns) ? 1.25 : 0;
    compare(h[i], x[i] + factor * (before[size_t(i)] + bias[i % columns]));
    if (threshold > 0) compare(dh[i], factor * grad[i]);
    sums[size_t(i % columns)] += factor * grad[i];
  }
  for (int64_t c = 0; c < columns; ++c) compare(dbias[c], sums[size_t(c)]);
  return compare.worst;
}

template <typename T>
double cross_entropy_error(DType dtype, float z_loss, bool padded) {
  const int64_t rows = 261, columns = 803;
  const Buffer<T> logits(rows * columns), bias(columns);
  const Buffer<float> loss(rows), dbias(columns);
  const std::unique_ptr<int64_t[]> targets(new int64_t[rows]);
  const int64_t seen = padded ? 300 : 0;  // whole strips of columns have no logit above -inf
  for (int64_t c = 0; c < seen; ++c) store(bias.get()[c], -INFINITY);
  for (int64_t r = 0; r < rows; ++r) targets[size_t(r)] = r % 9 == 2 ? -7 : seen + r * 256 % (columns - seen);
  targets[260] = columns - 1;
  for (int64_t c = 0; c < columns; ++c) store(logits.get()[c * rows + 2], NAN);  // of an ignored row
  // The maximum of some rows comes last.
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t r : {int64_t(1), int64_t(258)}) store(logits.get()[c * rows + r], float(c) / 30);
  const std::vector<double> before = logits.copy();
  std::vector<double> sums = dbias.copy();
  phi1::CrossEntropyArgs args = {};
  args.logits = logits.get(), args.bias = bias.get(), args.targets = targets.get(), args.loss = loss.get();
  args.bias_sums = dbias.get(), args.rows = rows, args.columns = columns, args.ignore_index = -7, args.dtype = dtype;
  args.z_loss = z_loss;
  cross_entropy(args, 2);
  Errors compare;
  for (int64_t r = 0; r < rows; ++r) {
    const auto biased = [&](int64_t c) { return before[size_t(c * rows + r)] + bias[c]; };
    const int64_t target = targets[size_t(r)];
    double sum = 0;
    for (int64_t c = 0; c < columns; ++c) sum += std::exp(biased(c));
    const double lse = std::log(sum);
    compare(loss[r], target < 0 ? 0 : lse - biased(target) + z_loss * lse * lse);
    for (int64_t c = 0; c < columns; ++c) {
      const double d = target < 0 ? 0 : std::exp(biased(c)) / sum * (1 + 2 * z_loss * lse) - (c == target);
      compare(1000 * logits[c * rows + r], 1000 * d);  // most of the probabilities are below 1e-3
      sums[size_t(c)] += d;
    }
  }
  for (int64_t c = 0; c < columns; ++c) compare(dbias[c], sums[size_t(c)]);
  return compare.worst;
}

// 0 if a sum of products has the bits of the same sum in float32, rounded as a single number is.
template <typename T>
double add_product_error(DType dtype) {
  const int64_t count = 4096 + 27;
  const Buffer<T> grad(count), low(count);  // nothing of what they hold may be read
  std::vector<float> sums(count);
  phi1::AddProductArgs args = {};
  args.high = reinterpret_cast<uint16_t*>(grad.get()), args.low = reinterpret_cast<uint16_t*>(low.get());
  args.count = count, args.dtype = dtype;
  for (int chunk = 0; chunk < 5; ++chunk) {
    const Buffer<T> product(count);
    for (int64_t i = 0; i < count; ++i) sums[size_t(i)] += float(product[i]);
    args.product = product.get(), args.first = chunk == 0, args.last = chunk == 4;
    add_product(args, 2);
  }
  for (int64_t i = 0; i < count; ++i) {
    T rounded;
    store(rounded, sums[size_t(i)]);
    if (std::memcmp(&rounded, grad.get() + i, sizeof rounded) != 0) return INFINITY;
  }
  return 0;
}

// Rows of x from one to as many as fit, columns that come out even with no register block, a width of several pieces
// that ends within a line.
// INFINITY if a row's numbers depend on how many rows there are.
template <typename T>
double product_error(DType dtype, int64_t columns) {
  const int64_t most = kMostRows, width = 2 * kPiece + 5, x_stride = width + 3, weight_stride = width + 2;
  const Buffer<T> x((most - 1) * x_stride + width), weight((columns - 1) * weight_stride + width);
  for (int64_t i = 0; i < weight.count; ++i)  // what lies between rows is nobody's number
    if (i % weight_stride >= width) store(weight.data[size_t(i)], NAN);
  Errors compare;
  std::vector<double> whole;
  for (int64_t rows = most; rows > 0; --rows) {
    const Buffer<T> y(rows * columns);
    phi1::ProductArgs args = {x.get(), weight.get(), y.get(), rows, columns, width, x_stride, weight_stride, dtype};
    product(args, 2);
    const std::vector<double> found = y.copy();
    if (rows == most) whole = found;
    if (!std::equal(found.begin(), found.end(), whole.begin())) return INFINITY;
    for (int64_t r = 0; r < rows && rows == most; ++r)
      for (int64_t c = 0; c < columns; ++c) {
        double sum = 0, size = 0;
        for (int64_t k = 0; k < width; ++k) {
          const double term = x[r * x_stride + k] * weight[c * weight_stride + k];
          sum += term, size += term * term;
        }
        compare(found[size_t(r * columns + c)] / std::sqrt(size), sum / std::sqrt(size));  // of order one
      }
  }
  return compare.worst;
}

template <typename T>
bool all(DType dtype, double tolerance) {
  const std::pair<const char*, std::function<double()>> kernels[] = {
      {"rounding", [&] { return rounding_error<T>(dtype); }},
      {"layer_norm", [&] { return layer_norm_error<T>(dtype); }},
      {"block", [&] { return block_error<T>(dtype, false, phi1::Activation::gelu_new); }},
      {"block with positions", [&] { return block_error<T>(dtype, true, phi1::Activation::gelu_new); }},
      {"block with ReLU^2", [&] { return block_error<T>(dtype, false, phi1::Activation::relu2); }},
      {"residual", [&] { return residual_error<T>(dtype, 0); }},
      {"residual with dropout", [&] { return residual_error<T>(dtype, 51); }},
      {"add_product", [&] { return dtype == DType::f32 ? 0 : add_product_error<T>(dtype); }},
      {"product", [&] { return product_error<T>(dtype, 23); }},
      {"cross_entropy", [&] { return cross_entropy_error<T>(dtype, 0, false); }},
      {"cross_entropy with z-loss", [&] { return cross_entropy_error<T>(dtype, 0.01f, false); }},
      {"cross_entropy of padded columns", [&] { return cross_entropy_error<T>(dtype, 0, true); }},
  };
  bool good = true;
  for (const auto& [name, error] : kernels) {
    const double worst = error();
    std::printf("dtype %d, %s: %.3g\n", int(dtype), name, worst);
    good = good && worst <= tolerance;
  }
  return good;
}

}  // namespace

int main(int count, char** arguments) {
  if (tiles_refused()) {
    std::puts("Linux refuses AMX's registers");
    return 2;
  }
  const bool every = count == 1 || std::strcmp(arguments[1], "bf16") != 0;
  // Tolerances: three times the greatest errors measured on Zen 4, portable: 2.9e-6, 0.013, 0.0022.
  bool good = !every || all<float>(DType::f32, 9e-6);
  good = all<bf16>(DType::bf16, 0.04) && good;
  if (every) good = all<f16>(DType::f16, 0.0066) && good;
  // Fewer columns than a register block.
  if (every) good = product_error<float>(DType::f32, 7) <= 9e-6 && good;
  good = product_error<bf16>(DType::bf16, 7) <= 0.04 && good;
  std::printf("%s\n", good ? "ok" : "failed");
  return good ? 0 : 1;
}
