// The CUDA kernels as the bindings see them: no CUDA header needed. Each throws on a bad argument or a failed launch.
#pragma once

#include "rotary.h"

namespace phi1::cuda {

void rotary(const RotaryArgs& args, void* stream);

}  // namespace phi1::cuda
