// The kernels, compiled once per instruction set. The including file opens a namespace, sets the
// target, and defines VECTOR_LANES, ROW_BLOCK (rows of a register tile of ROW_BLOCK x 4 vectors) and
// MATRIX (whether there are AMX tiles for many rows).

#include "vector.inl"
#include "ahead.inl"
#include "tiles.inl"
#if MATRIX
#include "matrix.inl"
#endif

// Computes items of one kind one after the other, stretch by stretch.
template <class Width>
class Lane {
  const BlendAttention& a;
  std::atomic<int64_t>& queue;
  const int64_t queue_end;
  BlendScratch& scratch;
  const Width width;

  const int head_dim = static_cast<int>(a.head_dim);
  const int group = static_cast<int>(a.heads / a.kv_heads);
  const bool bfloat16 = a.bfloat16 != 0;
  // Rows of the pools that a vector load can read in place need no copy.
  const bool copied = bfloat16 || width != head_dim;

  // Of the item at hand; rows are those of the score matrix, per KV head.
  int rows = 0;
  int row_places = 0;  // per KV head: on AMX tiles, whole tiles of rows
  int first_head = 0;
  int kv_heads = 0;
  bool direct = false;  // few rows: keys are read where they lie
  bool matrix = false;  // many rows, on AMX tiles
  const BlendRow* row_list = nullptr;
  int64_t sees_all = 0;    // positions below this one are visible to every row
  int64_t first_seen = 0;  // and, with a window, those from here on
  float* queries = nullptr;
  float* accumulators = nullptr;
  float* sums = nullptr;
  float* scores = nullptr;
  float* transposed = nullptr;
  float* key_copy = nullptr;
  float* value_copy = nullptr;
  float* maxima = nullptr;
  uint32_t* parts = nullptr;  // of queries, weights, keys and values

  bool on_matrix(int64_t row_count) const {
    return MATRIX && row_count >= MATRIX_ROWS && width % MATRIX_STEP == 0;
  }

  template <class Visit>
  void for_each_row(const BlendItem& item, Visit visit) const {
    for (int i = 0; i < item.row_end - item.row_begin; ++i)
      for (int h = 0; h < kv_heads; ++h)
        for (int g = 0; g < group; ++g)
          visit(row_list[i], static_cast<int64_t>(h) * row_places + i * group + g,
                static_cast<int64_t>(first_head + h) * group + g);
  }

  void open(const BlendItem& item) {
    const int tokens_in_item = static_cast<int>(item.row_end - item.row_begin);
    rows = tokens_in_item * group;
    first_head = item.kv_head < 0 ? 0 : static_cast<int>(item.kv_head);
    kv_heads = item.kv_head < 0 ? static_cast<int>(a.kv_heads) : 1;
    direct = rows <= DIRECT_ROWS;
    matrix = on_matrix(rows);
    row_places = matrix ? (rows + MATRIX_TILE - 1) / MATRIX_TILE * MATRIX_TILE : rows;
    row_list = a.rows + item.row_begin;

    const int64_t all_rows = static_cast<int64_t>(kv_heads) * row_places;
    const int score_rows = matrix ? MATRIX_BLOCK : ROW_BLOCK;
    const int64_t part_lanes =
        matrix ? all_rows * width * 3 / 2 + MATRIX_BLOCK * TILE + TILE * width * 5 / 2 : 0;
    queries = scratch.reserve(all_rows * (2 * width + 1 + W) + score_rows * TILE +
                              static_cast<int64_t>(3) * TILE * width + part_lanes);
    accumulators = queries + all_rows * width;
    sums = accumulators + all_rows * width;
    scores = sums + all_rows * W;
    transposed = scores + score_rows * TILE;
    key_copy = transposed + TILE * width;
    value_copy = key_copy + TILE * width;
    parts = reinterpret_cast<uint32_t*>(value_copy + TILE * width);
    maxima = value_copy + TILE * width + part_lanes;  // last, because the others are whole vectors

    sees_all = row_list[0].visible;
    first_seen = 0;
    for (int i = 0; i < tokens_in_item; ++i) {
      const int64_t visible = row_list[i].visible;
      if (visible < sees_all) sees_all = visible;
      if (a.window >= 0 && visible - 1 - a.window > first_seen) first_seen = visible - 1 - a.window;
    }
    // Scores are powers of two, not of e; a soft cap comes before that.
    const float scale = a.soft_cap > 0.0f ? a.scale : a.scale * LOG2_E;
    for_each_row(item, [&](const BlendRow& row, int64_t index, int64_t head) {
      float* query = queries + index * width;
      read_row(a.query, row.query * a.query_stride + head * head_dim, head_dim, bfloat16, query);
      for (int d = 0; d < head_dim; ++d) query[d] *= scale;
      for (int d = head_dim; d < width; ++d) query[d] = 0.0f;
      for (int d = 0; d < width; ++d) accumulators[index * width + d] = 0.0f;
      maxima[index] = NOTHING;
      store(sums + index * W, splat(0.0f));
    });
    if (copied)
      for (int64_t i = 0; i < 2 * TILE * width; ++i) key_copy[i] = 0.0f;
#if MATRIX
    if (matrix) split_queries();
#endif
  }

