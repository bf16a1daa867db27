#include "../contrastive.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "parallel.h"

#define SEER_KERNELS "contrastive_kernels.h"
#include "multiversion.h"

namespace seer::cpu {

template <class T>
void contrastive_rows(const RowBlock<T>& b, int threads) {
  parallel_for(b.problem_count * b.row_count, b.M, threads,
               [&](int64_t begin, int64_t end) { SEER_DISPATCH(contrastive_rows(b, begin, end)); });
}

template <class T>
void row_statistics(const Panel<T>& b, T* anchors, int threads) {
  parallel_for(b.problem_count * b.row_count, b.column_count, threads,
               [&](int64_t begin, int64_t end) { SEER_DISPATCH(row_statistics(b, anchors, begin, end)); });
}

template <class T>
void column_statistics(const Panel<T>& b, T* anchors, int64_t first, int64_t last, int threads) {
  constexpr int64_t kStrip = baseline::kStrip;
  const int64_t strips = (last - first + kStrip - 1) / kStrip;
  parallel_for(b.problem_count * strips, b.row_count * kStrip, threads, [&](int64_t begin, int64_t end) {
    SEER_DISPATCH(column_statistics(b, anchors, first, last, begin, end));
  });
}

template <class T>
void panel_gradient(const Panel<T>& b, const T* row_slopes, const T* column_slopes, int threads) {
  parallel_for(b.problem_count * b.row_count, b.column_count, threads, [&](int64_t begin, int64_t end) {
    SEER_DISPATCH(panel_gradient(b, row_slopes, column_slopes, begin, end));
  });
}

template <class T>
void project_rows(T* gradient, const T* x, const T* inverse_norm, int64_t rows, int64_t D, int threads) {
  parallel_for(rows, D, threads, [&](int64_t begin, int64_t end) {
    SEER_DISPATCH(project_rows(gradient, x, inverse_norm, D, begin, end));
  });
}

#define SEER_INSTANTIATE(T)                                                           \
  template void contrastive_rows(const RowBlock<T>&, int);                            \
  template void row_statistics(const Panel<T>&, T*, int);                             \
  template void column_statistics(const Panel<T>&, T*, int64_t, int64_t, int);        \
  template void panel_gradient(const Panel<T>&, const T*, const T*, int);             \
  template void project_rows(T*, const T*, const T*, int64_t, int64_t, int);
SEER_INSTANTIATE(float)
SEER_INSTANTIATE(double)

}  // namespace seer::cpu
