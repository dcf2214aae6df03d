// Kernels for x86-64 machines with AVX-512: 6 x 4 accumulators of its 32 registers.
#include "attention.h"

#ifdef BLEND_X86_VARIANTS
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,prefer-vector-width=512")
#define VECTOR_LANES 16
#define ROW_BLOCK 6
#define MATRIX 0

namespace avx512 {
namespace {
#include "attention.inl"
#include "rows.inl"
}
}  // namespace avx512

const BlendKernels blend_kernels_avx512 = {
    "avx512", avx512::attend, avx512::merge, avx512::silu_and_multiply, avx512::normalise, avx512::rotate};
#endif