  void close(const BlendItem& item) {
    for_each_row(item, [&](const BlendRow& row, int64_t index, int64_t head) {
      const float* accumulator = accumulators + index * width;
      const float sum = sum_lanes(load(sums + index * W));
      if (row.partial < 0) {
        const int64_t offset = (row.query * a.heads + head) * head_dim;
        write_row(accumulator, 1.0f / sum, head_dim, bfloat16, a.output, offset);
      } else {
        float* to = a.partials + (row.partial * a.heads + head) * (head_dim + 2);
        __builtin_memcpy(to, accumulator, head_dim * sizeof(float));
        to[head_dim] = maxima[index];
        to[head_dim + 1] = sum;
      }
    });
  }

  // Takes what they must not see from the scores of a block of rows.
  void mask(int first_row, int block, int64_t begin, int tokens) {
    for (int r = 0; r < block; ++r) {
      float* score = scores + r * TILE;
      const int64_t visible = row_list[(first_row + r) / group].visible - begin;
      const int end = visible < tokens ? static_cast<int>(visible < 0 ? 0 : visible) : tokens;
      for (int t = end; t < TILE; ++t) score[t] = MASKED;
      if (a.window >= 0) {
        const int64_t first = visible - 1 - a.window;
        for (int t = 0; t < first && t < TILE; ++t) score[t] = MASKED;
      }
    }
  }

#if MATRIX
  void split_queries() {
    const int64_t all_rows = static_cast<int64_t>(kv_heads) * row_places;
    for (int h = 0; h < kv_heads; ++h)
      for (int64_t i = (h * row_places + rows) * width; i < (h + 1) * row_places * width; ++i)
        queries[i] = accumulators[i] = 0.0f;
    for (int64_t index = 0; index < all_rows; ++index)
      for (int d = 0; d < width; d += MATRIX_STEP)
        store_parts<3>(load(queries + index * width + d), load(queries + index * width + d + W),
                       parts + (d / MATRIX_STEP * all_rows + index) * W, all_rows * width / 2);
  }

