// The emulator of AMX against plain loops, and that it dies where a CPU would fault. Exits with 1 if something is
// wrong. Build: g++ -std=c++20 -mamx-tile -mamx-bf16 emulator_test.cpp emulator.cpp (its own flags: see test_amx.py)
#include <immintrin.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

namespace {

// GCC 12's tile intrinsics do not say that they read memory: before them, what is on its way there must arrive.
void settle() { __asm__ volatile("" ::: "memory"); }

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t colsb[16] = {};
  uint8_t rows[16] = {};

  Config tile(int number, int rows_, int colsb_) const {
    Config with = *this;
    with.rows[number] = uint8_t(rows_), with.colsb[number] = uint16_t(colsb_);
    return with;
  }
  void use() const { __asm__ volatile("ldtilecfg %0" ::"m"(*this)); }
};

thread_local bool good = true;
void check(bool fact, const char* what) {
  if (!fact) std::printf("wrong: %s\n", what);
  good = good && fact;
}

// 16 rows of 64 bytes with others around and between them.
struct Memory {
  static constexpr int stride = 100;
  alignas(64) uint8_t bytes[4 * 16 * stride];
  explicit Memory(unsigned seed) {
    std::mt19937 random(seed);
    for (uint8_t& byte : bytes) byte = uint8_t(random());
  }
};

using Lanes = std::vector<uint32_t>;

// ---------------------------------------------------------------------------------------------- TDPBF16PS

float without_denormals(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

float widen(uint32_t pair, int which) {
  const uint32_t bits = which ? pair & 0xffff0000u : pair << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return without_denormals(x);
}

// c (m, n) += a (m, k) b (k, n), as Intel's manual writes it.
void expected_products(std::vector<float>& c, const Lanes& a, const Lanes& b, int m, int k, int n) {
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j) {
      float sums[2] = {};
      for (int l = 0; l < k; ++l)
        for (int half = 0; half < 2; ++half) {
          const float x = widen(a[size_t(i * k + l)], half), y = widen(b[size_t(l * n + j)], half);
          sums[half] = without_denormals(std::fma(x, y, sums[half]));
        }
      float& to = c[size_t(i * n + j)];
      to = without_denormals(without_denormals(to) + without_denormals(sums[0] + sums[1]));
    }
}

// Two bf16 of random sign and mantissa: 1/2 to 2, or, where `tiny`, 2^-66 to 2^-62 and a few below 2^-126, so that
// products and their sums lie around the smallest normal number.
uint32_t random_pair(std::mt19937& random, bool tiny) {
  const auto bf16 = [&] {
    const uint32_t exponent = !tiny ? 126 + random() % 2 : random() % 8 ? 61 + random() % 4 : 0;
    return (uint32_t(random()) & 0x807fu) | exponent << 7;
  };
  const uint32_t low = bf16();
  return bf16() << 16 | low;
}

void products(int m, int k, int n, bool tiny) {
  Config().tile(0, m, n * 4).tile(6, m, k * 4).tile(3, k, n * 4).use();
  std::mt19937 random(unsigned(m * 256 + k * 16 + n));
  Lanes a(size_t(m * k)), b(size_t(k * n));
  for (uint32_t& x : a) x = random_pair(random, tiny);
  for (uint32_t& x : b) x = random_pair(random, tiny);
  std::vector<float> c(size_t(m * n)), expected;
  for (float& x : c) x = std::ldexp(float(int32_t(random())), tiny ? -155 : -31);
  expected = c;
  expected_products(expected, a, b, m, k, n);
  settle();
  _tile_loadd(6, a.data(), k * 4);
  _tile_loadd(3, b.data(), n * 4);
  _tile_loadd(0, c.data(), n * 4);
  _tile_dpbf16ps(0, 6, 3);
  _tile_stored(0, c.data(), n * 4);
  check(std::memcmp(c.data(), expected.data(), c.size() * 4) == 0, tiny ? "TDPBF16PS near zero" : "TDPBF16PS");
  _tile_release();
}

// --------------------------------------------------------------------------------------- moving, addressing

// The rows of a tile (rows, colsb) as they were stored, one behind the other, against those of `from`.
void expect_rows(const uint8_t* found, const uint8_t* from, int64_t stride, int rows, int colsb, const char* what) {
  bool same = true;
  for (int row = 0; row < rows; ++row)
    same = same && std::memcmp(found + row * colsb, from + row * stride, size_t(colsb)) == 0;
  check(same, what);
}

