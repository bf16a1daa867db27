// Products and gradients of problems that stay in the caches, written once and compiled per instruction set (see
// products.cpp). No include guard on purpose.

// Accumulators of a tile: enough chains to hide the latency of a multiply-add, few enough for the registers.
constexpr int kTileRows = kVectorBytes == 64 ? 4 : 2;
constexpr int kTileColumns = 4;

// What threads share out, the same for every instruction set: several tiles of rows, of features.
constexpr int64_t kRowGroup = 4;
constexpr int64_t kFeatureStrip = 64;

// products[r, c] += a[r] . b[c] over n features; rows of a and b are D apart.
template <int R, int C, class T>
inline void add_dots(const T* a, const T* b, int64_t D, int64_t n, T* products, int64_t stride) {
  using V = typename Simd<T>::V;
  V sums[R][C] = {};
  each_chunk<T>(n, [&](int64_t d, auto lanes) {
    V keys[C];
    for (int c = 0; c < C; ++c) keys[c] = load_first<V>(b + c * D + d, lanes);
    for (int r = 0; r < R; ++r) {
      const V query = load_first<V>(a + r * D + d, lanes);
      for (int c = 0; c < C; ++c) sums[r][c] += query * keys[c];
    }
  });
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) products[r * stride + c] += sum_lanes<T>(sums[r][c]);
  }
}

// out[r, 0:W vectors] = sum_j weights[r, j] rows[j, :] - along[r] own[r, :]; rows and own are kFeatureStrip apart,
// those of out D. Only the first n columns exist.
template <int R, int W, class T, class Width>
inline void combine(const T* weights, int64_t row_stride, int64_t column_stride, int64_t count, const T* rows,
                    const T* along, const T* own, T* out, int64_t D, Width n) {
  using V = typename Simd<T>::V;
  constexpr int64_t kLanes = Simd<T>::kLanes;
  V sums[R][W] = {};
  for (int64_t j = 0; j < count; ++j) {
    V row[W];
    for (int w = 0; w < W; ++w) row[w] = load<V>(rows + j * kFeatureStrip + w * kLanes);
    for (int r = 0; r < R; ++r) {
      const V weight = V{} + weights[r * row_stride + j * column_stride];
      for (int w = 0; w < W; ++w) sums[r][w] += weight * row[w];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int w = 0; w < W; ++w) {
      if (along) sums[r][w] -= (V{} + along[r]) * load<V>(own + r * kFeatureStrip + w * kLanes);
      if (n > w * kLanes) store_first(out + r * D + w * kLanes, sums[r][w], std::min<int64_t>(n - w * kLanes, kLanes));
    }
  }
}

// Calls body(i, size) on tiles of kTile rows and then on single rows; the size is a constant.
template <int kTile, class Body>
inline void each_tile(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + kTile <= count; i += kTile) body(i, std::integral_constant<int, kTile>{});
  for (; i < count; ++i) body(i, std::integral_constant<int, 1>{});
}

// 1 / |x|, 0 for a row of zeros.
template <class T>
inline T inverse_norm(const T* x, int64_t D) {
  T square = 0;
  add_dots<1, 1>(x, x, D, D, &square, 0);
  return square == T(0) ? T(0) : T(1) / std::sqrt(square);
}

// Groups [begin, end) of kRowGroup queries, counted over the problems; each also sees to its share of the keys' norms.
template <class T>
void pair_products(const Features<T>& f, T* products, T* query_norms, T* key_norms, int64_t begin, int64_t end) {
  constexpr int64_t kFeatures = 4096 / sizeof(T);  // so that the queries of a tile stay in the first-level cache
  const int64_t groups = (f.N + kRowGroup - 1) / kRowGroup;
  for (int64_t g = begin; g < end; ++g) {
    const int64_t p = g / groups, first = g % groups * kRowGroup;
    const T *query = f.query + (p * f.N + first) * f.D, *key = f.key + p * f.M * f.D;
    T* out = products + (p * f.N + first) * f.M;
    const int64_t rows = std::min(kRowGroup, f.N - first);
    std::fill(out, out + rows * f.M, T(0));
    if (query_norms) {
      for (int64_t i = 0; i < rows; ++i) query_norms[p * f.N + first + i] = inverse_norm(query + i * f.D, f.D);
      for (int64_t j = f.M * (g % groups) / groups; j < f.M * (g % groups + 1) / groups; ++j) {
        key_norms[p * f.M + j] = inverse_norm(key + j * f.D, f.D);
      }
    }
    for (int64_t d = 0; d < f.D; d += kFeatures) {
      const int64_t n = std::min(kFeatures, f.D - d);
      each_tile<kTileRows>(rows, [&](int64_t i, auto tile_rows) {
        each_tile<kTileColumns>(f.M, [&](int64_t j, auto tile_columns) {
          add_dots<tile_rows, tile_columns>(query + i * f.D + d, key + j * f.D + d, f.D, n, out + i * f.M + j, f.M);
        });
      });
    }
  }
}

