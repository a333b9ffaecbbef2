// Prints the operands of csrc/cuda/hopper/tile.cuh for tiles at address 0: name, then their descriptors in steps of 16
// k.
#include <cinttypes>
#include <cstdio>

#include "cuda/hopper/tile.cuh"

using namespace phi1::cuda::hopper;

template <typename F>
static void print(const char* name, int steps, F operand) {
  std::printf("%s:", name);
  for (int k = 0; k < steps; ++k) std::printf(" %" PRIu64, operand(k));
  std::printf("\n");
}

int main() {
  print("rows 64 x 128", 8, [](int k) { return Tile<64, 128>::rows_operand(0, 0, k); });
  print("rows 128 x 128", 8, [](int k) { return Tile<128, 128>::rows_operand(0, 0, k); });
  print("rows 64 x 64", 4, [](int k) { return Tile<64, 64>::rows_operand(0, 0, k); });
  print("columns 128 x 128", 8, [](int k) { return Tile<128, 128>::columns_operand(0, k); });
  print("columns 64 x 64", 4, [](int k) { return Tile<64, 64>::columns_operand(0, k); });
}
