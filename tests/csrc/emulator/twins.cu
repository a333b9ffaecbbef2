// Each instruction of csrc/cuda/ptx_hopper.cuh in a small kernel, compared with plain loops on the host. Built by nvcc
// it says what the hardware does, built for the emulator what its twins do. The numbers are small integers: every sum
// is exact, whatever its order.
//
//   nvcc -std=c++17 -O2 -gencode=arch=compute_90a,code=sm_90a -Icsrc tests/csrc/emulator/twins.cu -o twins && ./twins
//   g++ -std=c++20 -O2 -DPHI1_EMULATOR -Icsrc -xc++ tests/csrc/emulator/twins.cu
//   csrc/emulator/{block,emulator,hopper}.cpp
//
// Prints a line for each, and exits with the number of those that are wrong.
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "cuda/hopper/pipeline.cuh"
#include "cuda/launch.h"

using namespace phi1::cuda;
using namespace phi1::cuda::hopper;

namespace {

// Memory that kernel and host see.
template <typename E>
class Buffer {
 public:
  explicit Buffer(int n) : n_(n) {
#if defined(PHI1_EMULATOR)
    data_ = static_cast<E*>(::operator new(sizeof(E) * size_t(n), std::align_val_t(256)));
#else
    if (cudaMallocManaged(&data_, sizeof(E) * size_t(n)) != cudaSuccess) throw std::runtime_error("cudaMallocManaged");
#endif
    std::memset(data_, 0xff, sizeof(E) * size_t(n));
  }
  Buffer(const Buffer&) = delete;
  E* data() { return data_; }
  E& operator[](int i) { return data_[i]; }
  int size() const { return n_; }
  Region region() const { return {data_, int64_t(sizeof(E)) * n_}; }

