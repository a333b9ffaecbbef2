// Intel's AMX tile instructions on a CPU that has none. There each of them raises SIGILL; the handler installed here
// decodes the machine code, executes it as Intel's manual defines it (SDM, volume 2: the instructions and exception
// classes AMX-E1 to AMX-E6) and goes on behind it. Linked into a program or preloaded, it is all that is needed.
//
// A CPU with AMX traps on what touches a tile as long as Linux was not asked for the tiles' registers, but executes
// LDTILECFG and TILERELEASE: a program for any CPU has UD1 %eax, %eax before each of them.
//
// What would fault on a CPU with AMX aborts with one line that names the instruction.
#include <immintrin.h>
#include <signal.h>
#include <ucontext.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>

namespace {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;  // palette 1

// The 64 bytes of LDTILECFG and STTILECFG.
struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t colsb[16];  // bytes in a row; those from kTiles on are reserved
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64);

struct Tile {
  uint8_t row[kRows][kRowBytes];
};

// The architectural state of a thread. Outside of a tile's rows and colsb its bytes are zeros.
thread_local Config config;  // palette 0: no tiles are configured
thread_local Tile tiles[kTiles];

enum Operation { LDTILECFG, STTILECFG, TILERELEASE, TILEZERO, TILELOADD, TILELOADDT1, TILESTORED, TDPBF16PS };
constexpr const char* kNames[] = {"LDTILECFG", "STTILECFG",   "TILERELEASE", "TILEZERO",
                                  "TILELOADD", "TILELOADDT1", "TILESTORED",  "TDPBF16PS"};
std::atomic<long> executed[std::size(kNames)];

[[noreturn]] void fault(const char* name, const char* why) {
  char line[256];
  const int length = std::snprintf(line, sizeof line, "AMX emulator: %s: %s\n", name, why);
  std::fwrite(line, 1, size_t(length), stderr);
  std::abort();
}

struct Instruction {
  Operation operation;
  int reg, rm, vvvv;  // operands; rm where it is no memory
  uint8_t* memory;    // base + displacement; with `has_sib` the rows are `stride` bytes apart
  int64_t stride;
  bool has_sib;
  const uint8_t* next;

  const char* name() const { return kNames[operation]; }
  [[noreturn]] void fault(const char* why) const { ::fault(name(), why); }
};

