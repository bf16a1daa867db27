#include "../contrastive.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "parallel.h"

#define SEER_KERNELS "products_kernels.h"
#include "multiversion.h"

namespace seer::cpu {

namespace {
constexpr int64_t kProductsPerElement = 8;  // multiply-adds in the time that an epilogue takes for one element
}

template <class T>
void pair_products(const Features<T>& f, T* products, int threads) {
  constexpr int64_t kRows = baseline::kRowGroup;
  parallel_for(f.P * ((f.N + kRows - 1) / kRows), kRows * f.M * f.D / kProductsPerElement, threads,
               [&](int64_t begin, int64_t end) { SEER_DISPATCH(pair_products(f, products, begin, end)); });
}

template <class T>
void feature_gradients(const Features<T>& f, const T* products, const T* slopes, const T* query_inverse_norms,
                       const T* key_inverse_norms, T* query_gradient, T* key_gradient, int threads) {
  std::vector<T> query_along, key_along;
  if (query_inverse_norms) {
    query_along.resize(f.P * f.N);
    key_along.resize(f.P * f.M);
    for (int64_t p = 0; p < f.P; ++p) {
      const int64_t block = p * f.N * f.M;
      baseline::components_along(slopes + block, products + block, f.M, 1, f.N, f.M, query_inverse_norms + p * f.N,
                                 query_along.data() + p * f.N);
      baseline::components_along(slopes + block, products + block, 1, f.M, f.M, f.N, key_inverse_norms + p * f.M,
                                 key_along.data() + p * f.M);
    }
  }
  const T* along[] = {query_inverse_norms ? query_along.data() : nullptr, key_inverse_norms ? key_along.data() : nullptr};
  constexpr int64_t kStrip = baseline::kFeatureStrip;
  parallel_for(f.P * ((f.D + kStrip - 1) / kStrip), 2 * kStrip * f.N * f.M / kProductsPerElement, threads,
               [&](int64_t begin, int64_t end) {
                 SEER_DISPATCH(feature_gradients(f, slopes, along[0], along[1], query_gradient, key_gradient, begin, end));
               });
}

#define SEER_INSTANTIATE(T)                                       \
  template void pair_products(const Features<T>&, T*, int);       \
  template void feature_gradients(const Features<T>&, const T*, const T*, const T*, const T*, T*, T*, int);
SEER_INSTANTIATE(float)
SEER_INSTANTIATE(double)

}  // namespace seer::cpu
