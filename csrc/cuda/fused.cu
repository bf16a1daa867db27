#include "../contrastive.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "device.h"
#include "summary.h"

namespace seer::cuda {
namespace {

// Losses of few rows are bound by latency, so there is one launch each way.
//
// Forward: the products are divided into tiles of kTile x kTile pairs, and the features of a tile into slices, a block
// each, so that even one problem occupies the GPU. A block leaves its share of the products in memory; the last one to
// arrive at a tile adds the shares in their fixed order, and the last one to arrive at a problem, then the last of all
// its tiles, makes losses and slopes of the products. Who is last they learn from tickets, which are zeroed on the
// stream before every launch: kept between launches they would have to be each stream's and each graph's own. Nobody
// waits for anybody, so it does not matter which blocks run at the same time.
//
// Backward: every strip of features is independent of the others.
constexpr int kTile = 32;
constexpr int kSide = 4;                               // a warp multiplies kSide queries by kSide keys at a time
constexpr int kShare = kTile * kTile + 2 * kTile;      // products, |query|^2, |key|^2
constexpr int kSliceFeatures = 128;                    // at least: a warp's packs
constexpr int kBlocksWanted = 132;                     // one per multiprocessor of an H100
constexpr int kRowsPerWarp = 8, kGradientWarps = 4;    // of the backward kernel
constexpr int64_t kLimit32 = int64_t(1) << 30;

template <class F>
using Wide = std::conditional_t<std::is_same_v<F, double>, double, float>;

// Elements that a thread reads at once: 16 bytes, or 8 in half precision.
template <class F>
constexpr int kPack = sizeof(F) == 8 ? 2 : 4;

template <class F>
SEER_DEVICE inline F* row_of(const RowSet& set, int64_t p, int r, int64_t D) {
  const int64_t split = set.split;
  if (r < split) return static_cast<F*>(set.first) + (p * split + r) * D;
  return static_cast<F*>(set.second) + (p * (set.rows - split) + (r - split)) * D;
}

// The kPack<F> features of a row from d on; zeros beyond the last.
template <class F>
SEER_DEVICE inline void load_features(const F* row, int d, int D, bool packs, Wide<F> (&wide)[kPack<F>]) {
  F features[kPack<F>];
  if (packs) {
    load_constant(row, d / kPack<F>, features);
#pragma unroll
    for (int v = 0; v < kPack<F>; ++v) wide[v] = widen(features[v]);
  } else {
#pragma unroll
    for (int v = 0; v < kPack<F>; ++v) wide[v] = d + v < D ? widen(row[d + v]) : Wide<F>(0);
  }
}

// The pair (i, j), i <= j, at `index` of a triangle's list.
SEER_DEVICE inline void of_triangle(int index, int& i, int& j) {
  j = 0;
  while ((j + 1) * (j + 2) / 2 <= index) ++j;
  i = index - j * (j + 1) / 2;
}

// For all threads of the block: whether it is the last of `count` blocks to come here. To the last one all is visible
// that any of them has published before.
SEER_DEVICE inline bool last_to_arrive(int* ticket, int count) {
  SEER_SHARED(bool, last, 1);
  fence();
  barrier();
  if (team_thread() == 0) {
    last[0] = count == 1 || draw_ticket(ticket) == count - 1;
    fence();
  }
  barrier();
  return last[0];
}

// How the blocks of a launch divide the work.
struct Division {
  int key_tiles, tiles;  // tiles of a problem
  int slices, features;  // slices of a tile, features of a slice
  int64_t tickets;       // in the scratch memory, a value each: first of tiles, then of problems
  int64_t squares;       // where the squared norms begin, after the tickets and the tiles' shares

  Division(int64_t P, int64_t N, int64_t M, int64_t D, bool self_contrast) {
    const int query_tiles = int((N + kTile - 1) / kTile);
    key_tiles = int((M + kTile - 1) / kTile);
    tiles = self_contrast ? query_tiles * (query_tiles + 1) / 2 : query_tiles * key_tiles;
    const int64_t most = std::max<int64_t>(1, (D + kSliceFeatures - 1) / kSliceFeatures);
    const int64_t wanted = std::clamp<int64_t>(kBlocksWanted / (P * tiles), 1, most);
    features = int((most + wanted - 1) / wanted) * kSliceFeatures;
    slices = int(std::max<int64_t>(1, (D + features - 1) / features));
    tickets = P * tiles + P;
    squares = tickets + P * tiles * slices * kShare;
  }
};

// A tile of products of one problem, over one slice of the features.
template <class F>
struct ProductTile {
  using T = Wide<F>;
  const FusedLoss<T>& b;
  int64_t p;
  int first_query, first_key, queries, keys;
  bool diagonal;  // of a set against itself: only kSide x kSide squares on and above its diagonal are computed

