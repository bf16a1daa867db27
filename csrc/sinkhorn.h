// Batches of entropic optimal transport problems. One problem is solved by one team: a core, or some cores that share
// its rows. Everything per problem happens in one call, its stopping test included.
#pragma once

#include <cstdint>

namespace seer {

enum class Ground : int { kSquaredEuclidean = 0, kEuclidean = 1, kCosine = 2 };
enum class CostScale : int { kNone = 0, kMean = 1, kMax = 2 };

// B pairs of clouds of n and m points with D features.
template <class T>
struct Clouds {
  int64_t B, n, m, D;
  const T* x;                // [B, n, D]
  const T* y;                // [B, m, D]
  const int64_t* x_lengths;  // [B]; null where every point exists
  const int64_t* y_lengths;
  Ground ground;
  T cancelled;  // squared distances below this share of |x|^2 + |y|^2 are formed from differences
  T* cost;      // [B, n, m]; not written past the lengths
};

// B transport problems between n and m points; arrays past the lengths hold anything but in a and b, which are 0 there.
template <class T>
struct Transport {
  int64_t B, n, m;
  const T* cost;             // [B, n, m]
  const T* a;                // [B, n]
  const T* b;                // [B, m]
  const T* eps;              // [B]
  const int64_t* x_lengths;  // [B]; null where every point exists
  const int64_t* y_lengths;
  double tau_a, tau_b;  // infinite for a marginal that is a constraint
  CostScale scale_cost;
};

struct Stopping {
  int64_t max_iterations;
  double tolerance;
  // Annealing: where costs spread over more than `above` eps, from spread / start on, by `factor`, once the marginal
  // error is below `until`.
  double above, start, factor, until;
};

template <class T>
struct Potentials {
  T* value;            // [B]
  T* transport_cost;   // [B]
  T* f;                // [B, n], in units of the scale
  T* g;                // [B, m]
  T* scale;            // [B]
  T* marginal_error;   // [B]
  int32_t* iterations; // [B]
  bool* converged;     // [B]
  bool* usable;        // [B]: whether the costs are finite and far from overflow
};

// What numbers of a type can hold.
template <class T>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float kAbsentLog = -1e30f;  // the logarithm of a weight of 0
  static constexpr float kTopExponent = 80.0f;
  static constexpr float kLowExponent = -87.0f;
  // Scalings that leave [1 / kScaling, kScaling] go into the potentials. Entries of the kernel below e^-87 are 0; with
  // both scalings at the limit they would still be below e^-45 of what they add to.
  static constexpr float kScaling = 1e9f;
  static constexpr float kHuge = 2e37f;  // costs must be smaller
  static constexpr float kRootOfMax = 1.8e19f;
  static constexpr float kTiny = 1.2e-38f;
  static constexpr double kSolved = 1.4e-14;  // by how much conjugate gradients lower the square of the residual
};
template <>
struct Limits<double> {
  static constexpr double kAbsentLog = -1e300;
  static constexpr double kTopExponent = 600.0;
  static constexpr double kLowExponent = -700.0;
  static constexpr double kScaling = 1e60;
  static constexpr double kHuge = 1e307;
  static constexpr double kRootOfMax = 1.3e154;
  static constexpr double kTiny = 2.3e-308;
  static constexpr double kSolved = 4.9e-32;
};

// What arrives for the outputs, null for zero, and the gradients with respect to cost, a and b.
template <class T>
struct TransportGradient {
  const T* value;           // [B]
  const T* transport_cost;  // [B]
  const T* f;               // [B, n]
  const T* g;               // [B, m]
  const T* scale;           // [B]
  T* cost_gradient;         // [B, n, m]
  T* a_gradient;            // [B, n]
  T* b_gradient;            // [B, m]
};

// Normalisations of rows and columns in turn, between potentials whose columns include log b, for P problems:
// row_i = log sum_j exp(q_j - C_ij), column_j = log sum_i exp(log a_i - share_a row_i - C_ij),
// q_j = log b_j - share_b column_j.
template <class T>
struct Alternation {
  int64_t P, N, M, iterations;
  const T* cost;   // [P, N, M]
  const T* log_a;  // [P, N]; may be -infinity
  const T* log_b;  // [P, M]; likewise
  const T* start;  // [P, M]: the first q
  T share_a, share_b;
};

namespace cpu {
template <class T>
void sinkhorn_cost(const Clouds<T>&, int threads);
template <class T>
void sinkhorn_solve(const Transport<T>&, const Stopping&, const Potentials<T>&, int threads);
template <class T>
void sinkhorn_gradient(const Transport<T>&, const Potentials<T>&, const TransportGradient<T>&, int threads);
// Writes the last q, potential [P, M], rows [iterations, P, N] and columns [iterations, P, M].
template <class T>
void alternate(const Alternation<T>&, T* potential, T* rows, T* columns, int threads);
// From the gradient to the last q [P, M] to the one to the costs [P, N, M].
template <class T>
void alternate_gradient(const Alternation<T>&, const T* rows, const T* columns, const T* gradient, T* cost_gradient,
                        int threads);
}  // namespace cpu

// Queued on a stream. `scratch` has sinkhorn_scratch() bytes; null where these are 0.
namespace cuda {
constexpr int64_t kSinkhornBytes = 4096;         // of a vector of points: as many as problems may have
constexpr int64_t kMostProblems = (1 << 30) - 1;
template <class T>
int64_t sinkhorn_scratch(const Transport<T>&, bool gradient, int device);
template <class T>
void sinkhorn_solve(const Transport<T>&, const Stopping&, const Potentials<T>&, std::uintptr_t scratch, int device,
                    std::uintptr_t stream);
template <class T>
void sinkhorn_gradient(const Transport<T>&, const Potentials<T>&, const TransportGradient<T>&, std::uintptr_t scratch,
                       int device, std::uintptr_t stream);
}  // namespace cuda

}  // namespace seer
