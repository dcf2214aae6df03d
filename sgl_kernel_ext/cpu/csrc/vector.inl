// Vectors of VECTOR_LANES floats, in the compiler's own vector extension: the same code becomes
// AVX-512, AVX2, SSE or NEON, depending on the target that the including file has set.

constexpr int W = VECTOR_LANES;
typedef float vfloat __attribute__((vector_size(W * 4)));
typedef int32_t vint __attribute__((vector_size(W * 4)));
typedef float vfloat_unaligned __attribute__((vector_size(W * 4), aligned(4), may_alias));

inline vfloat load(const float* p) { return *reinterpret_cast<const vfloat_unaligned*>(p); }
inline void store(float* p, vfloat v) { *reinterpret_cast<vfloat_unaligned*>(p) = v; }
// x - 0 is x, which the compiler knows to be a plain broadcast; 0 + x is not (x may be -0).
inline vfloat splat(float x) { return x - vfloat{}; }
inline vfloat larger(vfloat a, vfloat b) { return a > b ? a : b; }

template <int... I>
struct Lanes {};
template <int N, int... I>
struct MakeLanes : MakeLanes<N - 1, N - 1, I...> {};
template <int... I>
struct MakeLanes<0, I...> {
  typedef Lanes<I...> type;
};
typedef typename MakeLanes<W>::type AllLanes;

// Sums of neighbouring blocks of 2H lanes, folded to H lanes: those of a, then those of b.
template <int H, int... I>
inline vfloat fold(vfloat a, vfloat b, Lanes<I...>) {
  const vint low = {(I / H * 2 * H + I % H)...};
  const vint high = {(I / H * 2 * H + H + I % H)...};
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
}

template <int H>
struct Fold {
  // v[0 .. W/H*2): each holds blocks of 2H lanes; returns in v[0 .. W/H) blocks of H lanes.
  static inline void run(vfloat* v, int count) {
    for (int i = 0; i < count / 2; ++i) v[i] = fold<H>(v[2 * i], v[2 * i + 1], AllLanes());
    Fold<H / 2>::run(v, count / 2);
  }
};
template <>
struct Fold<0> {
  static inline void run(vfloat*, int) {}
};

// Lane i of the result is the sum of v[i]'s lanes. Overwrites v.
inline vfloat sum_each(vfloat v[W]) {
  Fold<W / 2>::run(v, W);
  return v[0];
}

template <int H, int... I>
inline void exchange(vfloat& a, vfloat& b, Lanes<I...>) {
  const vint first = {((I & H) ? W + I - H : I)...};
  const vint second = {((I & H) ? W + I : I + H)...};
  const vfloat x = __builtin_shuffle(a, b, first);
  b = __builtin_shuffle(a, b, second);
  a = x;
}

template <int H>
struct Transpose {
  static inline void run(vfloat v[W]) {
    for (int i = 0; i < W; ++i)
      if (!(i & H)) exchange<H>(v[i], v[i + H], AllLanes());
    Transpose<H / 2>::run(v);
  }
};
template <>
struct Transpose<0> {
  static inline void run(vfloat*) {}
};

template <int H, int... I>
inline vfloat rotated(vfloat v, Lanes<I...>) {
  const vint from = {((I + H) % W)...};
  return __builtin_shuffle(v, from);
}

template <int H>
struct Largest {
  static inline vfloat run(vfloat v) {
    return Largest<H / 2>::run(larger(v, rotated<H>(v, AllLanes())));
  }
};
template <>
struct Largest<0> {
  static inline vfloat run(vfloat v) { return v; }
};

inline float largest_lane(vfloat v) { return Largest<W / 2>::run(v)[0]; }

inline float sum_lanes(vfloat v) {
  float x[W];
  store(x, v);
  for (int w = W / 2; w > 0; w /= 2)
    for (int i = 0; i < w; ++i) x[i] += x[i + w];
  return x[0];
}

constexpr float LOG2_E = 1.44269504f;

// 2^x for x <= 126, to about two units in the last place; 2^-100 below -100 (and for minus infinity),
// which beside any weight that counts is nothing, and no product with it is subnormal.
inline vfloat power_of_two(vfloat x) {
  x = larger(splat(-100.0f), x);
  // Adding 1.5 * 2^23 rounds to an integer, which then sits in the low bits.
  const vfloat shifted = x + 12582912.0f;
  const vfloat f = x - (shifted - 12582912.0f);
  // Minimax polynomial of 2^f on [-1/2, 1/2], relative error 7.5e-8.
  vfloat p = splat(1.3276472e-3f);
  p = p * f + 9.675541e-3f;
  p = p * f + 5.5507131e-2f;
  p = p * f + 2.402212e-1f;
  p = p * f + 6.9314694e-1f;
  p = p * f + 1.0000001f;
  return (vfloat)((vint)p + ((vint)shifted << 23));
}

inline vfloat hyperbolic_tangent(vfloat x) {
  const vfloat magnitude = x < 0.0f ? -x : x;
  const vfloat bounded = magnitude > 20.0f ? splat(20.0f) : magnitude;
  const vfloat e = power_of_two(bounded * (2.0f * LOG2_E));
  const vfloat far = 1.0f - 2.0f / (e + 1.0f);
  // Near zero that difference would cancel; the series has no such loss.
  const vfloat s = x * x;
  vfloat p = splat(-1382.0f / 155925.0f);
  p = p * s + 62.0f / 2835.0f;
  p = p * s - 17.0f / 315.0f;
  p = p * s + 2.0f / 15.0f;
  p = p * s - 1.0f / 3.0f;
  const vfloat near = x + x * s * p;
  return magnitude < 0.25f ? near : (x < 0.0f ? -far : far);
}