  SEER_DEVICE ProductTile(const FusedLoss<T>& b, const Division& division, int64_t p, int tile) : b(b), p(p) {
    int i = tile / division.key_tiles, j = tile % division.key_tiles;
    if (b.self_contrast) of_triangle(tile, i, j);
    diagonal = b.self_contrast && i == j;
    first_query = i * kTile;
    first_key = j * kTile;
    queries = int(b.N) - first_query < kTile ? int(b.N) - first_query : kTile;
    keys = int(b.M) - first_key < kTile ? int(b.M) - first_key : kTile;
  }

  // Publishes this slice's share, kShare values.
  SEER_DEVICE void multiply(int begin, int end, bool packs, T* share) const {
    const int query_squares = (queries + kSide - 1) / kSide, key_squares = (keys + kSide - 1) / kSide;
    const int products = diagonal ? query_squares * (query_squares + 1) / 2 : query_squares * key_squares;
    const bool norms = b.normalize && !b.self_contrast;  // else they are on the diagonal of the products
    const int query_norms = norms && first_key == 0 ? query_squares : 0;
    const int key_norms = norms && first_query == 0 ? key_squares : 0;
    for (int task = warp(); task < products + query_norms + key_norms; task += warps()) {
      if (task < products) {
        int i = task / key_squares, j = task % key_squares;
        if (diagonal) of_triangle(task, i, j);
        dot_products(i * kSide, j * kSide, begin, end, packs, share);
      } else if (task < products + query_norms) {
        const int first = (task - products) * kSide;
        squares(b.query, first_query + first, int(b.N), begin, end, packs, share + kTile * kTile + first);
      } else {
        const int first = (task - products - query_norms) * kSide;
        squares(b.key, first_key + first, int(b.M), begin, end, packs, share + kTile * kTile + kTile + first);
      }
    }
  }

  // Adds the shares of all slices: products to `products` [N, M], squared norms to `squares` [N + M].
  SEER_DEVICE void add_shares(const T* shares, int slices, T* products, T* squares) const {
    const int N = int(b.N), M = int(b.M);
    const auto total = [&](int index) {
      T sum = 0;
#pragma unroll 4
      for (int s = 0; s < slices; ++s) sum += read_published(shares + int64_t(s) * kShare + index);
      return sum;
    };
    for (int e = team_thread(); e < queries * keys; e += team_threads()) {
      const int r = e / keys, c = e % keys, i = first_query + r, j = first_key + c;
      const bool mirrored = diagonal && r / kSide > c / kSide;
      const T sum = total(mirrored ? c * kTile + r : r * kTile + c);
      publish(products + int64_t(i) * M + j, sum);
      if (b.self_contrast && !diagonal) publish(products + int64_t(j) * M + i, sum);
    }
    if (!b.normalize || b.self_contrast) return;
    for (int e = team_thread(); e < 2 * kTile; e += team_threads()) {
      const bool of_key = e >= kTile;
      const int r = of_key ? e - kTile : e;
      if (of_key ? first_query != 0 || r >= keys : first_key != 0 || r >= queries) continue;
      publish(squares + (of_key ? N + first_key : first_query) + r, total(kTile * kTile + e));
    }
  }

 private:
  // Rows beyond the last are read as the last; nobody reads what becomes of them.
  SEER_DEVICE const F* existing_row(const RowSet& set, int r, int rows) const {
    return row_of<const F>(set, p, r < rows ? r : rows - 1, b.D);
  }

