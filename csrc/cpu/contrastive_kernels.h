// The row epilogue and the projection, written once and compiled per instruction set (see contrastive.cpp).
// No include guard on purpose.

#include "../pair_rule.h"

// A logit that takes no part: finite, so that 0 * kAbsent is 0, and far below any real one.
template <class T>
constexpr T kAbsent = T(-1e30);

// One query against vectors of keys. Copied into the loops by value, so that its members live in registers.
template <class T>
struct Row {
  using V = typename Simd<T>::V;
  using I = typename Simd<T>::I;
  using Lane = typename Simd<T>::Lane;

  Lane N, M, row, own, label;
  const T* weights;           // of this problem, as all pointers here
  const T* key_scales;        //
  const int32_t* key_labels;  //
  T scale;                    // of the query, temperature included
  bool shared_weights, self_contrast, exists;
  SameLabel same_label;

  Row(const Operands<T>& o, int64_t p, int64_t i)
      : N(Lane(o.N)),
        M(Lane(o.M)),
        row(Lane(i)),
        own(o.own_shift < 0 ? Lane(-1) : Lane(i + o.own_shift - (i + o.own_shift < o.M ? 0 : o.M))),
        label(o.query_labels ? o.query_labels[p * o.N + i] : 0),
        weights(o.weights ? o.weights + p * o.N : nullptr),
        key_scales(o.key_scale ? o.key_scale + p * o.M : nullptr),
        key_labels(o.key_labels ? o.key_labels + p * o.M : nullptr),
        scale((o.query_scale ? o.query_scale[p * o.N + i] : T(1)) / *o.temperature),
        shared_weights(o.shared_weights),
        self_contrast(o.self_contrast),
        exists(!weights || weights[i] > 0),
        same_label(o.same_label) {}

  // Classes of the n keys from j on. Seen from the keys as anchors they are the same: a query is its own pair's own.
  inline PairClass<I> classes(int64_t j, int64_t n) const {
    const I index = lane_indices<T>(j);
    I key_exists = exists ? ~I{} : I{};
    if (n < Simd<T>::kLanes) key_exists &= index < Lane(j + n);
    if (weights && shared_weights) {
      key_exists &= (index >= N) | (I)(load_first<V>(weights + j, std::min<int64_t>(n, N - j)) > T(0));
    }
    if (self_contrast) key_exists &= index != row;
    I same = {};
    if (key_labels) same = load_integers<T>(key_labels + j, n) == label;
    return classify<I>(index == own, same, key_exists, same_label);
  }

  inline V key_scale(int64_t j, int64_t n) const {
    return key_scales ? load_first<V>(key_scales + j, n) : V{} + T(1);
  }

  // Logits of the n products at `products`, with the keys from j on.
  inline V logits(const T* products, int64_t j, int64_t n) const {
    return load_first<V>(products, n) * scale * key_scale(j, n);
  }
};

// Sums, counts and maxima over the positives and over the negatives of anchors, one anchor a lane or one in all lanes.
template <class T>
struct PairSums {
  using V = typename Simd<T>::V;
  using I = typename Simd<T>::I;
  V best_positive = V{} + kAbsent<T>, best_negative = V{} + kAbsent<T>;
  V sum_positive = {}, sum_negative = {};
  I positives = {}, negatives = {};

  inline void add(V logit, PairClass<I> is) {
    const V absent = V{} + kAbsent<T>;
    best_positive = max(best_positive, is.positive ? logit : absent);
    best_negative = max(best_negative, is.negative ? logit : absent);
    sum_positive += is.positive ? logit : V{};
    sum_negative += is.negative ? logit : V{};
    positives -= is.positive;  // a mask is -1 where it holds
    negatives -= is.negative;
  }
};

