// What a dense layer does to each token's row between its products. The ABI shared by the Python
// caller (sgl_kernel_ext/cpu/rows.py mirrors these structs) and the kernels. Strides are in
// elements, from one row to the next; the elements of a row are next to each other.
#pragma once

#include <cstdint>

extern "C" {

struct BlendActivation {
  const void* input;  // [rows, 2 * width]: gate, then up
  void* output;       // [rows, width]
  int64_t input_stride;
  int64_t rows;
  int64_t width;
  int64_t bfloat16;   // element type: 1 bfloat16, 0 float32; so in the other structs
};

struct BlendNorm {
  const void* input;     // [rows, width]
  const void* residual;  // [rows, width], or null: nothing is added
  const void* weight;    // [width]
  void* sum;             // [rows, width]: input + residual, if there is one
  void* output;          // [rows, width]: the sum over its root mean square, times the weight
  int64_t input_stride;
  int64_t residual_stride;
  int64_t rows;
  int64_t width;
  int64_t bfloat16;
  float epsilon;
};

struct BlendRotation {
  void* query;               // [rows, heads, head_dim], rotated in place
  void* key;                 // [rows, kv_heads, head_dim], rotated in place
  const void* cos_sin;       // [cached_positions, rotary_dim]: cosines, then sines
  const int64_t* positions;  // [rows], each below cached_positions
  int64_t query_stride;
  int64_t key_stride;
  int64_t rows;
  int64_t heads;
  int64_t kv_heads;
  int64_t head_dim;
  int64_t rotary_dim;
  int64_t cached_positions;
  int64_t bfloat16;
};

struct BlendStore {
  const void* key;       // [rows, row_bytes]
  const void* value;     // [rows, row_bytes]
  void* key_pool;        // [slots, row_bytes]
  void* value_pool;      // [slots, row_bytes]
  const int64_t* slots;  // [rows]: where each row goes, below slot_count
  int64_t key_stride_bytes;
  int64_t value_stride_bytes;
  int64_t rows;
  int64_t row_bytes;
  int64_t slot_count;
};

}  // extern "C"
