// The kernels, compiled once per instruction set. The including file opens a namespace, sets the
// target, and defines VECTOR_LANES and ROW_BLOCK (rows of a register tile of ROW_BLOCK x 4 vectors).

#include "vector.inl"

constexpr int TILE = 64;           // KV positions that are scored together
constexpr int DIRECT_ROWS = 6;     // up to here, transposing the keys costs more than it saves
constexpr float NOTHING = -1e30f;  // maximum of a row that has seen no key yet
constexpr float MASKED = -__builtin_inff();
constexpr float MAXIMUM_SLACK = 8.0f;  // weights stay below 2 to this power

// A width (head_dim, rounded up to whole vectors) that the compiler knows; others are plain ints.
template <int N>
struct Fixed {
  constexpr operator int() const { return N; }
};

inline float from_bfloat16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t to_bfloat16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;           // NaN stays NaN
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);  // nearest, even
}

inline void read_row(const void* base, int64_t offset, int64_t n, bool bfloat16, float* to) {
  if (bfloat16)
    for (int64_t i = 0; i < n; ++i)
      to[i] = from_bfloat16(static_cast<const uint16_t*>(base)[offset + i]);
  else
    __builtin_memcpy(to, static_cast<const float*>(base) + offset, n * sizeof(float));
}

inline void write_row(const float* from, float factor, int64_t n, bool bfloat16, void* base,
                      int64_t offset) {
  if (bfloat16)
    for (int64_t i = 0; i < n; ++i)
      static_cast<uint16_t*>(base)[offset + i] = to_bfloat16(from[i] * factor);
  else
    for (int64_t i = 0; i < n; ++i) static_cast<float*>(base)[offset + i] = from[i] * factor;
}

// The tile to come. Slots need not follow each other, so the machine cannot guess them; asking for
// their lines one by one, at an even pace while this tile is computed, keeps memory busy throughout.
struct Ahead {
  static constexpr int64_t LINE = 64;
  static constexpr int64_t WHOLE = 1 << 16;  // `due` and `pace` count lines in parts of this

  const char* keys;
  const char* values;
  int64_t slot_bytes;
  int64_t row_bytes;  // of a slot, those that will be read
  const int32_t* slot;
  const int32_t* end;
  int64_t offset = 0;
  int64_t due = 0;
  int64_t pace = 0;

  // Positions [begin, ...) of an item, at most a tile of them, asked for in so many steps.
  Ahead(const BlendAttention& a, const BlendItem& item, int64_t begin, int64_t steps) {
    const int64_t head_bytes = a.head_dim * (a.bfloat16 != 0 ? 2 : 4);
    const int64_t first = item.kv_head < 0 ? 0 : item.kv_head * head_bytes;
    const int64_t tokens = item.token_end - begin < TILE ? item.token_end - begin : TILE;
    keys = static_cast<const char*>(a.key_pool) + first;
    values = static_cast<const char*>(a.value_pool) + first;
    slot_bytes = a.kv_heads * head_bytes;
    row_bytes = item.kv_head < 0 ? slot_bytes : head_bytes;
    slot = a.slots + item.table_row * a.slot_stride + begin;
    end = slot + tokens;
    pace = tokens * ((row_bytes + LINE - 1) / LINE) * WHOLE / (steps < 1 ? 1 : steps) + 1;
  }

  // NOTE: gcc takes a function that only prefetches for one without effect, and drops the calls.
  __attribute__((always_inline)) inline void step() {
    for (due += pace; due >= WHOLE && slot < end; due -= WHOLE) {
      const int64_t at = *slot * slot_bytes + offset;
      __builtin_prefetch(keys + at, 0, 2);
      __builtin_prefetch(values + at, 0, 2);
      offset += LINE;
      if (offset >= row_bytes) {
        offset = 0;
        ++slot;
      }
    }
  }
};

