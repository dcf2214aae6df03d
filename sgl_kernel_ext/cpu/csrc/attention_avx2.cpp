// Kernels for x86-64 machines with AVX2 and FMA: 3 x 4 accumulators of its 16 registers.
#include "attention.h"

#ifdef BLEND_X86_VARIANTS
#pragma GCC target("avx2,fma")
#define VECTOR_LANES 8
#define ROW_BLOCK 3
#define MATRIX 0

namespace avx2 {
namespace {
#include "attention.inl"
#include "rows.inl"
}
}  // namespace avx2

const BlendKernels blend_kernels_avx2 = {
    "avx2", avx2::attend, avx2::merge, avx2::silu_and_multiply, avx2::normalise, avx2::rotate};
#endif