 private:
  E* data_ = nullptr;
  int n_;
};

int wrong_twins = 0;

template <typename E>
void compare(const char* name, Buffer<E>& got, const std::vector<E>& expected) {
  int wrong = 0, first = 0;
  for (int i = got.size() - 1; i >= 0; --i)
    if (got[i] != expected[size_t(i)]) ++wrong, first = i;  // NaN differs
  if (wrong == 0) {
    std::printf("%s: ok\n", name);
  } else {
    std::printf("%s: %d of %d wrong, first at %d: %g, not %g\n", name, wrong, got.size(), first, double(got[first]),
                double(expected[size_t(first)]));
    ++wrong_twins;
  }
}

template <typename Args>
void run(const char* name, void (*kernel)(Args), int blocks, int threads, int shared,
         std::initializer_list<Region> regions, const Args& args) {
  launch(name, kernel, blocks, threads, shared, nullptr, regions, args);
#if !defined(PHI1_EMULATOR)
  const cudaError_t error = cudaDeviceSynchronize();
  if (error != cudaSuccess) throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
#endif
}

// Small integers as 16-bit numbers: bf16 keeps 8 bits of them, fp16 11.
int number(int i) { return (i * 7 + i / 13 * 5 + i / 64) % 9 - 4; }
uint16_t bits_of(bf16, int x) {
  const float value = float(x);
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return uint16_t(bits >> 16);
}
uint16_t bits_of(f16, int x) {
  int exponent = 0, magnitude = x < 0 ? -x : x;
  if (magnitude == 0) return 0;
  while (magnitude >> (exponent + 1)) ++exponent;
  return uint16_t((x < 0 ? 0x8000 : 0) | (exponent + 15) << 10 | ((magnitude << (10 - exponent)) & 0x3ff));
}

struct ProductArgs {
  const uint16_t *a, *b;
  float* d;
};

// d = a b^T, then again with `accumulate`: a (64, head_dim), b (8 kN, head_dim), both K-major in shared memory, or a in
// registers.
template <typename T, int kHeadDim, int kN, bool kRegisters>
__global__ void __launch_bounds__(128) rows_kernel(const __grid_constant__ ProductArgs args) {
  using A = hopper::Tile<64, kHeadDim>;
  using B = hopper::Tile<8 * kN, kHeadDim>;
  const uint32_t a = shared_base(), b = a + uint32_t(A::kBytes);
  A::load(a, {args.a, kHeadDim}, 0, 64, thread_index());
  B::load(b, {args.b, kHeadDim}, 0, 8 * kN, thread_index());
  cp_async_commit();
  cp_async_wait<0>();
  fence_proxy_async();
  bar_sync();
  float d[kN][4];
  clear(reinterpret_cast<float (&)[1][kN][4]>(d));
  uint32_t left[kHeadDim / 16][4];
  A::read_rows(left, a, 16 * warp_index());
  wgmma_fence();
  if constexpr (kRegisters) {
    hopper::product_rows<T, B>(d, left, b);
    wgmma(T{}, d, left[1], B::rows_operand(b, 0, 1), true);
  } else {
    hopper::product_rows<T, A, B, kHeadDim>(d, a, 0, b);
    wgmma(T{}, d, A::rows_operand(a, 0, 1), B::rows_operand(b, 0, 1), true);
  }
  wgmma_commit();
  wgmma_wait<0>(d);
  for (int n = 0; n < kN; ++n)
    for (int i = 0; i < 4; ++i)
      st_global(args.d + (16 * warp_index() + lane_index() / 4 + 8 * (i / 2)) * 8 * kN + 8 * n +
                    2 * (lane_index() % 4) + i % 2,
                d[n][i]);
}

template <typename T, int kHeadDim, int kN, bool kRegisters = false>
void rows(const char* name) {
  Buffer<uint16_t> a(64 * kHeadDim), b(8 * kN * kHeadDim);
  Buffer<float> d(64 * 8 * kN);
  for (int i = 0; i < a.size(); ++i) a[i] = bits_of(T{}, number(i));
  for (int i = 0; i < b.size(); ++i) b[i] = bits_of(T{}, number(i + 5));
  run(name, rows_kernel<T, kHeadDim, kN, kRegisters>, 1, 128,
      hopper::Tile<64, kHeadDim>::kBytes + hopper::Tile<8 * kN, kHeadDim>::kBytes, {a.region(), b.region(), d.region()},
      ProductArgs{a.data(), b.data(), d.data()});
  std::vector<float> expected(size_t(d.size()));
  for (int m = 0; m < 64; ++m)
    for (int n = 0; n < 8 * kN; ++n) {
      int sum = 0;
      for (int k = 0; k < kHeadDim; ++k)
        sum += number(m * kHeadDim + k) * number(n * kHeadDim + k + 5) * (k / 16 == 1 ? 2 : 1);
      expected[size_t(m * 8 * kN + n)] = float(sum);
    }
  compare(name, d, expected);
}

// d += p b: p (64, 16 kK) in registers, b (16 kK, head_dim) MN-major in shared memory. Written by store_rows.
template <typename T, int kHeadDim, int kK>
__global__ void __launch_bounds__(128) columns_kernel(const __grid_constant__ ProductArgs args) {
  using B = hopper::Tile<16 * kK, kHeadDim>;
  const uint32_t b = shared_base();
  B::load(b, {args.b, kHeadDim}, 0, 16 * kK, thread_index());
  cp_async_commit();
  cp_async_wait<0>();
  fence_proxy_async();
  bar_sync();
  float p[2 * kK][4], d[kHeadDim / 8][4];
  const int row = 16 * warp_index() + lane_index() / 4, column = 2 * (lane_index() % 4);
  for (int n = 0; n < 2 * kK; ++n)
    for (int i = 0; i < 4; ++i)
      p[n][i] = to_float(
          ld_global(reinterpret_cast<const T*>(args.a) + (row + 8 * (i / 2)) * 16 * kK + 8 * n + column + i % 2));
  for (int n = 0; n < kHeadDim / 8; ++n)
    for (int i = 0; i < 4; ++i) d[n][i] = float(row + 8 * (i / 2));
  uint32_t a[kK][4];
  round_to<T>(a, p);
  wgmma_fence();
  hopper::product_columns<T, B>(d, a, b);
  wgmma_commit();
  wgmma_wait<0>(d);
  for (int n = 0; n < kHeadDim / 8; ++n)
    for (int i = 0; i < 4; ++i) st_global(args.d + (row + 8 * (i / 2)) * kHeadDim + 8 * n + column + i % 2, d[n][i]);
}

template <typename T, int kHeadDim, int kK>
void columns(const char* name) {
  Buffer<uint16_t> a(64 * 16 * kK), b(16 * kK * kHeadDim);
  Buffer<float> d(64 * kHeadDim);
  for (int i = 0; i < a.size(); ++i) a[i] = bits_of(T{}, number(i));
  for (int i = 0; i < b.size(); ++i) b[i] = bits_of(T{}, number(i + 5));
  run(name, columns_kernel<T, kHeadDim, kK>, 1, 128, hopper::Tile<16 * kK, kHeadDim>::kBytes,
      {a.region(), b.region(), d.region()}, ProductArgs{a.data(), b.data(), d.data()});
  std::vector<float> expected(size_t(d.size()));
  for (int m = 0; m < 64; ++m)
    for (int n = 0; n < kHeadDim; ++n) {
      int sum = m;
      for (int k = 0; k < 16 * kK; ++k) sum += number(m * 16 * kK + k) * number(k * kHeadDim + n + 5);
      expected[size_t(m * kHeadDim + n)] = float(sum);
    }
  compare(name, d, expected);
}

// A ring of two places: a warpgroup loads seven tiles, two others multiply each with the identity, so that d is the sum
// of the tiles; the loading warpgroup gives registers to the others.
constexpr int kTiles = 7, kRingRows = 64;
using RingTile = hopper::Tile<kRingRows, 64>;
using TwoPlaces = Ring<2, RingTile::kBytes>;

__global__ void __launch_bounds__(384, 1) ring_kernel(const __grid_constant__ ProductArgs args) {
  const TwoPlaces ring{shared_base(), shared_base() + uint32_t(TwoPlaces::kSharedBytes)};
  if (thread_index() == 0) ring.init(2);
  bar_sync();
  Turn<2> turn;
  if (warpgroup_index() == 0) {
    setmaxnreg_dec<40>();
    Loader loader{thread_index()};
    for (int i = 0; i < kTiles; ++i)
      loader.load(ring, turn, [&](uint32_t tile) {
        RingTile::load(tile, {args.b, 64}, i * kRingRows, kTiles * kRingRows - 3, thread_index());
      });
    loader.finish();
  } else {
    setmaxnreg_inc<232>();
    const int row = 16 * (warp_index() % 4) + lane_index() / 4, column = 2 * (lane_index() % 4);
    float identity[8][4], d[8][4];
    for (int n = 0; n < 8; ++n)
      for (int i = 0; i < 4; ++i)
        identity[n][i] = row + 8 * (i / 2) == 8 * n + column + i % 2 ? 1.0f : 0.0f, d[n][i] = 0.0f;
    uint32_t a[4][4];
    round_to<bf16>(a, identity);
    for (int i = 0; i < kTiles; ++i) {
      ring.wait_full(turn);
      wgmma_fence();
      hopper::product_columns<bf16, RingTile>(d, a, ring.tile(turn));
      wgmma_commit();
      wgmma_wait<0>(d);
      ring.release(turn);
      turn.next();
    }
    for (int n = 0; n < 8; ++n)
      for (int i = 0; i < 4; ++i)
        st_global(args.d + (warpgroup_index() - 1) * 64 * 64 + (row + 8 * (i / 2)) * 64 + 8 * n + column + i % 2,
                  d[n][i]);
  }
}

void ring() {
  Buffer<uint16_t> b(kTiles * kRingRows * 64);
  Buffer<float> d(2 * 64 * 64);
  for (int i = 0; i < b.size(); ++i) b[i] = bits_of(bf16{}, number(i));
  run("ring", ring_kernel, 1, 384, TwoPlaces::kSharedBytes + TwoPlaces::kBarrierBytes, {b.region(), d.region()},
      ProductArgs{nullptr, b.data(), d.data()});
  std::vector<float> expected(size_t(d.size()), 0.0f);
  for (int group = 0; group < 2; ++group)
    for (int i = 0; i < (kTiles * kRingRows - 3) * 64; ++i)  // the last three rows are zeros
      expected[size_t(group * 64 * 64 + i % (64 * 64))] += float(number(i));
  compare("mbarrier, fence.proxy.async, setmaxnreg", d, expected);
}

// rows_kernel's values, stored by store_rows.
struct StoreArgs {
  uint16_t* to;
  int end;
};
__global__ void __launch_bounds__(32) store_kernel(const __grid_constant__ StoreArgs args) {
  float d[8][4];
  for (int n = 0; n < 8; ++n)
    for (int i = 0; i < 4; ++i)
      d[n][i] = float((lane_index() / 4 + 8 * (i / 2) + 8 * n + 2 * (lane_index() % 4) + i % 2) % 17);
  const float factor[2] = {1.0f, 2.0f};
  store_rows<bf16>(d, factor, args.to, 72, args.end);
}

void store() {
  Buffer<uint16_t> to(16 * 72);
  run("store", store_kernel, 1, 32, 0, {to.region()}, StoreArgs{to.data(), 13});
  std::vector<uint16_t> expected(size_t(to.size()), 0xffff);
  for (int row = 0; row < 13; ++row)
    for (int i = 0; i < 64; ++i) expected[size_t(row * 72 + i)] = bits_of(bf16{}, (row + i) % 17 * (row < 8 ? 1 : 2));
  compare("shfl, store_rows", to, expected);
}

// Two warpgroups take turns by named barriers: each appends its number to a list whose length both read and write.
struct TurnsArgs {
  int* list;
};
__global__ void __launch_bounds__(256) turns_kernel(const __grid_constant__ TurnsArgs args) {
  const int group = warpgroup_index();
  if (thread_index() == 0) st_shared_4(shared_base(), 0);
  bar_sync();
  if (group == 1) bar_arrive_named(1, 256);
  for (int i = 0; i < 5; ++i) {
    bar_sync_named(1 + group, 256);
    if (thread_index() % 128 == 0) {
      const uint32_t length = ld_shared_4(shared_base());
      st_global(args.list + length, 10 * i + group);
      st_shared_4(shared_base(), length + 1);
    }
    bar_arrive_named(2 - group, 256);
  }
  if (group == 0) bar_sync_named(1, 256);
}

void turns() {
  Buffer<int> list(10);
  run("turns", turns_kernel, 1, 256, 1024, {list.region()}, TurnsArgs{list.data()});
  std::vector<int> expected;
  for (int i = 0; i < 10; ++i) expected.push_back(i / 2 * 10 + i % 2);
  compare("named barriers", list, expected);
}

__global__ void __launch_bounds__(256) places_kernel(const __grid_constant__ TurnsArgs args) {
  if (lane_index() == 0)
    st_global(args.list + block_index() * 8 + warp_index(),
              100 * block_count() + 10 * block_index() + warpgroup_index());
}

void places() {
  Buffer<int> list(24);
  run("places", places_kernel, 3, 256, 0, {list.region()}, TurnsArgs{list.data()});
  std::vector<int> expected;
  for (int i = 0; i < 24; ++i) expected.push_back(300 + 10 * (i / 8) + i % 8 / 4);
  compare("%nctaid, warpgroup_index", list, expected);
}

}  // namespace

