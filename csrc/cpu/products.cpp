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
void pair_products(const Features<T>& f, T* products, T* query_norms, T* key_norms, int threads) {
  constexpr int64_t kRows = baseline::kRowGroup;
  parallel_for(f.P * ((f.N + kRows - 1) / kRows), kRows * f.M * f.D / kProductsPerElement, threads,
               [&](int64_t begin, int64_t end) {
                 SEER_DISPATCH(pair_products(f, products, query_norms, key_norms, begin, end));
               });
}

template <class T>
void components_along(const Features<T>& f, const T* slopes, const T* products, const T* query_norms,
                      const T* key_norms, T* along, int threads) {
  parallel_for(f.P, 2 * f.N * f.M, threads, [&](int64_t begin, int64_t end) {
    SEER_DISPATCH(components_along(f, slopes, products, query_norms, key_norms, along, begin, end));
  });
}

template <class T>
void feature_gradients(const Features<T>& f, const T* slopes, const T* along, int64_t along_stride, T* query_gradient,
                       T* key_gradient, int threads) {
  constexpr int64_t kStrip = baseline::kFeatureStrip;
  parallel_for(f.P * ((f.D + kStrip - 1) / kStrip), 2 * kStrip * f.N * f.M / kProductsPerElement, threads,
               [&](int64_t begin, int64_t end) {
                 std::vector<T> room((f.N + f.M) * kStrip);
                 SEER_DISPATCH(feature_gradients(f, slopes, along, along_stride, query_gradient, key_gradient,
                                                 room.data(), begin, end));
               });
}

#define SEER_INSTANTIATE(T)                                       \
  template void pair_products(const Features<T>&, T*, T*, T*, int); \
  template void components_along(const Features<T>&, const T*, const T*, const T*, const T*, T*, int); \
  template void feature_gradients(const Features<T>&, const T*, const T*, int64_t, T*, T*, int);
SEER_INSTANTIATE(float)
SEER_INSTANTIATE(double)

}  // namespace seer::cpu
