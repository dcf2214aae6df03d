// Products of matrices on AMX tiles, whose elements are bfloat16 and whose sums are float32.
//
// A float is exactly the sum of three bfloat16: the nearest, the nearest to what is left, and the
// rest. Of products of such sums those are taken that a float, or two parts of it, can hold: with
// three parts each six of nine, with two parts three of four. Two numbers share a 32-bit lane as a
// tile wants it: elements i and i + W of a row.

constexpr int TILE_LANES = MATRIX_TILE * W;  // 32-bit lanes of a tile

typedef uint32_t vlanes __attribute__((vector_size(W * 4)));

// x to the nearest bfloat16, in the upper half of each lane.
inline vlanes rounded(vfloat x) { return ((vlanes)x + 0x8000u) & 0xffff0000u; }

inline void store(uint32_t* to, vlanes v) { store(reinterpret_cast<float*>(to), (vfloat)v); }

// The first PARTS parts of a and b, side by side in each lane, `apart` lanes from each other.
template <int PARTS>
inline void store_parts(vfloat a, vfloat b, uint32_t* to, int apart) {
  for (int part = 0; part < PARTS; ++part) {
    const vlanes of_a = rounded(a), of_b = rounded(b);
    store(to + part * apart, of_a >> 16 | of_b);
    a -= (vfloat)of_a;
    b -= (vfloat)of_b;
  }
}

// For the left side of a product: row r of step s of part p is number (p * steps + s) * rows + r,
// of W lanes; lane j holds elements j and j + W of the step.
struct RowTiles {
  const uint32_t* lanes;
  int steps;
  int rows;

  const uint32_t* at(int part, int step, int row) const {
    return lanes + ((part * steps + step) * rows + row) * W;
  }
};

// For the right side of a product: tile c of step s of part p is number
// (p * steps + s) * columns + c. Its row j holds elements j and j + W of the step, of 16 columns.
struct ColumnTiles {
  const uint32_t* lanes;
  int steps;
  int columns;

  const uint32_t* at(int part, int step, int column) const {
    return lanes + ((part * steps + step) * columns + column) * TILE_LANES;
  }
};

// keys[0..TILE) of `width` floats -> the right side of scores; missing tokens become zeros.
template <int PARTS, class Width>
inline void pack_keys(const float* const* keys, int tokens, Width width, uint32_t* to) {
  const int steps = width / MATRIX_STEP;
  for (int column = 0; column < TILE / MATRIX_TILE; ++column)
    for (int step = 0; step < steps; ++step) {
      alignas(64) uint32_t parts[PARTS][TILE_LANES];
      for (int i = 0; i < MATRIX_TILE; ++i) {
        const int t = column * MATRIX_TILE + i;
        const float* key = t < tokens ? keys[t] + step * MATRIX_STEP : nullptr;
        store_parts<PARTS>(key ? load(key) : splat(0.0f), key ? load(key + W) : splat(0.0f),
                           parts[0] + i * W, TILE_LANES);
      }
      for (int part = 0; part < PARTS; ++part) {
        vfloat v[W];
        for (int i = 0; i < W; ++i) v[i] = load(reinterpret_cast<float*>(parts[part] + i * W));
        Transpose<W / 2>::run(v);
        uint32_t* tile = to + ((part * steps + step) * (TILE / MATRIX_TILE) + column) * TILE_LANES;
        for (int i = 0; i < W; ++i) store(tile + i * W, (vlanes)v[i]);
      }
    }
}

// values[0..TILE) of `width` floats -> the right side of weighted sums.
template <int PARTS, class Width>
inline void pack_values(const float* const* values, int tokens, Width width, uint32_t* to) {
  const int columns = width / MATRIX_TILE;
  const int apart = TILE / MATRIX_STEP * columns * TILE_LANES;
  for (int t = 0; t < TILE; ++t) {
    const int step = t / MATRIX_STEP, i = t % MATRIX_STEP;
    if (i >= W) continue;
    for (int column = 0; column < columns; ++column) {
      const int d = column * MATRIX_TILE;
      store_parts<PARTS>(t < tokens ? load(values[t] + d) : splat(0.0f),
                         t + W < tokens ? load(values[t + W] + d) : splat(0.0f),
                         to + (step * columns + column) * TILE_LANES + i * W, apart);
    }
  }
}