// along[r] = sum_j slopes[r, j] products[r, j] / |r|^2 over the columns, for each row. The sum stands against one over
// the same slopes that it must cancel, so it is kept in double.
template <class T>
inline void components_along(const T* slopes, const T* products, int64_t row_stride, int64_t column_stride,
                             int64_t rows, int64_t columns, const T* inverse_norms, T* along) {
  for (int64_t r = 0; r < rows; ++r) {
    double dot = 0;
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t at = r * row_stride + j * column_stride;
      dot += double(slopes[at]) * double(products[at]);
    }
    along[r] = T(dot * inverse_norms[r] * inverse_norms[r]);
  }
}

// Problems [begin, end); of the keys only where they have norms.
template <class T>
void components_along(const Features<T>& f, const T* slopes, const T* products, const T* query_norms,
                      const T* key_norms, T* along, int64_t begin, int64_t end) {
  const int64_t stride = f.N + (key_norms ? f.M : 0);
  for (int64_t p = begin; p < end; ++p) {
    const T *slope = slopes + p * f.N * f.M, *product = products + p * f.N * f.M;
    components_along(slope, product, f.M, 1, f.N, f.M, query_norms + p * f.N, along + p * stride);
    if (key_norms) {
      components_along(slope, product, 1, f.M, f.M, f.N, key_norms + p * f.M, along + p * stride + f.N);
    }
  }
}

// A strip of `width` features of all rows, side by side: at a distance of D, often a power of two, they would displace
// each other in the cache.
template <class T>
inline void gather_strip(const T* x, int64_t rows, int64_t D, int64_t width, T* strip) {
  for (int64_t r = 0; r < rows; ++r) {
    std::copy_n(x + r * D, width, strip + r * kFeatureStrip);
    std::fill_n(strip + r * kFeatureStrip + width, kFeatureStrip - width, T(0));
  }
}

// Strips [begin, end) of kFeatureStrip features, counted over the problems; room for such a strip of all N + M rows.
template <class T>
void feature_gradients(const Features<T>& f, const T* slopes, const T* along, int64_t along_stride, T* query_gradient,
                       T* key_gradient, T* room, int64_t begin, int64_t end) {
  constexpr int64_t kWidth = kTileColumns * Simd<T>::kLanes;
  const int64_t strips = (f.D + kFeatureStrip - 1) / kFeatureStrip;
  T *queries = room, *keys = room + f.N * kFeatureStrip;
  for (int64_t s = begin; s < end; ++s) {
    const int64_t p = s / strips, first = s % strips * kFeatureStrip;
    const int64_t width = std::min(kFeatureStrip, f.D - first);
    gather_strip(f.query + p * f.N * f.D + first, f.N, f.D, width, queries);
    gather_strip(f.key + p * f.M * f.D + first, f.M, f.D, width, keys);
    const T* slope = slopes + p * f.N * f.M;
    const T* query_along = along ? along + p * along_stride : nullptr;
    const T* key_along = along ? query_along + f.N : nullptr;
    const auto gradient = [&](int64_t d, auto columns) {  // a constant but for the last features
      if (query_gradient) {
        each_tile<kTileRows>(f.N, [&](int64_t i, auto tile) {
          combine<tile, kTileColumns>(slope + i * f.M, f.M, 1, f.M, keys + d, query_along ? query_along + i : nullptr,
                                      queries + i * kFeatureStrip + d, query_gradient + (p * f.N + i) * f.D + first + d,
                                      f.D, columns);
        });
      }
      if (key_gradient) {
        each_tile<kTileRows>(f.M, [&](int64_t j, auto tile) {
          combine<tile, kTileColumns>(slope + j, 1, f.M, f.N, queries + d, key_along ? key_along + j : nullptr,
                                      keys + j * kFeatureStrip + d, key_gradient + (p * f.M + j) * f.D + first + d, f.D,
                                      columns);
        });
      }
    };
    int64_t d = 0;
    for (; d + kWidth <= width; d += kWidth) gradient(d, std::integral_constant<int64_t, kWidth>{});
    if (d < width) gradient(d, width - d);
  }
}
