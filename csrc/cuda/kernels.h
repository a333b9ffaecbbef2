// The CUDA kernels as the bindings see them: no CUDA header needed. Each throws on a bad argument or a failed launch.
#pragma once

#include "arguments.h"

namespace phi1::cuda {

void rotary(const RotaryArgs& args, void* stream);
void attention_forward(const AttentionArgs& args, void* stream);
void attention_backward(const AttentionArgs& args, void* stream);
void attention_row_stats(const AttentionArgs& args, void* stream);  // what every version of the backward begins with
namespace hopper {  // compute capability 9.0a, head_dim 64 and 128; a build may lack it
void attention_forward(const AttentionArgs& args, void* stream);
void attention_forward_wide(const AttentionArgs& args, void* stream);
void attention_backward(const AttentionArgs& args, void* stream);
}  // namespace hopper
void layer_norm_forward(const LayerNormArgs& args, void* stream);
void layer_norm_backward(const LayerNormArgs& args, void* stream);
void after_in(const AfterInArgs& args, void* stream);
void after_in_backward(const AfterInArgs& args, void* stream);
void residual(const ResidualArgs& args, void* stream);
void residual_backward(const ResidualArgs& args, void* stream);
void cross_entropy(const CrossEntropyArgs& args, void* stream);
void cross_entropy_backward(const CrossEntropyArgs& args, void* stream);

}  // namespace phi1::cuda