// to[0 .. 16 ROW_TILES)[0 .. 16 columns) = or += left x right. Tiles 0 to 3 are sums of 16 rows
// each, 4 to 6 hold the parts of 16 columns, 7 passes the rows by.
template <int LEFT_PARTS, int RIGHT_PARTS, int ROW_TILES, bool ADD>
inline void multiply(RowTiles left, ColumnTiles right, float* to, int stride, Ahead& ahead) {
  constexpr int PARTS = LEFT_PARTS > RIGHT_PARTS ? LEFT_PARTS : RIGHT_PARTS;
  // The compiler does not know that loading a tile reads memory: what is to be read must be there.
  __asm__ volatile("" ::: "memory");
  for (int column = 0; column < right.columns; ++column, to += MATRIX_TILE) {
// Numbers of tiles must be literals.
#define START(i)                                                                         \
  if (ROW_TILES > i && ADD) _tile_loadd(i, to + i * MATRIX_TILE * stride, stride * 4); \
  if (ROW_TILES > i && !ADD) _tile_zero(i);
    START(0) START(1) START(2) START(3)
    for (int step = 0; step < right.steps; ++step) {
      _tile_loadd(4, right.at(0, step, column), 64);
      if (RIGHT_PARTS > 1) _tile_loadd(5, right.at(1, step, column), 64);
      if (RIGHT_PARTS > 2) _tile_loadd(6, right.at(2, step, column), 64);
#define PRODUCT(i, part)                                                  \
  if (ROW_TILES > i && LEFT_PARTS > part) {                               \
    _tile_loadd(7, left.at(part, step, i * MATRIX_TILE), 64);             \
    _tile_dpbf16ps(i, 7, 4);                                              \
    if (RIGHT_PARTS > 1 && part + 1 < PARTS) _tile_dpbf16ps(i, 7, 5);     \
    if (RIGHT_PARTS > 2 && part + 2 < PARTS) _tile_dpbf16ps(i, 7, 6);     \
  }
#define PRODUCTS(i) PRODUCT(i, 0) PRODUCT(i, 1) PRODUCT(i, 2) if (ROW_TILES > i) ahead.step();
      PRODUCTS(0) PRODUCTS(1) PRODUCTS(2) PRODUCTS(3)
    }
#define FINISH(i) \
  if (ROW_TILES > i) _tile_stored(i, to + i * MATRIX_TILE * stride, stride * 4);
    FINISH(0) FINISH(1) FINISH(2) FINISH(3)
#undef START
#undef PRODUCT
#undef PRODUCTS
#undef FINISH
  }
}

// The same for as many row tiles as `rows` need.
template <int LEFT_PARTS, int RIGHT_PARTS, bool ADD>
inline void multiply_rows(int rows, RowTiles left, ColumnTiles right, float* to, int stride,
                          Ahead& ahead) {
  if (rows > 3 * MATRIX_TILE)
    multiply<LEFT_PARTS, RIGHT_PARTS, 4, ADD>(left, right, to, stride, ahead);
  else if (rows > 2 * MATRIX_TILE)
    multiply<LEFT_PARTS, RIGHT_PARTS, 3, ADD>(left, right, to, stride, ahead);
  else if (rows > MATRIX_TILE)
    multiply<LEFT_PARTS, RIGHT_PARTS, 2, ADD>(left, right, to, stride, ahead);
  else
    multiply<LEFT_PARTS, RIGHT_PARTS, 1, ADD>(left, right, to, stride, ahead);
}

// The tiles of this thread, all of full size, for as long as this lives; then as they were set up
// before, because other libraries in this process use them too and may not set them up each time.
class TileSetup {
  struct alignas(64) Configuration {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  Configuration before;

 public:
  TileSetup() {
    _tile_storeconfig(&before);
    const Configuration ours;
    __asm__ volatile("" ::: "memory");
    _tile_loadconfig(&ours);
  }
  ~TileSetup() {
    if (before.palette)
      _tile_loadconfig(&before);
    else
      _tile_release();
  }
};
