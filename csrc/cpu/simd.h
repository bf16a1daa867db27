// Vectors of kVectorBytes for the instruction set whose namespace includes this file (see multiversion.h).
// No include guard: each instruction set gets its own copy, compiled with its own target.

template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Lane;
  typedef Lane I __attribute__((vector_size(kVectorBytes)));
  static constexpr int kLanes = kVectorBytes / 4;
};

template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Lane;
  typedef Lane I __attribute__((vector_size(kVectorBytes)));
  static constexpr int kLanes = kVectorBytes / 8;
};

template <class V, class T>
inline V load(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

// The first n lanes from p, zeros after them; n may be negative.
template <class V, class T>
inline V load_first(const T* p, int64_t n) {
  V v = {};
  if (n >= int64_t(sizeof(V) / sizeof(T))) return load<V>(p);
  if (n > 0) __builtin_memcpy(&v, p, n * sizeof(T));
  return v;
}

template <class V, class T>
inline void store_first(T* p, V v, int64_t n) {
  if (n >= int64_t(sizeof(V) / sizeof(T))) {
    __builtin_memcpy(p, &v, sizeof(V));
  } else {
    __builtin_memcpy(p, &v, n * sizeof(T));
  }
}

// Integers of the lanes' width from int32.
template <class T>
inline typename Simd<T>::I load_integers(const int32_t* p, int64_t n) {
  typedef typename Simd<T>::I I;
  if constexpr (sizeof(T) == sizeof(int32_t)) {
    return load_first<I>(p, n);
  } else {
    I v = {};
    for (int l = 0; l < Simd<T>::kLanes && l < n; ++l) v[l] = p[l];
    return v;
  }
}

// first, first + 1, ...
template <class T>
inline typename Simd<T>::I lane_indices(int64_t first) {
  typedef typename Simd<T>::Lane Lane;
  typename Simd<T>::I v;
  for (int l = 0; l < Simd<T>::kLanes; ++l) v[l] = Lane(l);
  return v + Lane(first);
}

// Calls body(j, n) on the chunks of n <= lanes elements of [0, count); n is a constant but for the last, short one.
template <class T, class Body>
inline void each_chunk(int64_t count, const Body& body) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) body(j, std::integral_constant<int64_t, kLanes>{});
  if (j < count) body(j, count - j);
}

template <class V>
inline V max(V a, V b) {
  return a < b ? b : a;
}

template <class T, class V>
inline T sum_lanes(V v) {
  T total = 0;
  for (unsigned l = 0; l < sizeof(v) / sizeof(v[0]); ++l) total += v[l];
  return total;
}

template <class T, class V>
inline T max_lanes(V v) {
  T best = v[0];
  for (unsigned l = 1; l < sizeof(v) / sizeof(v[0]); ++l) best = best < v[l] ? v[l] : best;
  return best;
}

// e^x for x <= 0, to 2 ulp; exactly 0 below -87; NaN stays NaN.
// x = k ln 2 + r with |r| <= ln 2 / 2; e^r by its Taylor polynomial, which is short of 1e-8 at that range.
inline typename Simd<float>::V exp_nonpositive(typename Simd<float>::V x) {
  typedef Simd<float>::V V;
  typedef Simd<float>::I I;
  constexpr float kUnderflow = -87.0f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const V clamped = x < kUnderflow ? V{} + kUnderflow : x;
  const V shifted = clamped * 1.44269504088896341f + kRound;
  const V k = shifted - kRound;
  const V r = (clamped - k * 0.693359375f) + k * 2.12194440e-4f;
  V y = r * (1.0f / 5040) + 1.0f / 720;
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  I bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;
  V power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return x < kUnderflow ? V{} : y * power;
}

inline typename Simd<double>::V exp_nonpositive(typename Simd<double>::V x) {
  for (int l = 0; l < Simd<double>::kLanes; ++l) x[l] = std::exp(x[l]);
  return x;
}

// log(1 + x) for x in [0, 1], to 2 ulp: 2 atanh(x / (2 + x)) as its odd power series in x / (2 + x) <= 1/3.
inline typename Simd<float>::V log1p_unit(typename Simd<float>::V x) {
  typedef Simd<float>::V V;
  const V t = x / (x + 2.0f), t2 = t * t;
  V y = t2 * (2.0f / 15) + 2.0f / 13;
  y = y * t2 + 2.0f / 11;
  y = y * t2 + 2.0f / 9;
  y = y * t2 + 2.0f / 7;
  y = y * t2 + 2.0f / 5;
  y = y * t2 + 2.0f / 3;
  y = y * t2 + 2.0f;
  return y * t;
}

inline typename Simd<double>::V log1p_unit(typename Simd<double>::V x) {
  for (int l = 0; l < Simd<double>::kLanes; ++l) x[l] = std::log1p(x[l]);
  return x;
}