// Loads tile 5, of 11 x 24 bytes, from ADDRESS with `base` and Memory::stride in two registers.
#define LOAD(BASE, INDEX, ADDRESS, FROM, STRIDE)                                                             \
  {                                                                                                          \
    uint8_t found[11 * 24];                                                                                  \
    __asm__ volatile("mov %0, %%" BASE "\n mov %1, %%" INDEX "\n tileloadd " ADDRESS ", %%tmm5" ::"m"(base), \
                     "i"(Memory::stride)                                                                     \
                     : BASE, INDEX, "memory");                                                               \
    _tile_stored(5, found, 24);                                                                              \
    expect_rows(found, FROM, STRIDE, 11, 24, ADDRESS);                                                       \
  }

void addressing() {
  constexpr int stride = Memory::stride;
  const Memory memory(1);
  const uint8_t* const base = memory.bytes + 16 * stride;
  Config().tile(5, 11, 24).use();
  LOAD("rax", "rcx", "(%%rax,%%rcx,1)", base, stride)
  LOAD("rdi", "rsi", "5(%%rdi,%%rsi,2)", base + 5, 2 * stride)
  LOAD("rdx", "r8", "-128(%%rdx,%%r8,1)", base - 128, stride)
  LOAD("r8", "r9", "1000(%%r8,%%r9,1)", base + 1000, stride)
  LOAD("r12", "r10", "(%%r12,%%r10,2)", base, 2 * stride)
  LOAD("r13", "r11", "(%%r13,%%r11,1)", base, stride)
  LOAD("r14", "r12", "-1000(%%r14,%%r12,1)", base - 1000, stride)
  LOAD("r11", "r13", "64(%%r11,%%r13,4)", base + 64, 4 * stride)
  LOAD("r15", "r14", "(%%r15)", base, 0)  // no index

  // No base: the displacement, of 32 bits, is the address.
  void* const low = mmap(reinterpret_cast<void*>(0x10000000), 4096, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
  std::memcpy(low, base, 11 * stride);
  uint8_t found[11 * 24];
  __asm__ volatile("tileloadd 0x10000000(,%0,1), %%tmm5" ::"r"(int64_t(stride)) : "memory");
  _tile_stored(5, found, 24);
  expect_rows(found, base, stride, 11, 24, "(,index)");

  const auto store = [&](int64_t stride) {
    uint8_t to[16 * 80];
    std::memset(to, 0xee, sizeof to);
    settle();
    _tile_loadd(5, memory.bytes, Memory::stride);
    _tile_stored(5, to, stride);
    bool same = true;
    for (int at = 0; at < int(sizeof to); ++at) {
      const int row = at / int(stride), column = at % int(stride);
      const uint8_t expected = row < 11 && column < 24 ? memory.bytes[row * Memory::stride + column] : 0xee;
      same = same && to[at] == expected;
    }
    check(same, "TILESTORED writes a tile's bytes and no other");
  };
  store(24);
  store(80);
}

void configuration() {
  static const Config fixed = Config().tile(0, 16, 64).tile(7, 2, 8);  // at an address relative to rip
  Config found;
  __asm__ volatile("ldtilecfg %0" ::"m"(fixed));
  _tile_storeconfig(&found);
  check(std::memcmp(&found, &fixed, sizeof found) == 0, "STTILECFG");

  const Memory memory(2);
  settle();
  uint8_t tile[16 * 64], zeros[16 * 64] = {};
  _tile_loadd(0, memory.bytes, Memory::stride);
  _tile_stream_loadd(7, memory.bytes + 3, Memory::stride);
  _tile_stored(7, tile, 8);
  expect_rows(tile, memory.bytes + 3, Memory::stride, 2, 8, "TILELOADDT1");
  _tile_stored(0, tile, 64);
  expect_rows(tile, memory.bytes, Memory::stride, 16, 64, "TILELOADD of another tile");
  _tile_zero(0);
  _tile_stored(0, tile, 64);
  check(std::memcmp(tile, zeros, sizeof tile) == 0, "TILEZERO");
  _tile_stored(7, tile, 8);
  expect_rows(tile, memory.bytes + 3, Memory::stride, 2, 8, "TILEZERO of another tile");

  fixed.use();
  _tile_stored(7, tile, 8);
  check(std::memcmp(tile, zeros, 16) == 0, "LDTILECFG clears the tiles");
  _tile_release();
  _tile_storeconfig(&found);
  check(std::memcmp(&found, zeros, sizeof found) == 0, "TILERELEASE");
}

// Each thread has tiles of its own, in the middle of the others' work.
bool threads() {
  std::vector<std::thread> all;
  std::vector<char> right(4);
  for (int number = 0; number < 4; ++number)
    all.emplace_back([&, number] {
      for (int round = 0; round < 200; ++round) products(number + 3, 4 * number + 1, 9 - number, false);
      right[size_t(number)] = good;
    });
  for (std::thread& thread : all) thread.join();
  return right == std::vector<char>(4, 1);
}

// -------------------------------------------------------------------------------------------------- faults

// TDPBF16PS by its machine code: assemblers refuse operands that are one tile.
template <int To, int A, int B>
void multiply() {
  __asm__ volatile(".byte 0xc4, 0xe2, %c0, 0x5c, %c1" ::"i"((~B & 15) << 3 | 2), "i"(0xc0 | To << 3 | A));
}

alignas(64) uint8_t memory[16 * 64];
Config shapes() {
  return Config().tile(0, 16, 64).tile(1, 16, 64).tile(2, 16, 64).tile(3, 8, 64).tile(4, 16, 32).tile(5, 16, 62);
}
void load_tile_7() { _tile_loadd(7, memory, 64); }
void store_tile_0() { _tile_stored(0, memory, 64); }
void zero_tile_0() { _tile_zero(0); }

const struct Fault {
  void (*commit)();  // with `shapes` configured
  const char* message;
} faults[] = {
    {[] { _tile_release(), zero_tile_0(); }, "TILEZERO: #UD: no tiles are configured"},
    {[] { _tile_release(), store_tile_0(); }, "TILESTORED: #UD: no tiles are configured"},
    {[] { Config{.palette = 0}.use(), multiply<0, 1, 2>(); }, "TDPBF16PS: #UD: no tiles are configured"},
    {[] { Config{.palette = 2}.use(); }, "LDTILECFG: #GP: the palette"},
    {[] { Config{.reserved = {1}}.use(); }, "LDTILECFG: #GP: a reserved byte"},
    {[] { shapes().tile(8, 1, 4).use(); }, "LDTILECFG: #GP: a reserved byte"},
    {[] { shapes().tile(7, 17, 64).use(); }, "LDTILECFG: #GP: a tile of more than 16 rows"},
    {[] { shapes().tile(7, 16, 65).use(); }, "LDTILECFG: #GP: a tile of more than 64 bytes"},
    {[] { shapes().tile(7, 16, 0).use(); }, "LDTILECFG: #GP: a tile of rows without bytes"},
    {[] { shapes().tile(7, 0, 64).use(); }, "LDTILECFG: #GP: a tile of rows without bytes"},
    {load_tile_7, "TILELOADD: #UD: a tile that is not configured"},
    {multiply<0, 0, 2>, "TDPBF16PS: #UD: two operands"},
    {multiply<0, 1, 0>, "TDPBF16PS: #UD: two operands"},
    {multiply<0, 1, 1>, "TDPBF16PS: #UD: two operands"},
    {multiply<0, 1, 8>, "TDPBF16PS: #UD: no such tile"},
    {multiply<0, 1, 7>, "TDPBF16PS: #UD: a tile that is not configured"},
    {multiply<3, 0, 1>, "TDPBF16PS: #UD: the sum's rows"},
    {multiply<0, 1, 3>, "TDPBF16PS: #UD: the first operand's lanes"},
    {multiply<4, 1, 2>, "TDPBF16PS: #UD: the sum's lanes"},
    {multiply<0, 5, 2>, "TDPBF16PS: #UD: rows not of whole lanes"},
    {[] { __asm__ volatile(".byte 0xc4, 0xe2, 0x7b, 0x4b, 0x00" ::"a"(memory)); }, "TILELOADD: #UD: an address"},
    {[] { __asm__ volatile(".byte 0xc4, 0x62, 0x7b, 0x49, 0xc0"); }, "TILEZERO: #UD: no such tile"},
    {[] { __asm__ volatile(".byte 0xc4, 0xe2, 0x73, 0x49, 0xc0"); }, "TILEZERO: #UD: vvvv"},
    {[] { __asm__ volatile("ud2"); }, "0f 0b"},
};

// Each in a child, which must die of it and say so.
void expect_faults() {
  for (const Fault& fault : faults) {
    int ends[2], status = 0;
    if (pipe(ends) != 0) return check(false, "pipe");
    const pid_t child = fork();
    if (child == 0) {
      dup2(ends[1], STDERR_FILENO);
      shapes().use();
      fault.commit();
      _exit(0);
    }
    close(ends[1]);
    char message[256] = {};
    const ssize_t length = read(ends[0], message, sizeof message - 1);
    close(ends[0]);
    waitpid(child, &status, 0);
    const bool died = WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT;
    check(died && length > 0 && std::strstr(message, fault.message) != nullptr, fault.message);
  }
}

}  // namespace

int main() {
  const int sizes[][3] = {{16, 16, 16}, {16, 8, 16}, {5, 3, 7}, {1, 1, 1}, {16, 1, 2}, {3, 16, 5}};
  for (const auto& size : sizes)
    for (const bool tiny : {false, true}) products(size[0], size[1], size[2], tiny);
  addressing();
  configuration();
  expect_faults();
  good = threads() && good;
  std::puts(good ? "ok" : "failed");
  return good ? 0 : 1;
}