// The general register with hardware number 0 ... 15.
int64_t general_register(const ucontext_t& context, int number) {
  static constexpr int index[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                    REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return context.uc_mcontext.gregs[index[number]];
}

// Which operation the VEX prefix's pp, the opcode and the operands' form are, or a fault.
Operation operation_of(int pp, int opcode, bool memory, const uint8_t* at) {
  if (opcode == 0x49 && pp == 0) return memory ? LDTILECFG : TILERELEASE;
  if (opcode == 0x49 && pp == 1 && memory) return STTILECFG;
  if (opcode == 0x49 && pp == 3 && !memory) return TILEZERO;
  if (opcode == 0x4b && pp == 1 && memory) return TILELOADDT1;
  if (opcode == 0x4b && pp == 2 && memory) return TILESTORED;
  if (opcode == 0x4b && pp == 3 && memory) return TILELOADD;
  if (opcode == 0x5c && pp == 2 && !memory) return TDPBF16PS;
  char bytes[32];
  std::snprintf(bytes, sizeof bytes, "%02x %02x %02x %02x %02x", at[0], at[1], at[2], at[3], at[4]);
  fault(bytes, "no tile instruction that is emulated");
}

// VEX.128.0F38.W0: c4, R X B (inverted) and the map, W vvvv (inverted) L pp, opcode, ModRM, SIB, displacement.
Instruction decode(const ucontext_t& context) {
  const auto* at = reinterpret_cast<const uint8_t*>(context.uc_mcontext.gregs[REG_RIP]);
  const bool vex = at[0] == 0xc4 && (at[1] & 0x1f) == 2 && (at[2] & 0x84) == 0;
  const int r = ~at[1] >> 4 & 8, x = ~at[1] >> 3 & 8, b = ~at[1] >> 2 & 8;
  const int mod = at[4] >> 6, reg = at[4] >> 3 & 7, rm = at[4] & 7;

  Instruction i = {};
  i.operation = operation_of(vex ? at[2] & 3 : -1, at[3], mod != 3, at);
  i.reg = reg | r;
  i.vvvv = ~at[2] >> 3 & 15;
  if (i.operation != TDPBF16PS && i.vvvv != 0) i.fault("#UD: vvvv is not 1111b");
  const bool no_reg = i.operation == LDTILECFG || i.operation == STTILECFG || i.operation == TILERELEASE;
  if (no_reg && reg != 0) i.fault("#UD: ModRM.reg is not 0");
  if ((i.operation == TILERELEASE || i.operation == TILEZERO) && rm != 0) i.fault("#UD: ModRM.rm is not 0");
  at += 5;
  if (mod == 3) {
    i.rm = rm | b;
  } else {
    int64_t address = 0, displacement = 0;
    bool has_base = true, of_rip = false;
    int base = rm | b;
    i.has_sib = rm == 4;
    if (i.has_sib) {
      const int scale = *at >> 6, index = (*at >> 3 & 7) | x;
      base = (*at & 7) | b;
      has_base = mod != 0 || (base & 7) != 5;
      if (index != 4) i.stride = general_register(context, index) << scale;
      ++at;
    } else if (mod == 0 && rm == 5) {
      has_base = false;
      of_rip = true;
    }
    if (mod == 1) {
      displacement = static_cast<int8_t>(*at++);
    } else if (mod == 2 || !has_base) {
      int32_t wide;
      std::memcpy(&wide, at, sizeof wide);
      displacement = wide;
      at += sizeof wide;
    }
    if (has_base) address = general_register(context, base);
    if (of_rip) address = reinterpret_cast<int64_t>(at);
    i.memory = reinterpret_cast<uint8_t*>(address + displacement);
  }
  i.next = at;
  return i;
}

void load_config(const Instruction& i) {
  Config next;
  std::memcpy(&next, i.memory + i.stride, sizeof next);
  if (next.palette == 0) next = {};
  if (next.palette > 1) i.fault("#GP: the palette is neither 0 nor 1");
  for (const uint8_t byte : next.reserved)
    if (byte != 0) i.fault("#GP: a reserved byte is not 0");
  for (int tile = 0; tile < 16; ++tile) {
    if (tile >= kTiles && (next.colsb[tile] != 0 || next.rows[tile] != 0)) i.fault("#GP: a reserved byte is not 0");
    if (next.colsb[tile] > kRowBytes) i.fault("#GP: a tile of more than 64 bytes a row");
    if (next.rows[tile] > kRows) i.fault("#GP: a tile of more than 16 rows");
    if ((next.rows[tile] == 0) != (next.colsb[tile] == 0)) i.fault("#GP: a tile of rows without bytes, or the reverse");
  }
  if (next.start_row != 0) i.fault("start_row, which only an interrupted load leaves, is not emulated");
  config = next;
  std::memset(tiles, 0, sizeof tiles);
}

// The operand's number, if it names a tile that is configured.
int checked(const Instruction& i, int tile) {
  if (config.palette == 0) i.fault("#UD: no tiles are configured");
  if (tile >= kTiles) i.fault("#UD: no such tile");
  if (config.rows[tile] == 0) i.fault("#UD: a tile that is not configured");
  return tile;
}

void load(const Instruction& i) {
  const int tile = checked(i, i.reg);
  std::memset(&tiles[tile], 0, sizeof(Tile));
  for (int row = 0; row < config.rows[tile]; ++row)
    std::memcpy(tiles[tile].row[row], i.memory + row * i.stride, config.colsb[tile]);
}

void store(const Instruction& i) {
  const int tile = checked(i, i.reg);
  for (int row = 0; row < config.rows[tile]; ++row)
    std::memcpy(i.memory + row * i.stride, tiles[tile].row[row], config.colsb[tile]);
}

// C += A B in pairs of bf16. Lanes beyond the tiles' shapes are zeros: they are computed, and stay zeros.
__attribute__((noinline)) void dot_products(Tile& to, const Tile& a, const Tile& b, int rows, int pairs, int columns) {
  constexpr int lanes = kRowBytes / 4;
  // The lower and upper bf16 of each pair as floats.
  const auto widen = [](const uint8_t* from, float* even, float* odd) {
    uint32_t pair[lanes], low[lanes], high[lanes];
    std::memcpy(pair, from, sizeof pair);
    for (int n = 0; n < lanes; ++n) low[n] = pair[n] << 16, high[n] = pair[n] & 0xffff0000u;
    std::memcpy(even, low, sizeof low);
    std::memcpy(odd, high, sizeof high);
  };
  float b_even[kRows][lanes], b_odd[kRows][lanes];
  for (int k = 0; k < pairs; ++k) widen(b.row[k], b_even[k], b_odd[k]);
  for (int m = 0; m < rows; ++m) {
    float a_even[lanes], a_odd[lanes], c[lanes], even[lanes] = {}, odd[lanes] = {};
    widen(a.row[m], a_even, a_odd);
    for (int k = 0; k < pairs; ++k)
      for (int n = 0; n < lanes; ++n) {
        even[n] = __builtin_fmaf(a_even[k], b_even[k][n], even[n]);
        odd[n] = __builtin_fmaf(a_odd[k], b_odd[k][n], odd[n]);
      }
    std::memcpy(c, to.row[m], sizeof c);
    for (int n = 0; n < lanes; ++n) c[n] += even[n] + odd[n];
    std::memcpy(to.row[m], c, size_t(columns) * 4);
  }
}

void multiply(const Instruction& i) {
  const int to = checked(i, i.reg), a = checked(i, i.rm), b = checked(i, i.vvvv);
  if (to == a || to == b || a == b) i.fault("#UD: two operands are one tile");
  if (config.colsb[to] % 4 || config.colsb[a] % 4 || config.colsb[b] % 4) i.fault("#UD: rows not of whole lanes");
  if (config.rows[to] != config.rows[a]) i.fault("#UD: the sum's rows are not the first operand's");
  if (config.colsb[a] / 4 != config.rows[b]) i.fault("#UD: the first operand's lanes are not the second's rows");
  if (config.colsb[to] != config.colsb[b]) i.fault("#UD: the sum's lanes are not the second operand's");
  dot_products(tiles[to], tiles[a], tiles[b], config.rows[to], config.rows[b], config.colsb[to] / 4);
}

void execute(const Instruction& i) {
  const bool rows = i.operation == TILELOADD || i.operation == TILELOADDT1 || i.operation == TILESTORED;
  if (rows && !i.has_sib) i.fault("#UD: an address without SIB");
  switch (i.operation) {
    case LDTILECFG: return load_config(i);
    case STTILECFG: std::memcpy(i.memory + i.stride, &config, sizeof config); return;
    case TILERELEASE: config = {}, std::memset(tiles, 0, sizeof tiles); return;
    case TILEZERO: std::memset(&tiles[checked(i, i.reg)], 0, sizeof(Tile)); return;
    case TILELOADD:
    case TILELOADDT1: return load(i);
    case TILESTORED: return store(i);
    case TDPBF16PS: return multiply(i);
  }
}

void on_illegal_instruction(int, siginfo_t*, void* context) {
  // Denormals are zeros, and rounding is to nearest: not MXCSR's, which the kernel gives back behind the handler.
  _mm_setcsr(0x1f80 | _MM_FLUSH_ZERO_ON | 0x0040);
  auto& registers = *static_cast<ucontext_t*>(context);
  constexpr uint8_t ud1[] = {0x0f, 0xb9, 0xc0};
  auto& at = registers.uc_mcontext.gregs[REG_RIP];
  if (std::memcmp(reinterpret_cast<const void*>(at), ud1, sizeof ud1) == 0) at += sizeof ud1;
  const Instruction i = decode(registers);
  execute(i);
  executed[i.operation].fetch_add(1, std::memory_order_relaxed);
  at = reinterpret_cast<greg_t>(i.next);
}

__attribute__((constructor)) void install() {
  struct sigaction action = {};
  action.sa_sigaction = on_illegal_instruction;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;  // so that a fault's abort, or a debugger's stop, is no deadlock
  sigaction(SIGILL, &action, nullptr);
}

}  // namespace

// How often the instruction was executed so far, by all threads.
extern "C" __attribute__((visibility("default"))) long amx_executed(const char* name) {
  for (size_t i = 0; i < std::size(kNames); ++i)
    if (std::strcmp(kNames[i], name) == 0) return executed[i];
  return -1;
}

// What csrc/cpu/amx.cpp asks.
extern "C" __attribute__((visibility("default"))) bool phi1_amx_is_emulated() { return true; }