int main() {
  places();
  rows<bf16, 64, 8>("wgmma m64n64k16 bf16, both in shared memory, K-major");
  rows<bf16, 64, 16>("wgmma m64n128k16 bf16, both in shared memory, K-major");
  rows<bf16, 128, 16>("wgmma m64n128k16 bf16, two pages of 64 columns");
  rows<f16, 64, 8>("wgmma m64n64k16 f16, both in shared memory, K-major");
  rows<f16, 128, 16>("wgmma m64n128k16 f16, two pages of 64 columns");
  rows<bf16, 64, 8, true>("wgmma m64n64k16 bf16, a in registers, b K-major");
  rows<bf16, 128, 16, true>("wgmma m64n128k16 bf16, a in registers from two pages, b K-major");
  rows<f16, 64, 16, true>("wgmma m64n128k16 f16, a in registers, b K-major");
  columns<bf16, 64, 8>("wgmma m64n64k16 bf16, a in registers, b MN-major");
  columns<bf16, 128, 8>("wgmma m64n128k16 bf16, a in registers, b MN-major on two pages");
  columns<bf16, 128, 4>("wgmma m64n128k16 bf16, a in registers, b MN-major on two pages of 64 rows");
  columns<f16, 64, 8>("wgmma m64n64k16 f16, a in registers, b MN-major");
  columns<f16, 128, 4>("wgmma m64n128k16 f16, a in registers, b MN-major on two pages of 64 rows");
  ring();
  store();
  turns();
  return wrong_twins;
}
