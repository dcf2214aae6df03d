// What is done with TILE positions of one KV head and a block of query rows, in registers.

constexpr int TILE = 64;           // KV positions that are scored together
constexpr int DIRECT_ROWS = 6;     // up to here, transposing the keys costs more than it saves
// On AMX tiles: rows of one, elements that one product runs over, query rows that are computed
// together, and from how many rows on this pays.
constexpr int MATRIX_TILE = 16;
constexpr int MATRIX_STEP = 32;
constexpr int MATRIX_BLOCK = 64;
constexpr int MATRIX_ROWS = 40;
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

// Scores of `rows` rows, as powers of two, to unnormalised weights, which `put` is given, two vectors
// at a time: (row, position, weights there, weights W positions on). `maxima` are what the
// weights are taken against: a row is rescaled only when a score exceeds its own by far, since any
// value near the maximum will do. `sums` holds each row's sum of weights in W parts, added up at the
// end.
template <class Width, class Put>
inline void soften(int rows, float* scores, float soft_cap, float* maxima, float* sums,
                   float* accumulators, Width width, Put put) {
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
    for (int t = 0; t < TILE; t += 2 * W) {
      const float* score = scores + row * TILE + t;
      const vfloat first = power_of_two(load(score) - maxima[row]);
      const vfloat second = power_of_two(load(score + W) - maxima[row]);
      put(row, t, first, second);
      total += first + second;
    }
    store(sums + row * W, total);
  }
}
