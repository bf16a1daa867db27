// What the kernels know of a row of logits.
#pragma once

#include <cmath>

#include "warp.h"

namespace seer::cuda {
namespace {

#include "../pair_rule.h"

// A logit that takes no part: finite, so that 0 * kAbsent is 0, and far below any real one.
template <class T>
constexpr T kAbsent = T(-1e30);

// What a set of columns tells of its row.
template <class T>
struct Summary {
  T max_positive, max_negative;  // logits
  T sum_positive, sum_negative;  // logits
  T total, total_logit;          // sums of e = exp(logit - top()) and of e * (logit - top())
  int positives, negatives;

  SEER_DEVICE static Summary empty() { return {kAbsent<T>, kAbsent<T>, 0, 0, 0, 0, 0, 0}; }

  SEER_DEVICE T top() const { return std::fmax(max_positive, max_negative); }

  // Adds all but the exponential of a logit.
  SEER_DEVICE void add(T logit, PairClass<int> pair) {
    max_positive = std::fmax(max_positive, pair.positive ? logit : kAbsent<T>);
    max_negative = std::fmax(max_negative, pair.negative ? logit : kAbsent<T>);
    sum_positive += pair.positive ? logit : T(0);
    sum_negative += pair.negative ? logit : T(0);
    positives -= pair.positive;  // a mask is -1 where it holds
    negatives -= pair.negative;
  }

  // Restates the totals, so far relative to `reference`, relative to top().
  SEER_DEVICE void restate(T reference) {
    const T shift = reference - top(), factor = std::exp(shift);
    total_logit = factor * (total_logit + total * shift);
    total *= factor;
  }

  SEER_DEVICE Summary merged_over_warp() const {
    Summary merged = *this;
    merged.max_positive = warp_max(max_positive);
    merged.max_negative = warp_max(max_negative);
    merged.restate(top());
    merged.total = warp_sum(merged.total);
    merged.total_logit = warp_sum(merged.total_logit);
    merged.sum_positive = warp_sum(sum_positive);
    merged.sum_negative = warp_sum(sum_negative);
    merged.positives = warp_sum(positives);
    merged.negatives = warp_sum(negatives);
    return merged;
  }

  // The planes of the row but for kLogitSum; zeros without a positive.
  SEER_DEVICE void results(T temperature, T row_gradient, T (&planes)[kLogitSum]) const {
    const T mean_positive = sum_positive / T(positives);
#pragma unroll
    for (int which = 0; which < kLogitSum; ++which) planes[which] = 0;
    if (positives == 0) return;
    planes[kLoss] = std::log(total) - (mean_positive - top());
    planes[kValid] = T(1);
    planes[kPositiveSimilarity] = mean_positive * temperature;
    if (negatives > 0) {
      planes[kNegativeSimilarity] = sum_negative / T(negatives) * temperature;
      planes[kHasNegative] = T(1);
    }
    planes[kTop1] = T(max_positive > max_negative);
    planes[kLogitDot] = row_gradient * (total_logit / total - (mean_positive - top()));
  }
};

}  // namespace
}  // namespace seer::cuda
