// Losses of few rows, which stay in the caches, written once and compiled per instruction set (see fused.cpp).
// No include guard on purpose.

#include "contrastive_kernels.h"

// Accumulators of a tile: enough chains to hide the latency of a multiply-add, few enough for the registers.
constexpr int kTileRows = kVectorBytes == 64 ? 4 : 2;
constexpr int kTileColumns = 4;

// What threads share out, the same for every instruction set: several tiles of rows, of features.
constexpr int64_t kRowGroup = 4;
constexpr int64_t kFeatureStrip = 64;

// Elements of a cache line.
template <class T>
constexpr int64_t kLine = 64 / sizeof(T);

template <class T>
inline T* row_of(const RowSet& set, int64_t p, int64_t r, int64_t D) {
  if (r < set.split) return static_cast<T*>(set.first) + (p * set.split + r) * D;
  return static_cast<T*>(set.second) + (p * (set.rows - set.split) + (r - set.split)) * D;
}

// products[r, c] += a[r] . b[c] over n features.
template <int R, int C, class T>
inline void add_dots(const T* const (&a)[R], const T* const (&b)[C], int64_t n, T* products, int64_t stride) {
  using V = typename Simd<T>::V;
  V sums[R][C] = {};
  each_chunk<T>(n, [&](int64_t d, auto lanes) {
    V keys[C];
    for (int c = 0; c < C; ++c) keys[c] = load_first<V>(b[c] + d, lanes);
    for (int r = 0; r < R; ++r) {
      const V query = load_first<V>(a[r] + d, lanes);
      for (int c = 0; c < C; ++c) sums[r][c] += query * keys[c];
    }
  });
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) products[r * stride + c] += sum_lanes<T>(sums[r][c]);
  }
}