  // One KV head of a tile. What is left of a last tile of rows is computed along, and never read.
  // Scores grow in the exponential, so they are taken from all parts; in the weighted sums two of a
  // weight and of a value are enough for a relative error of 4e-6.
  template <int QUERY_PARTS, int KEY_PARTS, int VALUE_PARTS>
  void matrix_tile(int h, const float* const* keys, const float* const* values, int64_t begin,
                   int tokens, bool masked, Ahead& ahead) {
    constexpr int WEIGHT_PARTS = 2;
    const int all_rows = kv_heads * row_places;
    uint32_t* weight_parts = parts + all_rows * width * 3 / 2;
    uint32_t* key_parts = weight_parts + WEIGHT_PARTS * MATRIX_BLOCK * TILE / 2;
    uint32_t* value_parts = key_parts + TILE * width * 3 / 2;
    pack_keys<KEY_PARTS>(keys, tokens, width, key_parts);
    pack_values<VALUE_PARTS>(values, tokens, width, value_parts);
    const ColumnTiles key_columns{key_parts, width / MATRIX_STEP, TILE / MATRIX_TILE};
    const ColumnTiles value_columns{value_parts, TILE / MATRIX_STEP, width / MATRIX_TILE};
    const RowTiles weights{weight_parts, TILE / MATRIX_STEP, MATRIX_BLOCK};
    for (int first_row = 0; first_row < rows; first_row += MATRIX_BLOCK) {
      const int block = rows - first_row < MATRIX_BLOCK ? rows - first_row : MATRIX_BLOCK;
      const int64_t first_index = static_cast<int64_t>(h) * row_places + first_row;
      float* block_accumulators = accumulators + first_index * width;
      const RowTiles block_queries{parts + first_index * W, width / MATRIX_STEP, all_rows};
      multiply_rows<QUERY_PARTS, KEY_PARTS, false>(block, block_queries, key_columns, scores, TILE,
                                                   ahead);
      if (masked) mask(first_row, block, begin, tokens);
      soften(block, scores, a.soft_cap, maxima + first_index, sums + first_index * W,
             block_accumulators, width, [&](int row, int t, vfloat first, vfloat second) {
               store_parts<WEIGHT_PARTS>(
                   first, second, weight_parts + (t / MATRIX_STEP * MATRIX_BLOCK + row) * W,
                   MATRIX_BLOCK * TILE / 2);
               ahead.step();
             });
      multiply_rows<WEIGHT_PARTS, VALUE_PARTS, true>(block, weights, value_columns,
                                                     block_accumulators, width, ahead);
    }
  }
#endif

  // Positions [begin, begin + tokens), at most TILE of them.
  void tile(const BlendItem& item, int64_t begin, int tokens, Ahead& asked) {
    Ahead ahead = asked;  // a copy whose address is nobody's stays in registers
    const int32_t* slots = a.slots + item.table_row * a.slot_stride + begin;
    const int64_t slot_floats = a.kv_heads * a.head_dim;  // elements, whatever their type
    const bool masked = tokens < TILE || begin + tokens > sees_all || begin < first_seen;
    for (int h = 0; h < kv_heads; ++h) {
      const float* keys[TILE];
      const float* values[TILE];
      for (int t = 0; t < tokens; ++t) {
        const int64_t offset =
            slots[t] * slot_floats + static_cast<int64_t>(first_head + h) * head_dim;
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
#if MATRIX
      if (matrix) {
        if (bfloat16)
          matrix_tile<2, 1, 1>(h, keys, values, begin, tokens, masked, ahead);
        else
          matrix_tile<3, 3, 2>(h, keys, values, begin, tokens, masked, ahead);
        continue;
      }
#endif
      if (!direct) transpose_keys(keys, tokens, width, transposed);
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
        if (masked) mask(first_row, block, begin, tokens);
        soften(block, scores, a.soft_cap, maxima + first_index, sums + first_index * W,
               block_accumulators, width, [&](int row, int t, vfloat first, vfloat second) {
                 store(scores + row * TILE + t, first);
                 store(scores + row * TILE + t + W, second);
               });
        Rows<ROW_BLOCK>::weigh(block, scores, values, tokens, block_accumulators, width, ahead);
      }
    }
    asked = ahead;
  }

 public:
  Lane(const BlendAttention& a, std::atomic<int64_t>& queue, int64_t queue_end,
       BlendScratch& scratch, Width width)
      : a(a), queue(queue), queue_end(queue_end), scratch(scratch), width(width) {}

