// What a dense layer does to each token's row between its products, compiled once per instruction
// set: computed in float32 and rounded once. The including file has included vector.inl.

typedef uint16_t vhalf __attribute__((vector_size(W * 2)));
typedef uint16_t vhalf_unaligned __attribute__((vector_size(W * 2), aligned(2), may_alias));
typedef uint32_t vuint __attribute__((vector_size(W * 4)));

template <bool BFLOAT16>
struct Elements;

template <>
struct Elements<false> {
  typedef float type;
  static inline vfloat read(const float* p) { return load(p); }
  static inline void write(float* p, vfloat v) { store(p, v); }
  static inline float read_one(const float* p) { return *p; }
  static inline void write_one(float* p, float v) { *p = v; }
};

template <>
struct Elements<true> {
  typedef uint16_t type;
  static inline vfloat read(const uint16_t* p) {
    const vhalf half = *reinterpret_cast<const vhalf_unaligned*>(p);
    return (vfloat)(__builtin_convertvector(half, vuint) << 16);
  }
  static inline void write(uint16_t* p, vfloat v) {
    const vuint bits = (vuint)v;
    const vuint rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // nearest, even
    const vuint is_nan = (vuint)((bits & 0x7fffffffu) > 0x7f800000u);
    const vuint kept = (rounded & ~is_nan) | (is_nan & 0x7fc0u);
    *reinterpret_cast<vhalf_unaligned*>(p) = __builtin_convertvector(kept, vhalf);
  }
  static inline float read_one(const uint16_t* p) { return from_bfloat16(*p); }
  static inline void write_one(uint16_t* p, float v) { *p = to_bfloat16(v); }
};

// x / (1 + e^-x)
inline vfloat silu(vfloat x) {
  const vfloat exponent = -LOG2_E * x;
  return x / (1.0f + power_of_two(exponent > 126.0f ? splat(126.0f) : exponent));
}

template <bool BFLOAT16>
void silu_and_multiply_rows(const BlendActivation& a, int64_t begin, int64_t end) {
  typedef Elements<BFLOAT16> E;
  typedef typename E::type type;
  for (int64_t r = begin; r < end; ++r) {
    const type* gate = static_cast<const type*>(a.input) + r * a.input_stride;
    const type* up = gate + a.width;
    type* out = static_cast<type*>(a.output) + r * a.width;
    int64_t i = 0;
    for (; i + W <= a.width; i += W) E::write(out + i, silu(E::read(gate + i)) * E::read(up + i));
    for (; i < a.width; ++i)
      E::write_one(out + i, silu(splat(E::read_one(gate + i)))[0] * E::read_one(up + i));
  }
}

template <bool BFLOAT16>
void normalise_rows(const BlendNorm& a, int64_t begin, int64_t end) {
  typedef Elements<BFLOAT16> E;
  typedef typename E::type type;
  const type* weight = static_cast<const type*>(a.weight);
  thread_local BlendScratch scratch;
  float* x = scratch.reserve(a.width);
  for (int64_t r = begin; r < end; ++r) {
    const type* input = static_cast<const type*>(a.input) + r * a.input_stride;
    const type* residual = a.residual == nullptr
                               ? nullptr
                               : static_cast<const type*>(a.residual) + r * a.residual_stride;
    type* sum_out = static_cast<type*>(a.sum) + (a.residual == nullptr ? 0 : r * a.width);
    type* out = static_cast<type*>(a.output) + r * a.width;
    vfloat squares[2] = {splat(0.0f), splat(0.0f)};
    int64_t i = 0;
    for (int turn = 0; i + W <= a.width; i += W, turn ^= 1) {
      vfloat v = E::read(input + i);
      if (residual != nullptr) {
        v += E::read(residual + i);
        E::write(sum_out + i, v);
      }
      store(x + i, v);
      squares[turn] += v * v;
    }
    float total = sum_lanes(squares[0] + squares[1]);
    for (; i < a.width; ++i) {
      float v = E::read_one(input + i);
      if (residual != nullptr) {
        v += E::read_one(residual + i);
        E::write_one(sum_out + i, v);
      }
      x[i] = v;
      total += v * v;
    }
    const float factor = 1.0f / __builtin_sqrtf(total / static_cast<float>(a.width) + a.epsilon);
    for (i = 0; i + W <= a.width; i += W)
      E::write(out + i, load(x + i) * factor * E::read(weight + i));
    for (; i < a.width; ++i) E::write_one(out + i, x[i] * factor * E::read_one(weight + i));
  }
}

// Rotates the first half of each head's rotary part against the second half.
template <bool BFLOAT16>
void rotate_rows(const BlendRotation& a, int64_t begin, int64_t end) {
  typedef Elements<BFLOAT16> E;
  typedef typename E::type type;
  const int64_t half = a.rotary_dim / 2;
  for (int64_t r = begin; r < end; ++r) {
    const type* cosine = static_cast<const type*>(a.cos_sin) + a.positions[r] * a.rotary_dim;
    const type* sine = cosine + half;
    const auto rotate = [&](void* base, int64_t stride, int64_t heads) {
      for (int64_t h = 0; h < heads; ++h) {
        type* first = static_cast<type*>(base) + r * stride + h * a.head_dim;
        type* second = first + half;
        int64_t i = 0;
        for (; i + W <= half; i += W) {
          const vfloat x = E::read(first + i), y = E::read(second + i);
          const vfloat c = E::read(cosine + i), s = E::read(sine + i);
          E::write(first + i, x * c - y * s);
          E::write(second + i, y * c + x * s);
        }
        for (; i < half; ++i) {
          const float x = E::read_one(first + i), y = E::read_one(second + i);
          const float c = E::read_one(cosine + i), s = E::read_one(sine + i);
          E::write_one(first + i, x * c - y * s);
          E::write_one(second + i, y * c + x * s);
        }
      }
    };
    rotate(a.query, a.query_stride, a.heads);
    rotate(a.key, a.key_stride, a.kv_heads);
  }
}

void silu_and_multiply(const BlendActivation& a, int64_t begin, int64_t end) {
  a.bfloat16 != 0 ? silu_and_multiply_rows<true>(a, begin, end)
                  : silu_and_multiply_rows<false>(a, begin, end);
}

void normalise(const BlendNorm& a, int64_t begin, int64_t end) {
  a.bfloat16 != 0 ? normalise_rows<true>(a, begin, end) : normalise_rows<false>(a, begin, end);
}

void rotate(const BlendRotation& a, int64_t begin, int64_t end) {
  a.bfloat16 != 0 ? rotate_rows<true>(a, begin, end) : rotate_rows<false>(a, begin, end);
}
