#include "../contrastive.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "parallel.h"
#include "team.h"

namespace seer::cpu {
namespace {

// What a FusedLoss keeps beside its results; without normalisation the norms are there and unused.
template <class T>
struct FusedScratch {
  T *query_norms, *key_norms;           // [P, N], [P, M]; the same for self_contrast
  T* products;                          // [P, N, M]
  T *row_anchors, *column_anchors;      // [kAnchorPlanes, P, N]
  T *row_slopes, *column_slopes;        // [kSlopePlanes, P, N]

  explicit FusedScratch(const FusedLoss<T>& l) {
    const int64_t N = l.P * l.N, M = l.P * l.M;
    T* next = l.scratch;
    const auto take = [&](int64_t values) { return std::exchange(next, next + values); };
    query_norms = take(N);
    key_norms = take(M);
    if (l.self_contrast) key_norms = query_norms;
    products = take(N * l.M);
    row_anchors = take(kAnchorPlanes * N);
    column_anchors = take(kAnchorPlanes * N);
    row_slopes = take(kSlopePlanes * N);
    column_slopes = take(kSlopePlanes * N);
  }
};

constexpr int64_t kProductsPerElement = 8;  // multiply-adds in the time that an epilogue takes for one element
}  // namespace
}  // namespace seer::cpu

#define SEER_KERNELS "fused_kernels.h"
#include "multiversion.h"

namespace seer::cpu {

int64_t fused_scratch(int64_t P, int64_t N, int64_t M, int64_t, bool) {
  return P * (N + M + N * M + 2 * (kAnchorPlanes + kSlopePlanes) * N);
}

template <class T>
void fused_loss(const FusedLoss<T>& l, int threads) {
  Barrier barrier;
  run_together(useful_threads(l.P * l.N * l.M * l.D / kProductsPerElement, threads), [&](int rank, int size) {
    const Team team{rank, size, &barrier};
    SEER_DISPATCH(fused_loss(l, team));
  });
}

template <class T>
void fused_gradients(const FusedGradients<T>& g, int threads) {
  constexpr int64_t kStrip = baseline::kFeatureStrip;
  const int64_t N = g.query.rows, M = g.key.rows;
  parallel_for(g.P * ((g.D + kStrip - 1) / kStrip), 2 * kStrip * N * M / kProductsPerElement, threads,
               [&](int64_t begin, int64_t end) {
                 std::vector<T> room((N + M) * kStrip);
                 SEER_DISPATCH(fused_gradients(g, room.data(), begin, end));
               });
}

#define SEER_INSTANTIATE(T)                           \
  template void fused_loss(const FusedLoss<T>&, int); \
  template void fused_gradients(const FusedGradients<T>&, int);
SEER_INSTANTIATE(float)
SEER_INSTANTIATE(double)

}  // namespace seer::cpu