  SEER_DEVICE void dot_products(int r, int c, int begin, int end, bool packs, T* share) const {
    const F *query[kSide], *key[kSide];
#pragma unroll
    for (int k = 0; k < kSide; ++k) {
      query[k] = existing_row(b.query, first_query + r + k, int(b.N));
      key[k] = existing_row(b.key, first_key + c + k, int(b.M));
    }
    T sums[kSide * kSide] = {};
#pragma unroll 1
    for (int d = begin + lane() * kPack<F>; d < end; d += kWarp * kPack<F>) {
      T q[kSide][kPack<F>], u[kSide][kPack<F>];
#pragma unroll
      for (int k = 0; k < kSide; ++k) {
        load_features(query[k], d, end, packs, q[k]);
        load_features(key[k], d, end, packs, u[k]);
      }
#pragma unroll
      for (int k = 0; k < kSide * kSide; ++k) {
#pragma unroll
        for (int v = 0; v < kPack<F>; ++v) sums[k] += q[k / kSide][v] * u[k % kSide][v];
      }
    }
    const T sum = scattered_sum<kSide * kSide>(sums);
    constexpr int kLanes = kWarp / (kSide * kSide);
    const int k = lane() / kLanes;
    if (lane() % kLanes == 0) publish(share + (r + k / kSide) * kTile + c + k % kSide, sum);
  }

  SEER_DEVICE void squares(const RowSet& set, int first, int rows, int begin, int end, bool packs, T* share) const {
    const F* row[kSide];
#pragma unroll
    for (int k = 0; k < kSide; ++k) row[k] = existing_row(set, first + k, rows);
    T sums[kSide] = {};
    for (int d = begin + lane() * kPack<F>; d < end; d += kWarp * kPack<F>) {
#pragma unroll
      for (int k = 0; k < kSide; ++k) {
        T x[kPack<F>];
        load_features(row[k], d, end, packs, x);
#pragma unroll
        for (int v = 0; v < kPack<F>; ++v) sums[k] += x[v] * x[v];
      }
    }
    const T sum = scattered_sum<kSide>(sums);
    constexpr int kLanes = kWarp / kSide;
    if (lane() % kLanes == 0) publish(share + lane() / kLanes, sum);
  }
};

// Of the sigmoid loss: a row's sums over its pairs.
template <class T>
struct SigmoidSums {
  T loss, slopes, slopes_logit;

  SEER_DEVICE SigmoidSums merged_over_warp() const { return {warp_sum(loss), warp_sum(slopes), warp_sum(slopes_logit)}; }
};

// All pairs of one problem, by the one block that finishes it. Shared memory holds what its threads tell each other.
template <class T>
struct Pairs {
  const FusedLoss<T>& b;
  int64_t p;
  int N, M;
  bool both_sides;  // keys are anchors, too
  T temperature, bias;
  T *query_scale, *key_scale;  // 1 / norm
  T *row_anchors, *column_anchors;  // [3, N] planes of SlopePlane, of queries and of keys as anchors
  T *logit_dot, *logit_sum;    // [N]
  T* column_along;             // [warps, M]

  static int64_t shared_values(int64_t N, int64_t M, int warps) { return 9 * N + M + warps * M; }

  SEER_DEVICE Pairs(const FusedLoss<T>& b, int64_t p, T* shared)
      : b(b),
        p(p),
        N(int(b.N)),
        M(int(b.M)),
        both_sides(b.self_contrast || b.form == Form::kSymmetric),
        temperature(b.temperature ? *b.temperature : b.temperature_value),
        bias(b.bias ? *b.bias : b.bias_value),
        query_scale(shared),
        key_scale(b.self_contrast ? query_scale : shared + N),
        row_anchors(shared + N + M),
        column_anchors(b.self_contrast ? row_anchors : row_anchors + 3 * N),
        logit_dot(row_anchors + 6 * N),
        logit_sum(logit_dot + N),
        column_along(logit_sum + N) {}

  SEER_DEVICE T* product(int i, int j) const { return b.slopes + (p * N + i) * M + j; }

  // d logit / d product
  SEER_DEVICE T scale(int i, int j) const { return query_scale[i] / temperature * key_scale[j]; }

  SEER_DEVICE PairClass<int> classify_pair(int i, int j) const {
    const T* weights = b.weights ? b.weights + p * N : nullptr;
    bool exists = !weights || weights[i] > T(0);
    if (weights && b.shared_weights && j < N) exists = exists && weights[j] > T(0);
    if (b.self_contrast && i == j) exists = false;
    const int shifted = i + int(b.own_shift);
    const bool own = b.own_shift >= 0 && j == (shifted < M ? shifted : shifted - M);
    const bool same = b.query_labels && b.query_labels[p * N + i] == b.key_labels[p * M + j];
    return classify<int>(-int(own), -int(same), -int(exists), b.same_label);
  }

