// Attention over a paged KV pool, as a list of work items. The ABI shared by the Python caller
// (sgl_kernel_ext/cpu/library.py mirrors these structs), the thread loop and the kernels.
#pragma once

#include <atomic>
#include <cstdint>

#include "rows.h"

extern "C" {

// One stretch of one request's KV, and the query tokens that look at it.
struct BlendItem {
  int64_t table_row;    // row of the slot table that names the KV slots
  int64_t token_begin;  // columns of that row: the KV positions of this item, at least one
  int64_t token_end;
  int64_t kv_head;      // the one KV head it covers, or -1 for all of them
  int64_t row_begin;    // its query tokens: rows [row_begin, row_end)
  int64_t row_end;
};

struct BlendRow {
  int64_t query;    // index of the query token
  int64_t visible;  // it sees KV positions below this one
  int64_t partial;  // where its partial result goes, or -1: this item alone makes the output
};

struct BlendAttention {
  const void* query;        // [tokens, heads, head_dim], rows query_stride elements apart
  const void* key_pool;     // [slots, kv_heads, head_dim]
  const void* value_pool;   // [slots, kv_heads, head_dim]
  void* output;             // [tokens, heads, head_dim]
  const int32_t* slots;     // [rows, slot_stride]: KV slot of each position of each request
  const BlendItem* items;   // the compute-bound ones first
  const int64_t* beside;    // [compute_bound]: positions of memory-bound items to be worked off
                            // with each tile of this item
  const BlendRow* rows;
  const int64_t* merged_query;   // [merges]: query tokens made of several partial results
  const int64_t* merge_begin;    // [merges + 1]: their partial results, one after the other
  float* partials;          // scratch that blend_attention sets: [partial_count, heads,
                            // head_dim + 2]: accumulator, maximum, sum
  int64_t item_count;
  int64_t compute_bound;    // so many of the items are
  int64_t merge_count;
  int64_t partial_count;
  int64_t heads;
  int64_t kv_heads;
  int64_t head_dim;
  int64_t query_stride;
  int64_t slot_stride;
  int64_t window;           // a query sees itself and this many positions before it; -1: all
  int64_t bfloat16;         // element type of query, pools and output: 1 bfloat16, 0 float32
  float scale;
  float soft_cap;           // scores become cap * tanh(score / cap); 0: unchanged
};

}  // extern "C"

// Memory that one thread reuses from item to item.
struct BlendScratch {
  float* memory = nullptr;
  int64_t capacity = 0;
  ~BlendScratch();
  float* reserve(int64_t floats);
};

// The next items of each kind; each item goes to one thread.
struct BlendQueue {
  std::atomic<int64_t> compute_bound;
  std::atomic<int64_t> memory_bound;
};

struct BlendKernels {
  const char* name;
  // One thread's part: computes items until there are no more. `scratch` is one for each kind.
  void (*attend)(const BlendAttention&, BlendQueue&, BlendScratch* scratch);
  void (*merge)(const BlendAttention&, int64_t merge);
  // Rows [begin, end) each.
  void (*silu_and_multiply)(const BlendActivation&, int64_t begin, int64_t end);
  void (*normalise)(const BlendNorm&, int64_t begin, int64_t end);
  void (*rotate)(const BlendRotation&, int64_t begin, int64_t end);
};

// Those for this machine.
const BlendKernels& blend_kernels();

extern const BlendKernels blend_kernels_baseline;
#if defined(__x86_64__) && !defined(__clang__)
#define BLEND_X86_VARIANTS 1
extern const BlendKernels blend_kernels_avx2;
extern const BlendKernels blend_kernels_avx512;
#if defined(__linux__) && __GNUC__ >= 11
#define BLEND_AMX_VARIANT 1
extern const BlendKernels blend_kernels_amx;
#endif
#endif
