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

// P problems of N queries against M keys: what decides logits and pairs. [P, N] per query, [P, M] per key, contiguous.
template <class T>
struct Operands {
  int64_t P, N, M;
  const T* query_scale;         // 1 / |query|; null for ones
  const T* key_scale;           // 1 / |key|; null for ones
  const T* temperature;         // one value
  const T* bias;                // one value, for the sigmoid loss; else null
  const int32_t* query_labels;  // null for none
  const int32_t* key_labels;
  const T* weights;     // [P, N]: a query of weight 0 does not exist; null for ones
  bool shared_weights;  // nor does the key of the same index then
  int64_t own_shift;    // key (i + own_shift) mod M is query i's own pair; -1 for none
  bool self_contrast;   // the keys are the queries, and no row is compared with itself
  SameLabel same_label;
};

// What the row epilogue writes for each query; one plane of [P, N] each, in this order.
enum RowPlane : int {
  kLoss,
  kValid,
  kPositiveSimilarity,
  kNegativeSimilarity,
  kHasNegative,
  kTop1,
  kLogitDot,  // row_gradient_i * sum_j (d loss_i / d logit_ij) similarity_ij / temperature
  kLogitSum,  // row_gradient_i * sum_j (d loss_i / d logit_ij)
  kRowPlanes
};

// `row_count` queries of each of `problem_count` problems against all keys.
template <class T>
struct RowBlock : Operands<T> {
  T* products;  // [problem_count, row_count, M] in: query . key; out, with write_gradient: d total / d product
  int64_t first_problem, problem_count;
  int64_t first_row, row_count;
  const T* row_gradient;  // d total / d loss_i; null for ones
  bool write_gradient;
  T* rows;  // [kRowPlanes, P, N]
};

// What is kept of an anchor (a query, or a key in its turn as query) while its row is seen in parts; planes of [P, N].
enum AnchorPlane : int {
  kTopLogit,
  kExponentials,       // sum over candidates of e^(logit - top)
  kWeightedBelow,      // sum over candidates of e^(logit - top) (logit - top)
  kPositiveSum,        // of logits
  kPositiveCount,
  kNegativeSum,
  kNegativeCount,
  kBestPositive,
  kBestNegative,
  kAnchorPlanes
};

// `row_count` queries of each of `problem_count` problems against `column_count` keys. Pairs are seen from both sides:
// rows as anchors, and columns as anchors.
template <class T>
struct Panel : Operands<T> {
  T* products;  // [problem_count, row_count, column_count]
  int64_t first_problem, problem_count;
  int64_t first_row, row_count;
  int64_t first_column, column_count;
};

// For the gradient, of each anchor: planes of [P, N].
enum SlopePlane : int {
  kNormalizer,  // logsumexp of the anchor's logits
  kTarget,      // 1 / number of its positives
  kSlope,       // d total / d loss of the anchor; 0 where the anchor has no loss
  kSlopePlanes
};

// Rows of each of P problems, [P, split, D] at `first` and [P, rows - split, D] at `second`, contiguous.
struct RowSet {
  void* first;  // each null where it is not wanted
  void* second;
  int64_t split, rows;
};

// Of what type features are: T itself, or on CUDA half precision that is widened to T = float as it is read.
enum class FeatureType : int { kWide = 0, kBfloat16 = 1, kHalf = 2 };

enum class Form : int { kSoftmax = 0, kSymmetric = 1, kSigmoid = 2 };

// A whole loss of few rows, from features to slopes, in one launch. The scales of Operands are unused.
template <class T>
struct FusedLoss : Operands<T> {
  RowSet query, key;  // the same for self_contrast
  int64_t D;
  FeatureType type;
  Form form;
  bool normalize;
  T temperature_value, bias_value;  // where the pointers to them are null
  const T* row_gradient;            // [P, N] d total / d loss_i; null for ones
  T* scratch;                       // as many values as fused_scratch() says
  T* rows;                          // [kRowPlanes, P, N]; on CUDA up to kTop1
  T* slopes;                        // [P, N, M] d total / d product, if write_slopes; in any case written to
  T* along;                         // [P, N + M], [P, N] for self_contrast: multiple of the features taken off, or null
  T* total_loss;                    // [P] sum_i weight_i loss_i
  T* total_weight;                  // [P] sum of the weights of rows with a positive; 1 where there is none
  T* mean_loss;                     // [P] total_loss / total_weight
  T* temperature_gradient;          // [P]
  T* bias_gradient;                 // [P]
  bool write_slopes;
};

// From slopes to the gradients of features of few rows.
template <class T>
struct FusedGradients {
  int64_t P, D;
  RowSet query, key;  // the same for self_contrast
  RowSet query_gradient, key_gradient;
  FeatureType type;  // of gradients, too
  bool self_contrast;
  const T* slopes;  // as in FusedLoss
  const T* along;
  const T* scale;  // [P] multiplies the gradients of each problem; null for ones
};

namespace cpu {

// Values of scratch memory that a FusedLoss needs for itself.
int64_t fused_scratch(int64_t P, int64_t N, int64_t M, int64_t D, bool self_contrast);

template <class T>
void fused_loss(const FusedLoss<T>& loss, int threads);

template <class T>
void fused_gradients(const FusedGradients<T>& gradients, int threads);

template <class T>
void contrastive_rows(const RowBlock<T>& block, int threads);

// Adds the panel's logits to what is known of its rows as anchors.
template <class T>
void row_statistics(const Panel<T>& panel, T* anchors, int threads);

// Adds the panel's logits to what is known of its keys from `first` to `last` as anchors.
template <class T>
void column_statistics(const Panel<T>& panel, T* anchors, int64_t first, int64_t last, int threads);

// Overwrites the products by d total / d product, the sum of what rows and columns as anchors contribute. Columns from
// N on are no anchors.
template <class T>
void panel_gradient(const Panel<T>& panel, const T* row_slopes, const T* column_slopes, int threads);

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

// At most kFusedRows queries and keys.
constexpr int kFusedRows = 256;

// Values of scratch memory that a FusedLoss needs for itself.
int64_t fused_scratch(int64_t P, int64_t N, int64_t M, int64_t D, bool self_contrast);

template <class T>
void fused_loss(const FusedLoss<T>& loss, int device, std::uintptr_t stream);

template <class T>
void fused_gradients(const FusedGradients<T>& gradients, int device, std::uintptr_t stream);

}  // namespace cuda
}  // namespace seer