  SEER_DEVICE void invert_norms(const T* squares) const {
    for (int r = team_thread(); r < (b.self_contrast ? N : N + M); r += team_threads()) {
      T scale = 1;
      if (b.normalize) {
        const T square = read_published(b.self_contrast ? product(r, r) : squares + r);
        scale = square == T(0) ? T(0) : T(1) / std::sqrt(square);
      }
      query_scale[r] = scale;  // those of the keys follow
    }
  }

  // Calls use(logit, pair) for all pairs of anchor `a`, a query or a key.
  template <class Use>
  SEER_DEVICE void each_pair(int a, bool is_key, const Use& use) const {
#pragma unroll 1
    for (int other = lane(); other < (is_key ? N : M); other += kWarp) {
      const int i = is_key ? other : a, j = is_key ? a : other;
      use(read_published(product(i, j)) * scale(i, j), classify_pair(i, j));
    }
  }

  // Of the sigmoid loss: the slope of a pair that takes part, with the logit's share of the sums.
  SEER_DEVICE T sigmoid_slope(T logit, bool positive, SigmoidSums<T>& sums) const {
    const T margin = positive ? logit + bias : -(logit + bias);
    const T e = std::exp(-std::fabs(margin));
    const T miss = (margin < T(0) ? T(1) : e) / (e + T(1));  // sigmoid(-margin)
    const T slope = positive ? -miss : miss;
    sums.loss += std::log1p(e) + (margin < T(0) ? -margin : T(0));
    sums.slopes += slope;
    sums.slopes_logit += slope * logit;
    return slope;
  }

  // Writes the results of all anchors, and keeps what the slopes need of them.
  SEER_DEVICE void settle_anchors() const {
    const int sides = b.form == Form::kSymmetric ? 2 : 1;
#pragma unroll 1
    for (int i = warp(); i < N; i += warps()) {
      const T row_gradient = (b.row_gradient ? b.row_gradient[p * N + i] : T(1)) / T(sides);
      T* results = b.rows + p * N + i;
      const int64_t plane = b.P * N;
      SigmoidSums<T> sigmoid = {0, 0, 0};
#pragma unroll 1
      for (int side = 0; side < sides; ++side) {
        Summary<T> seen = Summary<T>::empty();
        each_pair(i, side == 1, [&](T logit, PairClass<int> pair) { seen.add(logit, pair); });
        const T top = seen.top();
        each_pair(i, side == 1, [&](T logit, PairClass<int> pair) {
          if (!(pair.positive | pair.negative)) return;
          if (b.form == Form::kSigmoid) {
            sigmoid_slope(logit, pair.positive, sigmoid);
          } else {
            const T below = logit - top, e = std::exp(below);
            seen.total += e;
            seen.total_logit += e * below;
          }
        });
        seen = seen.merged_over_warp();
        if (lane() != 0) continue;
        keep_anchor(side == 1 ? column_anchors : row_anchors, i, seen, row_gradient);
        T of_side[kLogitSum];
        seen.results(temperature, row_gradient, of_side);
#pragma unroll
        for (int which = 0; which < kLogitDot; ++which) {
          results[which * plane] = (side == 1 ? results[which * plane] : T(0)) + of_side[which] / T(sides);
        }
        logit_dot[i] = (side == 1 ? logit_dot[i] : T(0)) + of_side[kLogitDot];
      }
      sigmoid = sigmoid.merged_over_warp();
      if (lane() != 0) continue;
      logit_sum[i] = row_gradient * sigmoid.slopes;
      if (b.form == Form::kSigmoid) {
        results[kLoss * plane] = sigmoid.loss;
        logit_dot[i] = row_gradient * sigmoid.slopes_logit;
      }
    }
  }

  SEER_DEVICE void add_anchors() const {
    if (warp() != 0) return;
    T dot = 0, sum = 0, loss = 0, total_weight = 0;
    for (int i = lane(); i < N; i += kWarp) {
      const T weight = (b.weights ? b.weights[p * N + i] : T(1)) * b.rows[(kValid * b.P + p) * N + i];
      dot += logit_dot[i];
      sum += logit_sum[i];
      loss += weight * b.rows[(kLoss * b.P + p) * N + i];
      total_weight += weight;
    }
    dot = warp_sum(dot);
    sum = warp_sum(sum);
    loss = warp_sum(loss);
    total_weight = warp_sum(total_weight);
    if (lane() == 0) {
      if (!(total_weight > T(0))) total_weight = 1;
      b.total_loss[p] = loss;
      b.total_weight[p] = total_weight;
      b.mean_loss[p] = loss / total_weight;
      b.temperature_gradient[p] = -dot / temperature;
      b.bias_gradient[p] = sum;
    }
  }

