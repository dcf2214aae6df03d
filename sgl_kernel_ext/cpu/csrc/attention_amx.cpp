// Kernels for x86-64 machines with AVX-512 and AMX: those of AVX-512, and many query rows on tiles.
#include "attention.h"

#ifdef BLEND_AMX_VARIANT
#include <immintrin.h>
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,prefer-vector-width=512")
#pragma GCC target("amx-tile,amx-bf16")
#define VECTOR_LANES 16
#define ROW_BLOCK 6
#define MATRIX 1

namespace amx {
namespace {
#include "attention.inl"
#include "rows.inl"
}
}  // namespace amx

const BlendKernels blend_kernels_amx = {
    "amx", amx::attend, amx::merge, amx::silu_and_multiply, amx::normalise, amx::rotate};
#endif
