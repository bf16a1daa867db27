// The row epilogue and the projection, written once and compiled per instruction set (see contrastive.cpp).
// No include guard on purpose.

#include "../pair_rule.h"

// A logit that takes no part: finite, so that 0 * kAbsent is 0, and far below any real one.
template <class T>
constexpr T kAbsent = T(-1e30);

// One query. Copied into the loops by value, so that its members live in registers.
template <class T>
struct Row {
  using V = typename Simd<T>::V;
  using I = typename Simd<T>::I;
  using Lane = typename Simd<T>::Lane;

  Lane N, M, own;
  const T* weights;           // of this problem, as all pointers here
  const T* key_scales;        //
  const int32_t* key_labels;  //
  Lane label;
  SameLabel same_label;

  Row(const RowBlock<T>& b, int64_t p, int64_t i)
      : N(Lane(b.N)),
        M(Lane(b.M)),
        own(Lane(i)),
        weights(b.weights ? b.weights + p * b.N : nullptr),
        key_scales(b.key_scale ? b.key_scale + p * b.M : nullptr),
        key_labels(b.key_labels ? b.key_labels + p * b.M : nullptr),
        label(b.query_labels ? b.query_labels[p * b.N + i] : 0),
        same_label(b.same_label) {}

  bool exists() const { return !weights || weights[own] > 0; }

  // Classes of the n keys from j on.
  inline PairClass<I> classes(int64_t j, int64_t n) const {
    const I index = lane_indices<T>(j);
    I key_exists = index < M;
    if (weights) key_exists &= (index >= N) | (I)(load_first<V>(weights + j, std::min<int64_t>(n, N - j)) > T(0));
    I same = {};
    if (key_labels) same = load_integers<T>(key_labels + j, n) == label;
    return classify<I>(index == own, same, key_exists, same_label);
  }

  inline V key_scale(int64_t j, int64_t n) const {
    return key_scales ? load_first<V>(key_scales + j, n) : V{} + T(1);
  }
};

template <class T>
void evaluate_row(const RowBlock<T>& b, int64_t p, int64_t i, T* products) {
  using V = typename Simd<T>::V;
  using I = typename Simd<T>::I;
  const Row<T> row(b, p, i);
  T* planes = b.rows + p * b.N + i;
  const int64_t plane = b.P * b.N;
  for (int which = 0; which < kRowPlanes; ++which) planes[which * plane] = 0;
  const T temperature = *b.temperature;
  const T scale = (b.query_scale ? b.query_scale[p * b.N + i] : T(1)) / temperature;

  // Pass 1: products to logits; maxima, sums and counts of positives and negatives.
  const V absent = V{} + kAbsent<T>;
  V max_positive = absent, max_negative = absent, sum_positive = {}, sum_negative = {};
  I positives = {}, negatives = {};
  if (row.exists()) {
    each_chunk<T>(b.M, [&, row](int64_t j, auto n) {
      const auto [positive, negative] = row.classes(j, n);
      const V logit = load_first<V>(products + j, n) * scale * row.key_scale(j, n);
      max_positive = max(max_positive, positive ? logit : absent);
      max_negative = max(max_negative, negative ? logit : absent);
      sum_positive += positive ? logit : V{};
      sum_negative += negative ? logit : V{};
      positives -= positive;  // a mask is -1 where it holds
      negatives -= negative;
      store_first(products + j, (positive | negative) ? logit : absent, n);
    });
  }
  const T positive_count = T(sum_lanes<int64_t>(positives)), negative_count = T(sum_lanes<int64_t>(negatives));
  if (positive_count == 0) {
    if (b.write_gradient) std::fill(products, products + b.M, T(0));
    return;
  }
  const T best_positive = max_lanes<T>(max_positive), best_negative = max_lanes<T>(max_negative);
  const T top = best_positive < best_negative ? best_negative : best_positive;
  const T mean_positive = sum_lanes<T>(sum_positive) / positive_count;

  // Pass 2: the softmax's sum, and its mean logit relative to the top one.
  V total = {}, total_logit = {};
  each_chunk<T>(b.M, [&](int64_t j, auto n) {
    V below = load_first<V>(products + j, n) - top;
    if (n < Simd<T>::kLanes) below = lane_indices<T>(0) < typename Simd<T>::Lane(n) ? below : absent;
    const V e = exp_nonpositive(below);
    total += e;
    total_logit += e * below;
    store_first(products + j, e, n);
  });
  const T sum = sum_lanes<T>(total);
  const T row_gradient = b.row_gradient[p * b.N + i];
  planes[kLoss * plane] = std::log(sum) - (mean_positive - top);
  planes[kValid * plane] = 1;
  planes[kPositiveSimilarity * plane] = mean_positive * temperature;
  if (negative_count > 0) {
    planes[kNegativeSimilarity * plane] = sum_lanes<T>(sum_negative) / negative_count * temperature;
    planes[kHasNegative * plane] = 1;
  }
  planes[kTop1 * plane] = best_positive > best_negative;
  planes[kLogitDot * plane] = row_gradient * (sum_lanes<T>(total_logit) / sum - (mean_positive - top));
  if (!b.write_gradient) return;

  // Pass 3: exponentials to the gradient with respect to the products.
  const T inverse_sum = T(1) / sum, target = T(1) / positive_count, slope = row_gradient * scale;
  each_chunk<T>(b.M, [&, row](int64_t j, auto n) {
    const V goal = row.classes(j, n).positive ? V{} + target : V{};
    const V weight = (load_first<V>(products + j, n) * inverse_sum - goal) * slope * row.key_scale(j, n);
    store_first(products + j, weight, n);
  });
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
