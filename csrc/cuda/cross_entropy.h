// Cross-entropy of a chunk of logits on a GPU: what one call works on.
#pragma once

#include <cstdint>

#include "rotary.h"

namespace phi1::cuda {

// softmax(logits + bias) against targets, plus z_loss times the squared log-sum-exp. columns is a multiple of 8,
// logits, bias and partial start at multiples of 16 bytes.
struct CrossEntropyArgs {
  void* logits;            // (rows, columns), contiguous; the gradient pass leaves softmax (1 + 2 z_loss lse) - one-hot
  const void* bias;        // (columns)
  const int64_t* targets;  // (rows): a column, or ignore_index; any other makes the row's loss and gradient NaN
  float* loss;             // (rows)
  float* stats;    // (rows, 2): greatest logit, what exp(logit - greatest) is multiplied with; not of ignored rows
  float* partial;  // (chunks, columns): the gradient's sums over the rows of each chunk are added to it
  int64_t rows, columns, chunks, ignore_index;
  float z_loss;
  DType dtype;
};

}  // namespace phi1::cuda