// scores[row][0..TILE) = queries[row] . keys[t], for few rows: keys are read where they lie.
template <class Width>
inline void score_direct(const float* queries, int rows, Width width, const float* const* keys,
                         int tokens, float* scores, Ahead& ahead) {
  for (int t = 0; t < tokens; t += W) {
    const int block = tokens - t < W ? tokens - t : W;
    for (int row = 0; row < rows; ++row) {
      const float* query = queries + row * width;
      vfloat part[W];
      if (block == W) {
        for (int i = 0; i < W; ++i) part[i] = load(query) * load(keys[t + i]);
        ahead.step();
        for (int d = W; d < width; d += W) {
          const vfloat q = load(query + d);
          for (int i = 0; i < W; ++i) part[i] += q * load(keys[t + i] + d);
          ahead.step();
        }
      } else {
        for (int i = 0; i < W; ++i) part[i] = splat(0.0f);
        for (int i = 0; i < block; ++i)
          for (int d = 0; d < width; d += W) part[i] += load(query + d) * load(keys[t + i] + d);
      }
      store(scores + row * TILE + t, sum_each(part));
    }
  }
}

// keys[0..TILE) of `width` floats -> transposed[width][TILE]; missing tokens become zeros.
template <class Width>
inline void transpose_keys(const float* const* keys, int tokens, Width width, float* transposed) {
  for (int t = 0; t < TILE; t += W)
    for (int d = 0; d < width; d += W) {
      vfloat v[W];
      for (int i = 0; i < W; ++i) v[i] = t + i < tokens ? load(keys[t + i] + d) : splat(0.0f);
      Transpose<W / 2>::run(v);
      for (int i = 0; i < W; ++i) store(transposed + (d + i) * TILE + t, v[i]);
    }
}

// scores[0..R)[column .. column + 4W) = queries[0..R) x transposed
template <int R, class Width>
inline void score_tile(const float* queries, Width width, const float* transposed, float* scores) {
  vfloat sum[R][4];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < 4; ++c) sum[r][c] = splat(0.0f);
  for (int d = 0; d < width; ++d) {
    vfloat key[4];
    for (int c = 0; c < 4; ++c) key[c] = load(transposed + d * TILE + c * W);
    for (int r = 0; r < R; ++r) {
      const vfloat q = splat(queries[r * width + d]);
      for (int c = 0; c < 4; ++c) sum[r][c] += q * key[c];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < 4; ++c) store(scores + r * TILE + c * W, sum[r][c]);
}