template <class T>
void evaluate_row(const RowBlock<T>& b, int64_t p, int64_t i, T* products) {
  using V = typename Simd<T>::V;
  const Row<T> row(b, p, i);
  T* planes = b.rows + p * b.N + i;
  const int64_t plane = b.P * b.N;
  for (int which = 0; which < kRowPlanes; ++which) planes[which * plane] = 0;
  const T temperature = *b.temperature, row_gradient = b.row_gradient ? b.row_gradient[p * b.N + i] : T(1);

  // Pass 1: products to logits; maxima, sums and counts of positives and negatives.
  PairSums<T> sums;
  each_chunk<T>(b.M, [&, row](int64_t j, auto n) {
    const auto is = row.classes(j, n);
    const V logit = row.logits(products + j, j, n);
    sums.add(logit, is);
    store_first(products + j, (is.positive | is.negative) ? logit : V{} + kAbsent<T>, n);
  });
  const T positive_count = T(sum_lanes<int64_t>(sums.positives));
  const T negative_count = T(sum_lanes<int64_t>(sums.negatives));
  if (positive_count == 0 && !b.bias) {
    if (b.write_gradient) std::fill(products, products + b.M, T(0));
    return;
  }
  const T best_positive = max_lanes<T>(sums.best_positive), best_negative = max_lanes<T>(sums.best_negative);
  const T mean_positive = sum_lanes<T>(sums.sum_positive) / std::max(positive_count, T(1));
  planes[kValid * plane] = positive_count > 0;
  planes[kPositiveSimilarity * plane] = mean_positive * temperature;
  if (negative_count > 0) {
    planes[kNegativeSimilarity * plane] = sum_lanes<T>(sums.sum_negative) / negative_count * temperature;
    planes[kHasNegative * plane] = 1;
  }
  planes[kTop1 * plane] = best_positive > best_negative;
  const T slope = row_gradient * row.scale;

  if (b.bias) {
    // Pass 2 of the sigmoid loss: every candidate for itself.
    const T bias = *b.bias;
    V loss = {}, slopes = {}, slopes_logit = {};
    each_chunk<T>(b.M, [&, row](int64_t j, auto n) {
      const auto is = row.classes(j, n);
      const V logit = load_first<V>(products + j, n);
      const V margin = is.positive ? logit + bias : -(logit + bias);
      const V e = exp_nonpositive(margin < T(0) ? margin : -margin);  // e^-|margin|
      const V softplus = log1p_unit(e) + (margin < T(0) ? -margin : V{});
      const V miss = (margin < T(0) ? V{} + T(1) : e) / (e + T(1));  // sigmoid(-margin)
      const V d = is.positive ? -miss : is.negative ? miss : V{};
      loss += (is.positive | is.negative) ? softplus : V{};
      slopes += d;
      slopes_logit += d * logit;
      if (b.write_gradient) store_first(products + j, d * slope * row.key_scale(j, n), n);
    });
    planes[kLoss * plane] = sum_lanes<T>(loss);
    planes[kLogitDot * plane] = row_gradient * sum_lanes<T>(slopes_logit);
    planes[kLogitSum * plane] = row_gradient * sum_lanes<T>(slopes);
    return;
  }

  // Pass 2: the softmax's sum, and its mean logit relative to the top one.
  const T top = best_positive < best_negative ? best_negative : best_positive;
  V total = {}, total_below = {};
  each_chunk<T>(b.M, [&](int64_t j, auto n) {
    V below = load_first<V>(products + j, n) - top;
    if (n < Simd<T>::kLanes) below = lane_indices<T>(0) < typename Simd<T>::Lane(n) ? below : V{} + kAbsent<T>;
    const V e = exp_nonpositive(below);
    total += e;
    total_below += e * below;
    store_first(products + j, e, n);
  });
  const T sum = sum_lanes<T>(total);
  planes[kLoss * plane] = std::log(sum) - (mean_positive - top);
  planes[kLogitDot * plane] = row_gradient * (sum_lanes<T>(total_below) / sum - (mean_positive - top));
  if (!b.write_gradient) return;

  // Pass 3: exponentials to the gradient with respect to the products.
  const T inverse_sum = T(1) / sum, target = T(1) / positive_count;
  each_chunk<T>(b.M, [&, row](int64_t j, auto n) {
    const V goal = row.classes(j, n).positive ? V{} + target : V{};
    const V weight = (load_first<V>(products + j, n) * inverse_sum - goal) * slope * row.key_scale(j, n);
    store_first(products + j, weight, n);
  });
}

