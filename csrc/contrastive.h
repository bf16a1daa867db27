// The epilogue of a block of similarity rows, on the CPU and on CUDA. Torch computes the raw products around it.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SEER_DEVICE __device__
#else
#define SEER_DEVICE
#endif

namespace seer {

// What a key with the query's label is, unless it is the query's own pair.
enum class SameLabel : int { kNegative = 0, kIgnore = 1, kPositive = 2 };

// What the epilogue writes for each query; one plane of [P, N] each, in this order.
enum RowPlane : int {
  kLoss,
  kValid,
  kPositiveSimilarity,
  kNegativeSimilarity,
  kHasNegative,
  kTop1,
  kLogitDot,  // row_gradient_i * sum_j (d loss_i / d logit_ij) logit_ij, for the gradient of the temperature
  kRowPlanes
};

// A block of `problem_count` problems x `row_count` queries of P problems with N queries and M keys. All other arrays
// belong to the whole: [P, N] per query, [P, M] per key, contiguous.
template <class T>
struct RowBlock {
  T* products;  // [problem_count, row_count, M] in: query . key; out, with write_gradient: d total / d product
  int64_t first_problem, problem_count;
  int64_t first_row, row_count;
  int64_t P, N, M;
  const T* query_scale;         // 1 / |query|; null for ones
  const T* key_scale;           // 1 / |key|; null for ones
  const int32_t* query_labels;  // null for none
  const int32_t* key_labels;
  const T* weights;       // a pair of weight 0 does not exist; null for ones
  const T* row_gradient;  // d total / d loss_i
  const T* temperature;   // one value
  SameLabel same_label;
  bool write_gradient;
  T* rows;  // [kRowPlanes, P, N]
};

namespace cpu {

template <class T>
void contrastive_rows(const RowBlock<T>& block, int threads);

// Takes the gradient with respect to x / |x| scaled by 1 / |x| to the gradient with respect to x, in place: removes its
// component along x. All [rows, D] contiguous, inverse_norm [rows].
template <class T>
void project_rows(T* gradient, const T* x, const T* inverse_norm, int64_t rows, int64_t D, int threads);

}  // namespace cpu

namespace cuda {

// `stream` is a cudaStream_t of `device`. Work is queued on it; nothing waits. Throws where CUDA refuses the launch.
template <class T>
void contrastive_rows(const RowBlock<T>& block, int device, std::uintptr_t stream);

template <class T>
void project_rows(T* gradient, const T* x, const T* inverse_norm, int64_t rows, int64_t D, int device,
                  std::uintptr_t stream);

}  // namespace cuda
}  // namespace seer