// accumulators[0..R)[0 .. C*W) += weights[0..R)[t] * values[t][0 .. C*W)
template <int R, int C, class Width>
inline void weigh_tile(const float* weights, const float* const* values, int offset, int tokens,
                       float* accumulators, Width width, Ahead& ahead) {
  vfloat sum[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sum[r][c] = load(accumulators + r * width + c * W);
  for (int t = 0; t < tokens; ++t) {
    vfloat value[C];
    for (int c = 0; c < C; ++c) value[c] = load(values[t] + offset + c * W);
    for (int r = 0; r < R; ++r) {
      const vfloat weight = splat(weights[r * TILE + t]);
      for (int c = 0; c < C; ++c) sum[r][c] += weight * value[c];
    }
    ahead.step();
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) store(accumulators + r * width + c * W, sum[r][c]);
}

// Register tiles of so many rows as there are, at most R.
template <int R>
struct Rows {
  template <class Width>
  static inline void score(int rows, const float* queries, Width width, const float* transposed,
                           float* scores) {
    if (rows < R) return Rows<R - 1>::score(rows, queries, width, transposed, scores);
    for (int c = 0; c < TILE; c += 4 * W)
      score_tile<R>(queries, width, transposed + c, scores + c);
  }
  template <class Width>
  static inline void weigh(int rows, const float* weights, const float* const* values, int tokens,
                           float* accumulators, Width width, Ahead& ahead) {
    if (rows < R)
      return Rows<R - 1>::weigh(rows, weights, values, tokens, accumulators, width, ahead);
    int d = 0;
    for (; d + 4 * W <= width; d += 4 * W)
      weigh_tile<R, 4>(weights, values, d, tokens, accumulators + d, width, ahead);
    for (; d < width; d += W)
      weigh_tile<R, 1>(weights, values, d, tokens, accumulators + d, width, ahead);
  }
};
template <>
struct Rows<0> {
  template <class Width>
  static inline void score(int, const float*, Width, const float*, float*) {}
  template <class Width>
  static inline void weigh(int, const float*, const float* const*, int, float*, Width, Ahead&) {}
};

// Scores of `rows` rows, as powers of two, to unnormalised weights, in place. `maxima` are what the
// weights are taken against: a row is rescaled only when a score exceeds its own by far, since any
// value near the maximum will do. `sums` holds each row's sum of weights in W parts, added up at the
// end.
template <class Width>
inline void soften(int rows, float* scores, float soft_cap, float* maxima, float* sums,
                   float* accumulators, Width width) {
  if (soft_cap > 0.0f)
    for (int t = 0; t < rows * TILE; t += W) {
      const vfloat s = load(scores + t);
      const vfloat capped = soft_cap * LOG2_E * hyperbolic_tangent(s * (1.0f / soft_cap));
      store(scores + t, s == MASKED ? s : capped);
    }
  const auto highest = [&](int row) {
    vfloat top = load(scores + row * TILE);
    for (int t = W; t < TILE; t += W) top = larger(top, load(scores + row * TILE + t));
    return top;
  };
  vfloat excess = highest(0) - maxima[0];
  for (int row = 1; row < rows; ++row) excess = larger(excess, highest(row) - maxima[row]);
  if (largest_lane(excess) > MAXIMUM_SLACK)
    for (int row = 0; row < rows; ++row) {
      const float maximum = largest_lane(highest(row));
      if (maximum <= maxima[row]) continue;
      const vfloat shrink = power_of_two(splat(maxima[row] - maximum));
      float* accumulator = accumulators + row * width;
      store(sums + row * W, load(sums + row * W) * shrink);
      for (int d = 0; d < width; d += W) store(accumulator + d, load(accumulator + d) * shrink);
      maxima[row] = maximum;
    }
  for (int row = 0; row < rows; ++row) {
    vfloat total = load(sums + row * W);
    for (int t = 0; t < TILE; t += W) {
      const vfloat weight = power_of_two(load(scores + row * TILE + t) - maxima[row]);
      store(scores + row * TILE + t, weight);
      total += weight;
    }
    store(sums + row * W, total);
  }
}

template <class Width>
int64_t attend_width(const BlendAttention& a, int64_t number, BlendQueue& queue,
                     BlendScratch& scratch, Width width) {
  const BlendItem& item = a.items[number];
  const int head_dim = static_cast<int>(a.head_dim);
  const int group = static_cast<int>(a.heads / a.kv_heads);
  const int tokens_in_item = static_cast<int>(item.row_end - item.row_begin);
  const int rows = tokens_in_item * group;  // rows of the score matrix, per KV head
  const int first_head = item.kv_head < 0 ? 0 : static_cast<int>(item.kv_head);
  const int kv_heads = item.kv_head < 0 ? static_cast<int>(a.kv_heads) : 1;
  const bool bfloat16 = a.bfloat16 != 0;
  // Rows of the pools that a vector load can read in place need no copy.
  const bool copied = bfloat16 || width != head_dim;
  const bool direct = rows <= DIRECT_ROWS;
  // Scores are powers of two, not of e; a soft cap comes before that.
  const float scale = a.soft_cap > 0.0f ? a.scale : a.scale * LOG2_E;
  const BlendRow* row_list = a.rows + item.row_begin;

  const int64_t all_rows = static_cast<int64_t>(kv_heads) * rows;
  float* queries = scratch.reserve(all_rows * (2 * width + 1 + W) + ROW_BLOCK * TILE +
                                   static_cast<int64_t>(3) * TILE * width);
  float* accumulators = queries + all_rows * width;
  float* sums = accumulators + all_rows * width;
  float* scores = sums + all_rows * W;
  float* transposed = scores + ROW_BLOCK * TILE;
  float* key_copy = transposed + TILE * width;
  float* value_copy = key_copy + TILE * width;
  float* maxima = value_copy + TILE * width;  // last, because the others are whole vectors

  int64_t sees_all = row_list[0].visible;  // positions below this one are visible to every row
  int64_t first_seen = 0;                  // and, with a window, those from here on
  for (int i = 0; i < tokens_in_item; ++i) {
    const BlendRow& row = row_list[i];
    if (row.visible < sees_all) sees_all = row.visible;
    if (a.window >= 0 && row.visible - 1 - a.window > first_seen)
      first_seen = row.visible - 1 - a.window;
    for (int h = 0; h < kv_heads; ++h)
      for (int g = 0; g < group; ++g) {
        const int64_t index = static_cast<int64_t>(h) * rows + i * group + g;
        float* query = queries + index * width;
        const int64_t head = static_cast<int64_t>(first_head + h) * group + g;
        read_row(a.query, row.query * a.query_stride + head * head_dim, head_dim, bfloat16, query);
        for (int d = 0; d < head_dim; ++d) query[d] *= scale;
        for (int d = head_dim; d < width; ++d) query[d] = 0.0f;
        for (int d = 0; d < width; ++d) accumulators[index * width + d] = 0.0f;
        maxima[index] = NOTHING;
        store(sums + index * W, splat(0.0f));
      }
  }
  if (copied)
    for (int64_t i = 0; i < 2 * TILE * width; ++i) key_copy[i] = 0.0f;

  const int32_t* slots = a.slots + item.table_row * a.slot_stride;
  const int64_t slot_floats = a.kv_heads * a.head_dim;  // elements, whatever their type
  // Register tiles of `weigh` per position of a head.
  const int weigh_steps =
      (rows + ROW_BLOCK - 1) / ROW_BLOCK * (width / (4 * W) + width % (4 * W) / W);
  int64_t next = a.item_count;
  for (int64_t begin = item.token_begin; begin < item.token_end; begin += TILE) {
    const int64_t left = item.token_end - begin;
    const int tokens = left < TILE ? static_cast<int>(left) : TILE;
    const int64_t steps =
        kv_heads * ((direct ? tokens / W * rows * (width / W) : 0) + tokens * weigh_steps);
    const bool last = left <= TILE;
    if (last) next = queue.claim();
    const bool more = next < a.item_count;
    Ahead ahead(a, last && more ? a.items[next] : item,
                !last ? begin + TILE : (more ? a.items[next].token_begin : item.token_end), steps);
    for (int h = 0; h < kv_heads; ++h) {
      const float* keys[TILE];
      const float* values[TILE];
      for (int t = 0; t < tokens; ++t) {
        const int64_t offset =
            slots[begin + t] * slot_floats + static_cast<int64_t>(first_head + h) * head_dim;
        if (copied) {
          read_row(a.key_pool, offset, head_dim, bfloat16, key_copy + t * width);
          read_row(a.value_pool, offset, head_dim, bfloat16, value_copy + t * width);
          keys[t] = key_copy + t * width;
          values[t] = value_copy + t * width;
        } else {
          keys[t] = static_cast<const float*>(a.key_pool) + offset;
          values[t] = static_cast<const float*>(a.value_pool) + offset;
        }
      }
      const float* head_queries = queries + static_cast<int64_t>(h) * rows * width;
      float* head_accumulators = accumulators + static_cast<int64_t>(h) * rows * width;
      if (!direct) transpose_keys(keys, tokens, width, transposed);
      const bool masked = tokens < TILE || begin + tokens > sees_all || begin < first_seen;
      // All of one block of rows before the next, so that its scores stay in the first cache.
      for (int first_row = 0; first_row < rows; first_row += ROW_BLOCK) {
        const int block = rows - first_row < ROW_BLOCK ? rows - first_row : ROW_BLOCK;
        const int64_t first_index = static_cast<int64_t>(h) * rows + first_row;
        const float* block_queries = queries + first_index * width;
        float* block_accumulators = accumulators + first_index * width;
        if (direct)
          score_direct(block_queries, block, width, keys, tokens, scores, ahead);
        else
          Rows<ROW_BLOCK>::score(block, block_queries, width, transposed, scores);
        for (int r = 0; masked && r < block; ++r) {
          float* score = scores + r * TILE;
          const int64_t visible = row_list[(first_row + r) / group].visible - begin;
          const int end = visible < tokens ? static_cast<int>(visible < 0 ? 0 : visible) : tokens;
          for (int t = end; t < TILE; ++t) score[t] = MASKED;
          if (a.window >= 0) {
            const int64_t first = visible - 1 - a.window;
            for (int t = 0; t < first && t < TILE; ++t) score[t] = MASKED;
          }
        }
        soften(block, scores, a.soft_cap, maxima + first_index, sums + first_index * W,
               block_accumulators, width);
        Rows<ROW_BLOCK>::weigh(block, scores, values, tokens, block_accumulators, width, ahead);
      }
    }
  }

  for (int i = 0; i < tokens_in_item; ++i)
    for (int h = 0; h < kv_heads; ++h)
      for (int g = 0; g < group; ++g) {
        const int64_t index = static_cast<int64_t>(h) * rows + i * group + g;
        const int64_t head = static_cast<int64_t>(first_head + h) * group + g;
        const float* accumulator = accumulators + index * width;
        const float sum = sum_lanes(load(sums + index * W));
        if (row_list[i].partial < 0) {
          const int64_t offset = (row_list[i].query * a.heads + head) * head_dim;
          write_row(accumulator, 1.0f / sum, head_dim, bfloat16, a.output, offset);
        } else {
          float* to = a.partials + (row_list[i].partial * a.heads + head) * (head_dim + 2);
          __builtin_memcpy(to, accumulator, head_dim * sizeof(float));
          to[head_dim] = maxima[index];
          to[head_dim + 1] = sum;
        }
      }
  return next;
}

// See BlendKernels.
int64_t attend(const BlendAttention& a, int64_t number, BlendQueue& queue, BlendScratch& scratch) {
  const int width = (static_cast<int>(a.head_dim) + W - 1) / W * W;
  if (width == 64) return attend_width(a, number, queue, scratch, Fixed<64>());
  if (width == 128) return attend_width(a, number, queue, scratch, Fixed<128>());
  return attend_width(a, number, queue, scratch, width);
}

// Joins the partial results of one query token by the log-sum-exp rule, in a fixed order.
void merge(const BlendAttention& a, int64_t number) {
  const int64_t head_dim = a.head_dim;
  const int64_t begin = a.merge_begin[number];
  const int64_t end = a.merge_begin[number + 1];
  for (int64_t head = 0; head < a.heads; ++head) {
    float* first = a.partials + (begin * a.heads + head) * (head_dim + 2);
    float maximum = first[head_dim];
    for (int64_t p = begin + 1; p < end; ++p) {
      const float m = a.partials[(p * a.heads + head) * (head_dim + 2) + head_dim];
      maximum = m > maximum ? m : maximum;
    }
    float sum = 0.0f;
    for (int64_t p = begin; p < end; ++p) {
      const float* part = a.partials + (p * a.heads + head) * (head_dim + 2);
      const float factor = power_of_two(splat(part[head_dim] - maximum))[0];
      sum += factor * part[head_dim + 1];
      for (int64_t d = 0; d < head_dim; ++d)
        first[d] = factor * part[d] + (p == begin ? 0.0f : first[d]);
    }
    write_row(first, 1.0f / sum, head_dim, a.bfloat16 != 0, a.output,
              (a.merged_query[number] * a.heads + head) * head_dim);
  }
}