// out[r][0:W vectors] = scale (sum_j weights[r, j] rows[j, :] - along[r] own[r, :]) where out[r] is not null; rows and own
// are kFeatureStrip apart. Only the first n columns exist.
template <int R, int W, class T, class Width>
inline void combine(const T* weights, int64_t row_stride, int64_t column_stride, int64_t count, const T* rows,
                    const T* along, const T* own, T scale, T* const (&out)[R], Width n) {
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
    if (!out[r]) continue;
    for (int w = 0; w < W; ++w) {
      if (along) sums[r][w] -= (V{} + along[r]) * load<V>(own + r * kFeatureStrip + w * kLanes);
      if (n > w * kLanes) store_first(out[r] + w * kLanes, sums[r][w] * scale, std::min<int64_t>(n - w * kLanes, kLanes));
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
  const T* const row[1] = {x};
  add_dots<1, 1>(row, row, D, &square, 0);
  return square == T(0) ? T(0) : T(1) / std::sqrt(square);
}

// Products of groups [begin, end) of kRowGroup queries, counted over the problems; with norms (null for none), each group
// also sees to its share of the keys'.
template <class T>
void pair_products(const FusedLoss<T>& l, T* products, T* query_norms, T* key_norms, int64_t begin, int64_t end) {
  constexpr int64_t kFeatures = 4096 / sizeof(T);  // so that the queries of a tile stay in the first-level cache
  const int64_t groups = (l.N + kRowGroup - 1) / kRowGroup;
  for (int64_t g = begin; g < end; ++g) {
    const int64_t p = g / groups, first = g % groups * kRowGroup;
    const auto query = [&](int64_t i) -> const T* { return row_of<T>(l.query, p, first + i, l.D); };
    const auto key = [&](int64_t j) -> const T* { return row_of<T>(l.key, p, j, l.D); };
    T* out = products + (p * l.N + first) * l.M;
    const int64_t rows = std::min(kRowGroup, l.N - first);
    std::fill(out, out + rows * l.M, T(0));
    if (query_norms) {
      for (int64_t i = 0; i < rows; ++i) query_norms[p * l.N + first + i] = inverse_norm(query(i), l.D);
      for (int64_t j = l.M * (g % groups) / groups; key_norms != query_norms && j < l.M * (g % groups + 1) / groups; ++j) {
        key_norms[p * l.M + j] = inverse_norm(key(j), l.D);
      }
    }
    for (int64_t d = 0; d < l.D; d += kFeatures) {
      const int64_t n = std::min(kFeatures, l.D - d);
      each_tile<kTileRows>(rows, [&](int64_t i, auto tile_rows) {
        each_tile<kTileColumns>(l.M, [&](int64_t j, auto tile_columns) {
          constexpr int R = tile_rows, C = tile_columns;
          const T *a[R], *b[C];
          for (int r = 0; r < R; ++r) a[r] = query(i + r) + d;
          for (int c = 0; c < C; ++c) b[c] = key(j + c) + d;
          add_dots<R, C>(a, b, n, out + i * l.M + j, l.M);
        });
      });
    }
  }
}

// What the gradient needs of anchor r, of P N: its planes of `slopes`. Adds `share` of its results to those in `rows`.
template <class T>
void settle_anchor(const FusedLoss<T>& l, const T* anchors, T temperature, T share, int64_t r, T* slopes, T* rows) {
  const int64_t plane = l.P * l.N;
  const auto of = [&](AnchorPlane which) { return anchors[which * plane + r]; };
  slopes[kNormalizer * plane + r] = -kAbsent<T>;
  slopes[kTarget * plane + r] = slopes[kSlope * plane + r] = 0;
  if (of(kPositiveCount) == 0) return;
  const T log_sum = std::log(of(kExponentials)), positive_mean = of(kPositiveSum) / of(kPositiveCount);
  const T above = positive_mean - of(kTopLogit);
  const T slope = (l.row_gradient ? l.row_gradient[r] : T(1)) * share;
  slopes[kNormalizer * plane + r] = of(kTopLogit) + log_sum;
  slopes[kTarget * plane + r] = T(1) / of(kPositiveCount);
  slopes[kSlope * plane + r] = slope;
  rows[kLoss * plane + r] += share * (log_sum - above);
  rows[kValid * plane + r] += share;
  rows[kPositiveSimilarity * plane + r] += share * positive_mean * temperature;
  if (of(kNegativeCount) > 0) {
    rows[kNegativeSimilarity * plane + r] += share * of(kNegativeSum) / of(kNegativeCount) * temperature;
    rows[kHasNegative * plane + r] += share;
  }
  rows[kTop1 * plane + r] += share * T(of(kBestPositive) > of(kBestNegative));
  rows[kLogitDot * plane + r] += slope * (of(kWeightedBelow) / of(kExponentials) - above);
}

// Anchors that have seen nothing yet, rows [begin, end) of P N.
template <class T>
void clear_anchors(T* anchors, int64_t plane, int64_t begin, int64_t end) {
  for (int which = 0; which < kAnchorPlanes; ++which) {
    const bool logit = which == kTopLogit || which == kBestPositive || which == kBestNegative;
    std::fill(anchors + which * plane + begin, anchors + which * plane + end, logit ? kAbsent<T> : T(0));
  }
}

// along[r] = sum_j slopes[r, j] products[r, j] / |r|^2 over the columns, for each row, and unless key_norms is null the
// same for each column. The sums stand against ones over the same slopes that they must cancel, so they are kept in
// double.
template <class T>
void components_along(const T* slopes, const T* products, int64_t N, int64_t M, const T* query_norms, const T* key_norms,
                      T* along) {
  std::vector<double> columns(M);
  for (int64_t i = 0; i < N; ++i) {
    double dot = 0;
    for (int64_t j = 0; j < M; ++j) {
      const double part = double(slopes[i * M + j]) * double(products[i * M + j]);
      dot += part;
      columns[j] += part;
    }
    along[i] = T(dot * query_norms[i] * query_norms[i]);
  }
  for (int64_t j = 0; key_norms && j < M; ++j) along[N + j] = T(columns[j] * key_norms[j] * key_norms[j]);
}

// What remains for problem p once its rows have results.
template <class T>
void total(const FusedLoss<T>& l, T temperature, const T* rows, int64_t p) {
  const int64_t plane = l.P * l.N;
  double loss = 0, weight = 0, logit_dot = 0, logit_sum = 0;
  for (int64_t r = p * l.N; r < (p + 1) * l.N; ++r) {
    const double own = rows[kValid * plane + r] * (l.weights ? l.weights[r] : T(1));
    loss += own * rows[kLoss * plane + r];
    weight += own;
    logit_dot += rows[kLogitDot * plane + r];
    logit_sum += rows[kLogitSum * plane + r];
  }
  l.total_loss[p] = T(loss);
  l.total_weight[p] = weight > 0 ? T(weight) : T(1);
  l.mean_loss[p] = T(loss / (weight > 0 ? weight : 1));
  l.temperature_gradient[p] = T(-logit_dot / temperature);
  l.bias_gradient[p] = T(logit_sum);
}

// The whole loss, by the members of a team.
template <class T>
void fused_loss(const FusedLoss<T>& l, const Team& team) {
  const int64_t plane = l.P * l.N, groups = l.P * ((l.N + kRowGroup - 1) / kRowGroup);
  const T temperature = l.temperature ? *l.temperature : l.temperature_value, bias = l.bias ? *l.bias : l.bias_value;
  const FusedScratch<T> scratch(l);
  T *const query_norms = scratch.query_norms, *const key_norms = scratch.key_norms;

  Operands<T> operands = l;
  operands.query_scale = l.normalize ? query_norms : nullptr;
  operands.key_scale = l.normalize ? key_norms : nullptr;
  operands.temperature = &temperature;
  operands.bias = l.form == Form::kSigmoid ? &bias : nullptr;

  pair_products(l, l.slopes, l.normalize ? query_norms : nullptr, l.normalize ? key_norms : nullptr, team.begin(groups, 1),
                team.end(groups, 1));
  const int64_t begin = team.begin(plane, 1), end = team.end(plane, 1);
  const bool by_anchors = l.self_contrast || l.form == Form::kSymmetric;
  if (by_anchors) {
    clear_anchors(scratch.row_anchors, plane, begin, end);
    clear_anchors(scratch.column_anchors, plane, begin, end);
  }
  team.sync();

  if (l.along) std::copy(l.slopes + begin * l.M, l.slopes + end * l.M, scratch.products + begin * l.M);
  if (!by_anchors) {
    contrastive_rows(RowBlock<T>{operands, l.slopes, 0, l.P, 0, l.N, l.row_gradient, l.write_slopes, l.rows}, begin, end);
  } else {
    const Panel<T> panel{operands, l.slopes, 0, l.P, 0, l.N, 0, l.M};
    const T share = l.self_contrast ? T(1) : T(1) / 2;
    for (int which = 0; which < kRowPlanes; ++which) {
      std::fill(l.rows + which * plane + begin, l.rows + which * plane + end, T(0));
    }
    row_statistics(panel, scratch.row_anchors, begin, end);
    for (int64_t r = begin; r < end; ++r) {
      settle_anchor(l, scratch.row_anchors, temperature, share, r, scratch.row_slopes, l.rows);
    }
    if (!l.self_contrast) {
      const int64_t strips = l.P * ((l.N + kStrip - 1) / kStrip);
      column_statistics(panel, scratch.column_anchors, 0, l.N, team.begin(strips, 1), team.end(strips, 1));
      team.sync();
      for (int64_t r = begin; r < end; ++r) {
        settle_anchor(l, scratch.column_anchors, temperature, share, r, scratch.column_slopes, l.rows);
      }
    }
    team.sync();
    if (l.write_slopes) {
      panel_gradient(panel, scratch.row_slopes, l.self_contrast ? scratch.row_slopes : scratch.column_slopes, begin, end);
    }
  }
  team.sync();

  for (int64_t p = team.begin(l.P, 1); p < team.end(l.P, 1); ++p) {
    total(l, temperature, l.rows, p);
    if (!l.along) continue;
    components_along(l.slopes + p * l.N * l.M, scratch.products + p * l.N * l.M, l.N, l.M, query_norms + p * l.N,
                     l.self_contrast ? nullptr : key_norms + p * l.M,
                     l.along + p * (l.self_contrast ? l.N : l.N + l.M));
  }
}

// A strip of `width` features of all rows, side by side: at a distance of D, often a power of two, they would displace
// each other in the cache.
template <class T>
inline void gather_strip(const RowSet& set, int64_t p, int64_t D, int64_t first, int64_t width, T* strip) {
  for (int64_t r = 0; r < set.rows; ++r, strip += kFeatureStrip) {
    const T* row = row_of<T>(set, p, r, D) + first;
    for (int64_t d = width; d < 2 * width; d += kLine<T>) __builtin_prefetch(row + d);  // of the next strip
    std::copy_n(row, width, strip);
    std::fill_n(strip + width, kFeatureStrip - width, T(0));
  }
}

// Gradients of the rows of one set from a strip of them and one of the other set's rows; `row_stride` and `column_stride`
// lead through the slopes, `along` is null where nothing is taken off.
template <class T>
void strip_gradients(const RowSet& gradient, int64_t p, int64_t D, int64_t first, int64_t width, const T* slopes,
                     int64_t row_stride, int64_t column_stride, int64_t others, const T* other, const T* own,
                     const T* along, T scale) {
  constexpr int64_t kWidth = kTileColumns * Simd<T>::kLanes;
  const auto columns = [&](int64_t d, auto n) {  // a constant but for the last features
    each_tile<kTileRows>(gradient.rows, [&](int64_t i, auto tile) {
      constexpr int R = tile;
      T* out[R];
      for (int r = 0; r < R; ++r) {
        const bool wanted = i + r < gradient.split ? gradient.first : gradient.second;
        out[r] = wanted ? row_of<T>(gradient, p, i + r, D) + first + d : nullptr;
      }
      combine<R, kTileColumns>(slopes + i * row_stride, row_stride, column_stride, others, other + d,
                                  along ? along + i : nullptr, own + i * kFeatureStrip + d, scale, out, n);
    });
  };
  int64_t d = 0;
  for (; d + kWidth <= width; d += kWidth) columns(d, std::integral_constant<int64_t, kWidth>{});
  if (d < width) columns(d, width - d);
}

// Strips [begin, end) of kFeatureStrip features, counted over the problems; room for such a strip of all rows.
template <class T>
void fused_gradients(const FusedGradients<T>& g, T* room, int64_t begin, int64_t end) {
  const int64_t N = g.query.rows, M = g.key.rows, strips = (g.D + kFeatureStrip - 1) / kFeatureStrip;
  T *queries = room, *keys = g.self_contrast ? room : room + N * kFeatureStrip;
  for (int64_t s = begin; s < end; ++s) {
    const int64_t p = s / strips, first = s % strips * kFeatureStrip, width = std::min(kFeatureStrip, g.D - first);
    gather_strip(g.query, p, g.D, first, width, queries);
    if (!g.self_contrast) gather_strip(g.key, p, g.D, first, width, keys);
    const T* slopes = g.slopes + p * N * M;
    const T* along = g.along ? g.along + p * (g.self_contrast ? N : N + M) : nullptr;
    const T scale = g.scale ? g.scale[p] : T(1);
    if (g.query_gradient.first || g.query_gradient.second) {
      strip_gradients(g.query_gradient, p, g.D, first, width, slopes, M, 1, M, keys, queries, along, scale);
    }
    if (!g.self_contrast && g.key_gradient.first) {
      strip_gradients(g.key_gradient, p, g.D, first, width, slopes, 1, M, N, queries, keys, along ? along + N : nullptr,
                      scale);
    }
  }
}
