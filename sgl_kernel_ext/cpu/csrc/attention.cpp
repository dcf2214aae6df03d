// What Python calls: picks the kernels for this machine and spreads the items over the threads.
#include "attention.h"

#include <cstdlib>
#include <cstring>
#include <new>

BlendScratch::~BlendScratch() { std::free(memory); }

float* BlendScratch::reserve(int64_t floats) {
  if (floats > capacity) {
    std::free(memory);
    capacity = floats;
    memory = static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64));
    // NOTE: inside a parallel region an exception could not leave, and there is no result without
    // this memory, so running out of it ends the process as it would anywhere else in torch.
    if (memory == nullptr) std::abort();
  }
  return memory;
}

namespace {

const BlendKernels& kernels() {
#ifdef BLEND_X86_VARIANTS
  static const BlendKernels& chosen = [&]() -> const BlendKernels& {
    const char* limit = std::getenv("BLENDSERVE_CPU_ISA");
    const bool any = limit == nullptr;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && any)
      return blend_kernels_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        (any || std::strcmp(limit, "avx2") == 0))
      return blend_kernels_avx2;
    return blend_kernels_baseline;
  }();
  return chosen;
#else
  return blend_kernels_baseline;
#endif
}

thread_local BlendScratch scratch[2];
// Of the calling thread; kept, because fresh memory would fault in page by page in every layer.
thread_local BlendScratch partials;

}  // namespace

// For the caller to check that it fills in the struct that these kernels read.
extern "C" int64_t blend_attention_bytes() { return sizeof(BlendAttention); }

extern "C" void blend_attention(BlendAttention* attention, int threads) {
  const BlendKernels& k = kernels();
  attention->partials = partials.reserve(attention->partial_count * attention->heads *
                                         (attention->head_dim + 2));
  BlendQueue queue{{0}, {attention->compute_bound}};
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    k.attend(*attention, queue, scratch);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t i = 0; i < attention->merge_count; ++i) k.merge(*attention, i);
  }
}