  // Products to slopes, in place, and how much of the features themselves is to be taken off.
  SEER_DEVICE void write_slopes() const {
    const int along_rows = b.self_contrast ? N : N + M;
    T* column_sums = column_along + warp() * M;  // a lane adds to its own columns only
    for (int j = lane(); j < M; j += kWarp) column_sums[j] = 0;
#pragma unroll 1
    for (int i = warp(); i < N; i += warps()) {
      const T row_gradient = b.row_gradient ? b.row_gradient[p * N + i] : T(1);
      T row_sum = 0;
#pragma unroll 1
      for (int j = lane(); j < M; j += kWarp) {
        const PairClass<int> pair = classify_pair(i, j);
        const T product_ij = read_published(product(i, j)), to_logit = scale(i, j), logit = product_ij * to_logit;
        T slope = 0;
        if (b.form == Form::kSigmoid) {
          SigmoidSums<T> unused = {0, 0, 0};
          slope = row_gradient * sigmoid_slope(logit, pair.positive, unused);
        } else {
          slope = anchor_slope(row_anchors, i, logit, pair.positive);
          if (both_sides && j < N) slope += anchor_slope(column_anchors, j, logit, pair.positive);
        }
        slope = pair.positive | pair.negative ? slope * to_logit : T(0);
        *product(i, j) = slope;
        row_sum += slope * product_ij;
        column_sums[j] += slope * product_ij;
      }
      row_sum = warp_sum(row_sum);
      if (b.along && lane() == 0) b.along[p * along_rows + i] = row_sum * query_scale[i] * query_scale[i];
    }
    if (!b.along || b.self_contrast) return;
    barrier();
    for (int j = team_thread(); j < M; j += team_threads()) {
      T sum = 0;
      for (int w = 0; w < warps(); ++w) sum += column_along[w * M + j];
      b.along[p * along_rows + N + j] = sum * key_scale[j] * key_scale[j];
    }
  }

 private:
  SEER_DEVICE void keep_anchor(T* anchors, int a, const Summary<T>& seen, T row_gradient) const {
    const bool valid = seen.positives > 0;
    anchors[kNormalizer * N + a] = valid ? seen.top() + std::log(seen.total) : -kAbsent<T>;
    anchors[kTarget * N + a] = valid ? T(1) / T(seen.positives) : T(0);
    anchors[kSlope * N + a] = valid ? row_gradient : T(0);
  }