  // What comes after this stretch, at most `tokens` long: of the same item, or of the queue's next.
  Stretch after(Stretch s, int64_t tokens) {
    if (s.item < 0 || s.end == a.items[s.item].token_end) {
      s.item = queue.fetch_add(1, std::memory_order_relaxed);
      if (s.item >= queue_end) return Stretch();
      s.end = a.items[s.item].token_begin;
    }
    s.begin = s.end;
    const int64_t left = a.items[s.item].token_end - s.begin;
    s.end += left < tokens ? left : tokens;
    return s;
  }

  // How often computing the stretch steps through what is asked for ahead of it.
  int64_t steps(const Stretch& s) const {
    const BlendItem& item = a.items[s.item];
    const int64_t row_count = (item.row_end - item.row_begin) * group;
    const int64_t vectors = width / (4 * W) + width % (4 * W) / W;
    const int64_t tokens = s.end - s.begin;
    if (on_matrix(row_count)) {
      const int64_t row_tiles = (row_count + MATRIX_TILE - 1) / MATRIX_TILE;
      const int64_t products = row_tiles * (TILE / MATRIX_TILE) * (width / MATRIX_STEP) * 2;
      const int64_t weights = row_count * (TILE / MATRIX_STEP);
      const int64_t tiles = (tokens + TILE - 1) / TILE * (item.kv_head < 0 ? a.kv_heads : 1);
      return tiles * (products + weights);
    }
    const int64_t scoring = row_count <= DIRECT_ROWS ? tokens / W * row_count * (width / W) : 0;
    const int64_t weighing = (row_count + ROW_BLOCK - 1) / ROW_BLOCK * vectors * tokens;
    return (item.kv_head < 0 ? a.kv_heads : 1) * (scoring + weighing);
  }

  void run(const Stretch& s, Ahead ahead) {
    const BlendItem& item = a.items[s.item];
    if (s.begin == item.token_begin) open(item);
    for (int64_t begin = s.begin; begin < s.end; begin += TILE)
      tile(item, begin, static_cast<int>(s.end - begin < TILE ? s.end - begin : TILE), ahead);
    if (s.end == item.token_end) close(item);
  }
};

template <class Width>
void attend_width(const BlendAttention& a, BlendQueue& queue, BlendScratch* scratch, Width width) {
  const Stretch none;
  Lane<Width> compute(a, queue.compute_bound, a.compute_bound, scratch[0], width);
  Lane<Width> memory(a, queue.memory_bound, a.item_count, scratch[1], width);
  Stretch side = memory.after(none, TILE);
  // While a compute-bound tile is computed, what comes after it arrives: its successor, and as much
  // of the memory-bound items as the plan puts beside it.
  int64_t due = 0;
  for (Stretch main = compute.after(none, TILE); main.item >= 0;) {
    const Stretch next = compute.after(main, TILE);
    const int64_t beside = a.beside[main.item];
    due += beside;
    const Stretch now = due > 0 ? side : none;
    compute.run(main, Ahead(a, now, next, compute.steps(main)));
    if (now.item >= 0) {
      due -= now.end - now.begin;
      memory.run(now, Ahead(a, none, none, 1));
      side = memory.after(now, (beside + TILE - 1) / TILE * TILE);
    }
    main = next;
  }
  while (side.item >= 0) {
    const Stretch next = memory.after(side, TILE);
    memory.run(side, Ahead(a, next, none, memory.steps(side)));
    side = next;
  }
}

// See BlendKernels.
void attend(const BlendAttention& a, BlendQueue& queue, BlendScratch* scratch) {
#if MATRIX
  const TileSetup setup;
#endif
  const int width = (static_cast<int>(a.head_dim) + W - 1) / W * W;
  if (width == 64) return attend_width(a, queue, scratch, Fixed<64>());
  if (width == 128) return attend_width(a, queue, scratch, Fixed<128>());
  return attend_width(a, queue, scratch, width);
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
