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
void project_rows(T* gradient, const T* x, const T* inverse_norm, int64_t rows, int64_t D, int threads) {
  parallel_for(rows, D, threads, [&](int64_t begin, int64_t end) {
    SEER_DISPATCH(project_rows(gradient, x, inverse_norm, D, begin, end));
  });
}

template void contrastive_rows(const RowBlock<float>&, int);
template void contrastive_rows(const RowBlock<double>&, int);
template void project_rows(float*, const float*, const float*, int64_t, int64_t, int);
template void project_rows(double*, const double*, const double*, int64_t, int64_t, int);

}  // namespace seer::cpu
