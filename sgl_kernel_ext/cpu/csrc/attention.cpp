// What Python calls: picks the kernels for this machine and spreads the items over the threads.
#include "attention.h"

#include <cstdlib>
#include <cstring>
#include <new>
#ifdef BLEND_AMX_VARIANT
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

#ifdef BLEND_X86_VARIANTS
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

#ifdef BLEND_AMX_VARIANT
// Also asks the system to let this process use the tiles.
bool has_amx() {
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023;
  constexpr int XFEATURE_XTILEDATA = 18;
  return has_avx512() && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
#endif

// The best that the machine has, from the one on that SGL_KERNEL_EXT_ISA names.
const BlendKernels& choose() {
  const char* limit = std::getenv("SGL_KERNEL_EXT_ISA");
  bool reached = limit == nullptr;
  const auto allowed = [&](const BlendKernels& kernels) {
    return reached = reached || std::strcmp(limit, kernels.name) == 0;
  };
#ifdef BLEND_AMX_VARIANT
  if (allowed(blend_kernels_amx) && has_amx()) return blend_kernels_amx;
#endif
#ifdef BLEND_X86_VARIANTS
  if (allowed(blend_kernels_avx512) && has_avx512()) return blend_kernels_avx512;
  if (allowed(blend_kernels_avx2) && __builtin_cpu_supports("avx2") &&
      __builtin_cpu_supports("fma"))
    return blend_kernels_avx2;
#endif
  (void)allowed;
  return blend_kernels_baseline;
}

thread_local BlendScratch scratch[2];
// Of the calling thread; kept, because fresh memory would fault in page by page in every layer.
thread_local BlendScratch partials;

}  // namespace

const BlendKernels& blend_kernels() {
  static const BlendKernels& chosen = choose();
  return chosen;
}

// For the caller to check that it fills in the struct that these kernels read.
extern "C" int64_t blend_attention_bytes() { return sizeof(BlendAttention); }

// The instruction set of the kernels that this machine gets.
extern "C" const char* blend_instruction_set() { return blend_kernels().name; }

extern "C" void blend_attention(BlendAttention* attention, int threads) {
  const BlendKernels& k = blend_kernels();
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
