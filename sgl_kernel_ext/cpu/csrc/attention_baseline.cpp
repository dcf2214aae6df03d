// Kernels for the machine's base instruction set (SSE2 on x86-64, NEON on aarch64).
#include "attention.h"

#define VECTOR_LANES 4
#define ROW_BLOCK 3
#define MATRIX 0

namespace baseline {
namespace {
#include "attention.inl"
#include "rows.inl"
}
}  // namespace baseline

const BlendKernels blend_kernels_baseline = {
    "baseline", baseline::attend, baseline::merge, baseline::silu_and_multiply, baseline::normalise, baseline::rotate};