  SEER_DEVICE T anchor_slope(const T* anchors, int a, T logit, bool positive) const {
    const T probability = std::exp(logit - anchors[kNormalizer * N + a]);
    return (probability - (positive ? anchors[kTarget * N + a] : T(0))) * anchors[kSlope * N + a];
  }
};

template <class F>
SEER_KERNEL(1) fused_loss_kernel(const FusedLoss<Wide<F>> b, const Division division, bool packs) {
  using T = Wide<F>;
  const int slice = block_index() % division.slices, place = block_index() / division.slices;
  const int64_t p = place / division.tiles;
  const ProductTile<F> tile(b, division, p, place % division.tiles);
  int* ticket_of_tile = reinterpret_cast<int*>(b.scratch + place);
  int* ticket_of_problem = reinterpret_cast<int*>(b.scratch + b.P * division.tiles + p);
  T* shares = b.scratch + division.tickets + int64_t(place) * division.slices * kShare;
  T* squares = b.scratch + division.squares + p * (b.N + b.M);

  const int begin = slice * division.features;
  tile.multiply(begin, begin + division.features < b.D ? begin + division.features : int(b.D), packs,
                shares + slice * kShare);
  if (!last_to_arrive(ticket_of_tile, division.slices)) return;
  tile.add_shares(shares, division.slices, b.slopes + p * b.N * b.M, squares);
  if (!last_to_arrive(ticket_of_problem, division.tiles)) return;

  const Pairs<T> pairs(b, p, dynamic_shared<T>());
  pairs.invert_norms(squares);
  barrier();
  pairs.settle_anchors();
  barrier();
  pairs.add_anchors();
  if (b.write_slopes) pairs.write_slopes();
}

// gradient[r] = sum_o slope(r, o) others[o] - along[r] own[r], for kRowsPerWarp rows a warp and a pack of features a lane.
template <class F>
SEER_KERNEL(1) fused_gradients_kernel(const FusedGradients<Wide<F>> b, int strips, int row_groups, bool packs) {
  using T = Wide<F>;
  const int strip = block_index() % strips, N = int(b.query.rows), M = int(b.key.rows), D = int(b.D);
  const int64_t p = block_index() / strips / row_groups;
  const int query_groups = (N + kRowsPerWarp - 1) / kRowsPerWarp;
  int group = block_index() / strips % row_groups * kGradientWarps + warp();
  const bool of_key = group >= query_groups;
  if (of_key) group -= query_groups;
  const RowSet &own = of_key ? b.key : b.query, &others = of_key ? b.query : b.key;
  const RowSet& gradient = of_key ? b.key_gradient : b.query_gradient;
  const int first = group * kRowsPerWarp, rows = of_key ? (b.self_contrast ? 0 : M) : N, count = of_key ? N : M;
  const int mine = rows - first < kRowsPerWarp ? rows - first : kRowsPerWarp;  // not positive beyond the last group
  const T factor = b.scale ? b.scale[p] : T(1);

  // [count, kRowsPerWarp] slopes, those of the rows that are not there as zeros
  T* slopes = dynamic_shared<T>() + warp() * kRowsPerWarp * (N > M ? N : M);
  if (mine > 0) {
    for (int e = lane(); e < count * kRowsPerWarp; e += kWarp) {
      // neighbours in memory are keys
      const int r = of_key ? e % kRowsPerWarp : e / count, o = of_key ? e / kRowsPerWarp : e % count;
      const int64_t i = of_key ? o : first + r, j = of_key ? first + r : o;
      slopes[o * kRowsPerWarp + r] = r < mine ? b.slopes[(p * N + i) * M + j] * factor : T(0);
    }
  }
  barrier();
  const int d = (strip * kWarp + lane()) * kPack<F>;
  if (mine <= 0 || d >= D) return;

  T sums[kRowsPerWarp][kPack<F>] = {};
  for (int o = 0; o < count; ++o) {
    T x[kPack<F>], slope[kRowsPerWarp];
    load_features(row_of<const F>(others, p, o, D), d, D, packs, x);
#pragma unroll
    for (int r = 0; r < kRowsPerWarp; ++r) slope[r] = slopes[o * kRowsPerWarp + r];
#pragma unroll
    for (int r = 0; r < kRowsPerWarp; ++r) {
#pragma unroll
      for (int v = 0; v < kPack<F>; ++v) sums[r][v] += slope[r] * x[v];
    }
  }
#pragma unroll
  for (int r = 0; r < kRowsPerWarp; ++r) {
    if (r >= mine) continue;
    if (!(first + r < gradient.split ? gradient.first : gradient.second)) continue;
    if (b.along) {
      T x[kPack<F>];
      load_features(row_of<const F>(own, p, first + r, D), d, D, packs, x);
      const T along = b.along[p * (b.self_contrast ? N : N + M) + (of_key ? N : 0) + first + r] * factor;
#pragma unroll
      for (int v = 0; v < kPack<F>; ++v) sums[r][v] -= along * x[v];
    }
    F* to = row_of<F>(gradient, p, first + r, D);
    F narrow[kPack<F>];
#pragma unroll
    for (int v = 0; v < kPack<F>; ++v) narrow[v] = narrowed<F>(sums[r][v]);
    if (packs) {
      store(to, d / kPack<F>, narrow);
    } else {
#pragma unroll
      for (int v = 0; v < kPack<F>; ++v) {
        if (d + v < D) to[d + v] = narrow[v];
      }
    }
  }
}

void check_fused(const char* kernel, int64_t P, int64_t N, int64_t M, int64_t D) {
  if (std::min({P, N, M}) >= 1 && std::max(N, M) <= kFusedRows && D <= kLimit32 && P <= kLimit32 / (N * M)) return;
  throw std::invalid_argument(std::string(kernel) + ": 1 to " + std::to_string(kFusedRows) +
                              " queries and keys, at most 2^30 features and 2^30 pairs; got " + std::to_string(P) +
                              " problems of " + std::to_string(N) + " queries, " + std::to_string(M) + " keys and " +
                              std::to_string(D) + " features");
}

template <class F>
bool in_packs(int64_t D, std::initializer_list<RowSet> sets) {
  bool packs = D % kPack<F> == 0;
  for (const RowSet& set : sets) {
    for (const void* rows : {set.first, set.second}) {
      packs = packs && reinterpret_cast<std::uintptr_t>(rows) % (kPack<F> * sizeof(F)) == 0;
    }
  }
  return packs;
}

template <class F>
void launch_loss(const FusedLoss<Wide<F>>& b, Place place) {
  const Division division(b.P, b.N, b.M, b.D, b.self_contrast);
  const auto squares = [](int64_t rows) { return (std::min<int64_t>(rows, kTile) + kSide - 1) / kSide; };
  const int64_t tasks = squares(b.N) * squares(b.M) + squares(b.N) + squares(b.M);
  const int warps = int(std::min<int64_t>(tasks, kMaxThreads / kWarp));
  const int shared = int(Pairs<Wide<F>>::shared_values(b.N, b.M, warps) * sizeof(Wide<F>));
  if (division.slices > 1 || division.tiles > 1) {
    queue_zeros("fused_loss", place, b.scratch, division.tickets * int64_t(sizeof(Wide<F>)));
  }
  launch("fused_loss", fused_loss_kernel<F>, place, b.P * division.tiles * division.slices, 1, warps * kWarp, shared,
         b, division, in_packs<F>(b.D, {b.query, b.key}));
}

template <class F>
void launch_gradients(const FusedGradients<Wide<F>>& b, Place place) {
  const auto ceil = [](int64_t value, int64_t step) { return int((value + step - 1) / step); };
  const int64_t N = b.query.rows, M = b.key.rows;
  const int groups = ceil(N, kRowsPerWarp) + (b.self_contrast ? 0 : ceil(M, kRowsPerWarp));
  const int row_groups = ceil(groups, kGradientWarps), strips = ceil(b.D, kWarp * kPack<F>);
  const int shared = int(kGradientWarps * kRowsPerWarp * std::max(N, M) * sizeof(Wide<F>));
  launch("fused_gradients", fused_gradients_kernel<F>, place, b.P * row_groups * strips, 1, kGradientWarps * kWarp,
         shared, b, strips, row_groups, in_packs<F>(b.D, {b.query, b.key, b.query_gradient, b.key_gradient}));
}

}  // namespace

int64_t fused_scratch(int64_t P, int64_t N, int64_t M, int64_t D, bool self_contrast) {
  check_fused("fused_loss", P, N, M, D);
  return Division(P, N, M, D, self_contrast).squares + P * (N + M);
}

template <class T>
void fused_loss(const FusedLoss<T>& b, int device, std::uintptr_t stream) {
  check_fused("fused_loss", b.P, b.N, b.M, b.D);
  const Place place{device, stream};
  if constexpr (std::is_same_v<T, float>) {
    if (b.type == FeatureType::kBfloat16) return launch_loss<Bfloat16>(b, place);
    if (b.type == FeatureType::kHalf) return launch_loss<Half>(b, place);
  }
  launch_loss<T>(b, place);
}

template <class T>
void fused_gradients(const FusedGradients<T>& b, int device, std::uintptr_t stream) {
  check_fused("fused_gradients", b.P, b.query.rows, b.key.rows, b.D);
  if (b.D == 0) return;
  const Place place{device, stream};
  if constexpr (std::is_same_v<T, float>) {
    if (b.type == FeatureType::kBfloat16) return launch_gradients<Bfloat16>(b, place);
    if (b.type == FeatureType::kHalf) return launch_gradients<Half>(b, place);
  }
  launch_gradients<T>(b, place);
}

template void fused_loss(const FusedLoss<float>&, int, std::uintptr_t);
template void fused_loss(const FusedLoss<double>&, int, std::uintptr_t);
template void fused_gradients(const FusedGradients<float>&, int, std::uintptr_t);
template void fused_gradients(const FusedGradients<double>&, int, std::uintptr_t);

}  // namespace seer::cuda