// Adds to the anchor's planes what a part of its row sums up to.
template <class T>
void merge_anchor(T* planes, int64_t plane, T top, T total, T total_below, T sum_positive, T positives,
                  T sum_negative, T negatives, T best_positive, T best_negative) {
  if (top > kAbsent<T>) {
    const T known = planes[kTopLogit * plane], both = std::max(known, top);
    const T scale_known = std::exp(known - both), scale_new = std::exp(top - both);
    planes[kTopLogit * plane] = both;
    planes[kWeightedBelow * plane] =
        scale_known * (planes[kWeightedBelow * plane] + planes[kExponentials * plane] * std::max(known - both, kAbsent<T>)) +
        scale_new * (total_below + total * (top - both));
    planes[kExponentials * plane] = scale_known * planes[kExponentials * plane] + scale_new * total;
  }
  planes[kPositiveSum * plane] += sum_positive;
  planes[kPositiveCount * plane] += positives;
  planes[kNegativeSum * plane] += sum_negative;
  planes[kNegativeCount * plane] += negatives;
  planes[kBestPositive * plane] = std::max(planes[kBestPositive * plane], best_positive);
  planes[kBestNegative * plane] = std::max(planes[kBestNegative * plane], best_negative);
}

// Rows [begin, end) of the panel, counted over its problems.
template <class T>
void row_statistics(const Panel<T>& b, T* anchors, int64_t begin, int64_t end) {
  using V = typename Simd<T>::V;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t p = b.first_problem + r / b.row_count, i = b.first_row + r % b.row_count;
    const Row<T> row(b, p, i);
    if (!row.exists) continue;
    const T* products = b.products + r * b.column_count;
    PairSums<T> sums;
    each_chunk<T>(b.column_count, [&, row](int64_t c, auto n) {
      sums.add(row.logits(products + c, b.first_column + c, n), row.classes(b.first_column + c, n));
    });
    const T top = std::max(max_lanes<T>(sums.best_positive), max_lanes<T>(sums.best_negative));
    V total = {}, total_below = {};
    each_chunk<T>(b.column_count, [&, row](int64_t c, auto n) {
      const auto is = row.classes(b.first_column + c, n);
      const V below = row.logits(products + c, b.first_column + c, n) - top;
      const V e = (is.positive | is.negative) ? exp_nonpositive(below) : V{};
      total += e;
      total_below += (is.positive | is.negative) ? e * below : V{};
    });
    merge_anchor<T>(anchors + p * b.N + i, b.P * b.N, top, sum_lanes<T>(total), sum_lanes<T>(total_below),
                    sum_lanes<T>(sums.sum_positive), T(sum_lanes<int64_t>(sums.positives)),
                    sum_lanes<T>(sums.sum_negative), T(sum_lanes<int64_t>(sums.negatives)),
                    max_lanes<T>(sums.best_positive), max_lanes<T>(sums.best_negative));
  }
}

// The n <= kLanes keys from j on of problem p as anchors, over all rows of the panel.
template <class T>
void columns_as_anchors(const Panel<T>& b, T* anchors, int64_t p, int64_t j, int64_t n) {
  using V = typename Simd<T>::V;
  const T* products = b.products + (p - b.first_problem) * b.row_count * b.column_count + (j - b.first_column);
  PairSums<T> sums;
  for (int64_t r = 0; r < b.row_count; ++r) {
    const Row<T> row(b, p, b.first_row + r);
    if (row.exists) sums.add(row.logits(products + r * b.column_count, j, n), row.classes(j, n));
  }
  const V top = max(sums.best_positive, sums.best_negative);
  V total = {}, total_below = {};
  for (int64_t r = 0; r < b.row_count; ++r) {
    const Row<T> row(b, p, b.first_row + r);
    if (!row.exists) continue;
    const auto is = row.classes(j, n);
    const V below = row.logits(products + r * b.column_count, j, n) - top;
    const V e = (is.positive | is.negative) ? exp_nonpositive(below) : V{};
    total += e;
    total_below += (is.positive | is.negative) ? e * below : V{};
  }
  for (int64_t l = 0; l < n; ++l) {
    merge_anchor<T>(anchors + p * b.N + j + l, b.P * b.N, top[l], total[l], total_below[l], sums.sum_positive[l],
                    T(sums.positives[l]), sums.sum_negative[l], T(sums.negatives[l]), sums.best_positive[l],
                    sums.best_negative[l]);
  }
}

