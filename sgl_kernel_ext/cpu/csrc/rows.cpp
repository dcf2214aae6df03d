// What Python calls: spreads rows over the threads, if there are enough of them for that to pay.
#include "rows.h"

#include <cstring>

#include "attention.h"

namespace {

// A parallel region costs a few microseconds, in which one thread does some ten thousand elements.
constexpr int64_t ELEMENTS_PER_THREAD = 8192;

template <class Arguments>
void spread(void (*work)(const Arguments&, int64_t, int64_t), const Arguments& a, int64_t elements,
            int threads) {
  const int64_t wanted = a.rows * elements / ELEMENTS_PER_THREAD;
  const int64_t most = wanted < threads ? wanted : threads;
  const int64_t parts = most < a.rows ? most : a.rows;
  if (parts <= 1) {
    work(a, 0, a.rows);
    return;
  }
#pragma omp parallel for num_threads(parts) schedule(static)
  for (int64_t part = 0; part < parts; ++part)
    work(a, a.rows * part / parts, a.rows * (part + 1) / parts);
}

bool all_within(const int64_t* indices, int64_t count, int64_t end) {
  bool within = true;
  for (int64_t i = 0; i < count; ++i) within &= indices[i] >= 0 && indices[i] < end;
  return within;
}

void store_rows(const BlendStore& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const int64_t to = a.slots[r] * a.row_bytes;
    std::memcpy(static_cast<char*>(a.key_pool) + to,
                static_cast<const char*>(a.key) + r * a.key_stride_bytes, a.row_bytes);
    std::memcpy(static_cast<char*>(a.value_pool) + to,
                static_cast<const char*>(a.value) + r * a.value_stride_bytes, a.row_bytes);
  }
}

}  // namespace

// For the caller to check that it fills in the structs that these kernels read.
extern "C" int64_t blend_rows_bytes() {
  return sizeof(BlendActivation) + sizeof(BlendNorm) + sizeof(BlendRotation) + sizeof(BlendStore);
}

extern "C" void blend_silu_and_multiply(const BlendActivation* a, int threads) {
  spread(blend_kernels().silu_and_multiply, *a, 2 * a->width, threads);
}

extern "C" void blend_normalise(const BlendNorm* a, int threads) {
  spread(blend_kernels().normalise, *a, 2 * a->width, threads);
}

// Returns 0 and does nothing if a position is not in the cache; else 1.
extern "C" int blend_rotate(const BlendRotation* a, int threads) {
  if (!all_within(a->positions, a->rows, a->cached_positions)) return 0;
  spread(blend_kernels().rotate, *a, (a->heads + a->kv_heads) * a->head_dim, threads);
  return 1;
}

// Returns 0 and does nothing if a slot is not in the pools; else 1.
extern "C" int blend_store(const BlendStore* a, int threads) {
  if (!all_within(a->slots, a->rows, a->slot_count)) return 0;
  spread(store_rows, *a, a->row_bytes / 4, threads);
  return 1;
}