// Strips [begin, end) of kStrip columns each, counted over the panel's problems; keys from `first` to `last`.
constexpr int64_t kStrip = 16;

template <class T>
void column_statistics(const Panel<T>& b, T* anchors, int64_t first, int64_t last, int64_t begin, int64_t end) {
  const int64_t strips = (last - first + kStrip - 1) / kStrip;
  for (int64_t strip = begin; strip < end; ++strip) {
    const int64_t p = b.first_problem + strip / strips, start = first + strip % strips * kStrip;
    each_chunk<T>(std::min(kStrip, last - start),
                  [&](int64_t j, auto n) { columns_as_anchors(b, anchors, p, start + j, n); });
  }
}

// Rows [begin, end) of the panel, counted over its problems.
template <class T>
void panel_gradient(const Panel<T>& b, const T* row_slopes, const T* column_slopes, int64_t begin, int64_t end) {
  using V = typename Simd<T>::V;
  using Lane = typename Simd<T>::Lane;
  const int64_t plane = b.P * b.N;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t p = b.first_problem + r / b.row_count, i = b.first_row + r % b.row_count;
    const Row<T> row(b, p, i);
    T* products = b.products + r * b.column_count;
    if (!row.exists) {
      std::fill(products, products + b.column_count, T(0));
      continue;
    }
    const T* mine = row_slopes + p * b.N + i;
    const T normalizer = mine[kNormalizer * plane], target = mine[kTarget * plane], slope = mine[kSlope * plane];
    const T* theirs = column_slopes + p * b.N;
    each_chunk<T>(b.column_count, [&, row](int64_t c, auto n) {
      const int64_t j = b.first_column + c, anchors = std::min<int64_t>(n, b.N - j);
      const auto is = row.classes(j, n);
      const V logit = row.logits(products + c, j, n);
      const V their_slope = load_first<V>(theirs + kSlope * plane + j, anchors);
      const V their_normalizer = lane_indices<T>(j) < Lane(b.N)
                                     ? load_first<V>(theirs + kNormalizer * plane + j, anchors)
                                     : V{} - kAbsent<T>;
      V gradient = exp_nonpositive(logit - normalizer) * slope + exp_nonpositive(logit - their_normalizer) * their_slope;
      gradient -= is.positive ? target * slope + load_first<V>(theirs + kTarget * plane + j, anchors) * their_slope : V{};
      gradient = (is.positive | is.negative) ? gradient : V{};
      store_first(products + c, gradient * row.scale * row.key_scale(j, n), n);
    });
  }
}

template <class T>
void contrastive_rows(const RowBlock<T>& b, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    evaluate_row(b, b.first_problem + r / b.row_count, b.first_row + r % b.row_count, b.products + r * b.M);
  }
}

template <class T>
void project_rows(T* gradient, const T* x, const T* inverse_norm, int64_t D, int64_t begin, int64_t end) {
  using V = typename Simd<T>::V;
  constexpr int kLanes = Simd<T>::kLanes;
  for (int64_t r = begin; r < end; ++r) {
    T* g = gradient + r * D;
    const T* row = x + r * D;
    V dots[4] = {};  // four chains hide the latency of the additions
    int64_t d = 0;
    for (; d + 4 * kLanes <= D; d += 4 * kLanes) {
      for (int c = 0; c < 4; ++c) dots[c] += load<V>(g + d + c * kLanes) * load<V>(row + d + c * kLanes);
    }
    for (; d < D; d += kLanes) dots[0] += load_first<V>(g + d, D - d) * load_first<V>(row + d, D - d);
    const T dot = sum_lanes<T>((dots[0] + dots[1]) + (dots[2] + dots[3]));
    const T along = dot * inverse_norm[r] * inverse_norm[r];
    for (d = 0; d < D; d += kLanes) {
      store_first(g + d, load_first<V>(g + d, D - d) - load_first<V>(row + d, D - d) * along, D - d);
    }
  }
}
