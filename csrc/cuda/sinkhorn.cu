#include "../sinkhorn.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "device.h"
#include "tiles.h"

namespace seer::cuda {
namespace {

// A block solves a problem, all its iterations included, and takes the next. The algorithm is that of the CPU, line by
// line (csrc/cpu/sinkhorn_kernels.h), and has its names; how a block sweeps over the kernel matrix is in tiles.h. Rows
// and columns are padded to whole tiles by copies of the last row and column with weight 0. Matrices stay in registers
// where a block has enough, larger ones in shared memory where they fit, the others in scratch memory.

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int kMostWarps = 8;  // of a block: few, as each lane needs many registers
constexpr int kMostThreads = kMostWarps * kWarp;
constexpr int kSlots = 3 * kMostWarps + 2;  // doubles that the warps of a block exchange

template <class T>
SEER_DEVICE inline T exp_bounded(T x) {
  if (!(x > Limits<T>::kLowExponent)) return T(0);
  return std::exp(x < Limits<T>::kTopExponent ? x : Limits<T>::kTopExponent);
}

template <class T>
SEER_DEVICE inline T add(T x, T y) {
  return x + y;
}

SEER_DEVICE inline double marginal_slope(double potential, double tau) {
  return tau < kInfinity ? -tau * std::expm1(-potential / tau) : potential;
}

// How many numbers a problem keeps for each of its points.
struct Vectors {
  int of_rows, of_columns;
};
constexpr Vectors kOfSolutions = {3, 5}, kOfGradients = {6, 10};

// How the blocks of a launch work.
struct BlockPlan {
  int warps;           // of a block
  bool resident;       // matrices stay in registers,
  bool in_shared;      // or in shared memory
  int rows, width;     // of all padded problems, at most
  int partial_values, exchange_values, entries;  // likewise: see Grid
  int shared_bytes;
  int64_t blocks;      // fewer than problems only where matrices need scratch memory
};

// Where a matrix of T lies.
template <class Number, bool kInRegisters>
struct Way {
  using T = Number;
  static constexpr bool kResident = kInRegisters;
};

// A problem and the block that works on it.
template <class W>
class Worker {
 protected:
  using T = typename W::T;
  using L = Limits<T>;

  SEER_DEVICE Worker(const Transport<T>& t, int64_t p, const BlockPlan& plan, T* scratch)
      : t_(t),
        p_(p),
        n_(int(t.x_lengths ? t.x_lengths[p] : t.n)),
        m_(int(t.y_lengths ? t.y_lengths[p] : t.m)),
        cost_(t.cost + p * t.n * t.m),
        grid_(n_, m_, plan.warps),
        slots_(dynamic_shared<double>()),
        next_(reinterpret_cast<T*>(slots_ + kSlots)),
        tiles_{grid_, plan.in_shared ? take(plan.entries) : scratch + block_index() * int64_t(plan.entries),
               take(plan.partial_values), take(plan.exchange_values)} {}

  SEER_DEVICE T* take(int values) {
    T* taken = next_;
    next_ += values;
    return taken;
  }

  // With the padding.
  SEER_DEVICE int rows() const { return grid_.rows(); }
  SEER_DEVICE int width() const { return grid_.width(); }

  // A cost, in the padding that of the last point.
  SEER_DEVICE T cost(int i, int j) const {
    return cost_[int64_t(i < n_ ? i : n_ - 1) * t_.m + (j < m_ ? j : m_ - 1)];
  }

  // Calls body for what is this thread's of `count` things.
  template <class Body>
  SEER_DEVICE void each(int64_t count, const Body& body) const {
#pragma unroll 1
    for (int i = team_thread(); i < int(count); i += team_threads()) body(i);
  }
  // Calls body(i, j) likewise for all entries of a rows x columns matrix.
  template <class Body>
  SEER_DEVICE void each_pair(int64_t rows, int64_t columns, const Body& body) const {
#pragma unroll 1
    for (int i = warp(); i < int(rows); i += warps()) {
#pragma unroll 1
      for (int j = lane(); j < int(columns); j += kWarp) body(i, j);
    }
  }

  // The sum, or the maximum, of what all threads of the block have.
  SEER_DEVICE double block_sum(double mine) {
    return over_warps(warp_sum(mine), 0.0, [](double x, double y) { return x + y; });
  }
  SEER_DEVICE double block_max(double mine) {
    return over_warps(warp_max(mine), -kInfinity, [](double x, double y) { return std::fmax(x, y); });
  }

  const Transport<T>& t_;
  const int64_t p_;
  const int n_, m_;
  const T* const cost_;
  const Grid<T> grid_;
    double* const slots_;

 private:
  // Two halves of the slots take turns: whoever writes to one again has met everybody who read it.
  template <class Combine>
  SEER_DEVICE double over_warps(double of_warp, double total, const Combine& combine) {
    turn_ ^= 1;
    double* slots = slots_ + turn_ * kMostWarps;
    if (lane() == 0) slots[warp()] = of_warp;
    barrier();
#pragma unroll 1
    for (int w = 0; w < warps(); ++w) total = combine(total, slots[w]);
    return total;
  }

  T* next_;
  int turn_ = 0;

 protected:
  Tiles<T, W::kResident> tiles_;
};

template <class W>
class Solver : Worker<W> {
  using Base = Worker<W>;
  using typename Base::L;
  using typename Base::T;
  using Base::block_max, Base::block_sum, Base::cost, Base::each, Base::each_pair, Base::take;
  using Base::cost_, Base::m_, Base::n_, Base::p_, Base::rows, Base::slots_, Base::t_, Base::tiles_, Base::width;

 public:
  SEER_DEVICE Solver(const Transport<T>& t, const Stopping& s, const Potentials<T>& out, int64_t p,
                     const BlockPlan& plan, T* scratch)
      : Base(t, p, plan, scratch),
        s_(s),
        out_(out),
        a_(take(plan.rows)),
        f_(take(plan.rows)),
        u_(take(plan.rows)),
        b_(take(plan.width)),
        g_(take(plan.width)),
        v_(take(plan.width)),
        next_v_(take(plan.width)),
        beta_(take(plan.width)) {}

  SEER_DEVICE void run() {
    load_weights();
    if (!inspect()) return give_up();
    int iteration = 1;
    T last = now_;  // the eps of the scalings that a restart takes up
    for (bool restarts = true;;) {
      if (restarts) restart(last);
      if (iteration == s_.max_iterations) break;
      ++iteration;
      last = now_;
      restarts = !iterate();
      if (restarts) continue;
      accept();
      if (now_ > target_ && error_ < s_.until) {
        if (iteration == s_.max_iterations) break;
        ++iteration;
        restarts = true;
        now_ = now_ * T(s_.factor) > target_ ? now_ * T(s_.factor) : target_;
      } else if (!(now_ > target_) && error_ < s_.tolerance) {
        break;
      } else if (relaxed() && iteration < s_.max_iterations) {
        shift();
      }
    }
    finish(iteration);
  }

 private:
  SEER_DEVICE bool relaxed_a() const { return t_.tau_a < kInfinity; }
  SEER_DEVICE bool relaxed_b() const { return t_.tau_b < kInfinity; }
  SEER_DEVICE bool relaxed() const { return relaxed_a() || relaxed_b(); }

  // What a relaxed marginal leaves of a step.
  SEER_DEVICE T share(double tau) const { return tau < kInfinity ? T(tau) / (T(tau) + now_) : T(1); }

  SEER_DEVICE void load_weights() {
    double mass = 0;
    each(rows(), [&](int i) {
      a_[i] = i < n_ ? t_.a[p_ * t_.n + i] : T(0);
      mass += a_[i];
    });
    each(width(), [&](int j) {
      b_[j] = j < m_ ? t_.b[p_ * t_.m + j] : T(0);
      g_[j] = 0;
      v_[j] = 1;
    });
    mass_a_ = T(block_sum(mass));
  }

  // Scale, spread and usability of the costs, and with them the first and the last eps. False: unusable.
  SEER_DEVICE bool inspect() {
    T low = L::kHuge, high = -L::kHuge;
    double total = 0;
    bool outside = false;
    each_pair(n_, m_, [&](int i, int j) {
      const T x = cost_[int64_t(i) * t_.m + j];
      low = x < low ? x : low;
      high = x > high ? x : high;
      outside |= !(x < L::kHuge && x > -L::kHuge);
      if (t_.scale_cost == CostScale::kMean) total += x;
    });
    const T smallest = T(-block_max(-low)), largest = T(block_max(high));
    total = block_sum(total);
    const bool usable = !barrier_any(outside);
    T scale = 1;
    if (t_.scale_cost == CostScale::kMean) scale = T(total / (double(n_) * double(m_)));
    if (t_.scale_cost == CostScale::kMax) scale = largest;
    if (scale == T(0)) scale = 1;
    if (team_thread() == 0) {
      out_.usable[p_] = usable;
      out_.scale[p_] = scale;
    }
    if (!usable || !(scale > T(0))) return false;
    inverse_scale_ = T(1) / scale;
    const T magnitude = (largest > -smallest ? largest : -smallest) * inverse_scale_;
    const T spread = (largest - smallest) * inverse_scale_, floor = magnitude / L::kRootOfMax;
    const T eps = t_.eps[p_];
    // Below the floor exponents overflow: such a problem is solved at the floor, and reported as not converged.
    target_ = eps > floor ? eps : floor;
    now_ = spread > T(s_.above) * target_ ? T(spread / s_.start) : target_;
    return true;
  }

  // Nobody may wait for the device to look at `usable`: NaN says it, too.
  SEER_DEVICE void give_up() {
    const T nothing = T(NAN);
    each(t_.n, [&](int i) { out_.f[p_ * t_.n + i] = nothing; });
    each(t_.m, [&](int j) { out_.g[p_ * t_.m + j] = nothing; });
    if (team_thread() > 0) return;
    out_.value[p_] = out_.transport_cost[p_] = out_.marginal_error[p_] = nothing;
    out_.iterations[p_] = 0;
    out_.converged[p_] = false;
  }

  // An iteration in the logarithmic domain at now_, from g, which scales v at eps `last`, alone; then the kernel
  // between the new potentials, whose scalings are 1. Two exponentials per entry.
  SEER_DEVICE void restart(T last) {
    const T inverse = T(1) / now_, cost_factor = inverse_scale_ * inverse;
    each(width(), [&](int j) {
      const T g = g_[j] + std::log(v_[j]) * last;
      beta_[j] = b_[j] > T(0) ? std::log(b_[j]) + g * inverse : L::kAbsentLog;
    });
    barrier();
    const T share_a = share(t_.tau_a);
#pragma unroll 1
    for (int i = warp(); i < rows(); i += warps()) {
      T top = L::kAbsentLog, total = 0;
      for (int j = lane(); j < m_; j += kWarp) top = std::fmax(top, beta_[j] - cost(i, j) * cost_factor);
      top = warp_max(top);
      for (int j = lane(); j < m_; j += kWarp) total += exp_bounded(beta_[j] - cost(i, j) * cost_factor - top);
      total = warp_sum(total);
      if (lane() > 0) continue;
      f_[i] = -(top + std::log(total)) * share_a * now_;
      u_[i] = 1;
    }
    barrier();
    T of_column[kColumns<T>];
    for (T& top : of_column) top = L::kAbsentLog;
    tiles_.form([&](int i, T (&entries)[kColumns<T>]) {
      const T level = f_[i] * inverse;
#pragma unroll
      for (int c = 0; c < kColumns<T>; ++c) {
        entries[c] = level - cost(i, tiles_.column(c)) * cost_factor;
        if (a_[i] > T(0)) of_column[c] = std::fmax(of_column[c], entries[c]);
      }
    });
    const auto larger = [](T x, T y) { return std::fmax(x, y); };
    tiles_.add_up(of_column, larger);
    barrier();
    each(width(), [&](int j) { next_v_[j] = tiles_.column_total(j, larger); });
    barrier();
    for (T& sum : of_column) sum = 0;
    tiles_.change([&](int i, T (&entries)[kColumns<T>]) {
#pragma unroll
      for (int c = 0; c < kColumns<T>; ++c) {
        entries[c] = exp_bounded(entries[c] - next_v_[tiles_.column(c)]);
        of_column[c] += entries[c] * a_[i];
      }
    });
    tiles_.add_up(of_column, add<T>);
    barrier();
    const T share_b = share(t_.tau_b);
    each(width(), [&](int j) {
      const T top = next_v_[j], log_sum = top + std::log(tiles_.column_total(j) + L::kTiny);
      g_[j] = -log_sum * share_b * now_;
      next_v_[j] = exp_bounded(top - log_sum * share_b);
      v_[j] = 1;
      beta_[j] = b_[j];
    });
    barrier();
    tiles_.change([&](int, T (&entries)[kColumns<T>]) {
#pragma unroll
      for (int c = 0; c < kColumns<T>; ++c) entries[c] *= next_v_[tiles_.column(c)];
    });
    carry_ = 1;
  }

  // One iteration. False where a scaling left its range, and the iteration must not be used.
  SEER_DEVICE bool iterate() {
    const T lowest = T(1) / L::kScaling, highest = L::kScaling;
    const T share_a = share(t_.tau_a);
    const T rate_a = T(1) / (T(t_.tau_a) + now_);
    const auto scaling = [&](T sum, T share, T rate, T potential) {
      if (!relaxed()) return T(1) / sum;
      return exp_bounded(-std::log(sum > L::kTiny ? sum : L::kTiny) * share - potential * rate);
    };
    T off = 0, mass_a = 0, mass_b = 0;
    bool outside = false;
    tiles_.sweep(beta_, [&](int i, T sum, bool owns) {
      const T next = scaling(sum, share_a, rate_a, f_[i]), a = a_[i];
      outside |= !(next > lowest && next < highest);
      if (owns) {
        off += a * sum * std::fabs(u_[i] * carry_ - next);
        mass_a += a * sum * next;
        u_[i] = next;
      }
      return a * next;
    });
    off = warp_sum(off);
    double *of_warps = slots_ + 2 * kMostWarps, *of_all = of_warps + kMostWarps;
    if (lane() == 0) of_warps[warp()] = double(off);
    barrier();
    const T share_b = share(t_.tau_b);
    const T rate_b = T(1) / (T(t_.tau_b) + now_);
    each(width(), [&](int j) {
      const T sum = tiles_.column_total(j), next = scaling(sum, share_b, rate_b, g_[j]), beta = b_[j] * next;
      outside |= !(next > lowest && next < highest);
      mass_b += beta * sum;
      next_v_[j] = next;
      beta_[j] = beta;
    });
    if (warp() == warps() - 1) {
      const double total = warp_sum(lane() < warps() ? of_warps[lane()] : 0.0);
      if (lane() == 0) *of_all = total;
    }
    const bool inside = !barrier_any(outside);
    if (relaxed()) {
      mass_a_ = T(block_sum(mass_a));
      mass_b_ = T(block_sum(mass_b));
    }
    error_ = *of_all / double(mass_a_);
    return inside;
  }

  // The scalings of the columns are the new ones.
  SEER_DEVICE void accept() {
    carry_ = 1;
    T* next = next_v_;
    next_v_ = v_;
    v_ = next;
  }

  // Moves mass between the potentials of relaxed marginals as far as the dual objective rises, which alternating
  // updates do slowly. Scalings of the rows are not touched, but `carry_` says by how much they are to be read larger.
  SEER_DEVICE void shift() {
    const T step = std::log(mass_a_ / mass_b_) / (T(1 / t_.tau_a + 1 / t_.tau_b) * now_);
    if (!(step < T(10) && step > T(-10))) return;
    carry_ = std::exp(step);
    const T factor = std::exp(-step);
    each(width(), [&](int j) {
      v_[j] *= factor;
      beta_[j] *= factor;
    });
    barrier();
  }

  SEER_DEVICE void finish(int iterations) {
    T* f_out = out_.f + p_ * t_.n;
    T* g_out = out_.g + p_ * t_.m;
    each(rows(), [&](int i) { f_[i] += std::log(u_[i] * carry_) * now_; });
    each(width(), [&](int j) { g_[j] += std::log(v_[j]) * now_; });
    barrier();
    double off = 0, wanted = 0, moved = 0;
    tiles_.sweep(beta_, [&](int i, T sum, bool owns) {
      if (owns && a_[i] > T(0)) {
        const double weight = a_[i], row = weight * double(u_[i] * carry_) * double(sum);
        const double target = relaxed_a() ? weight * std::exp(-double(f_[i]) / t_.tau_a) : weight;
        off += std::fabs(row - target);
        wanted += target;
        moved += row;
      }
      return T(0);
    });
    off = block_sum(off);
    wanted = block_sum(wanted);
    moved = block_sum(moved);
    double spent = 0;
    tiles_.visit([&](int i, T (&entries)[kColumns<T>]) {
      T sum = 0;
#pragma unroll
      for (int c = 0; c < kColumns<T>; ++c) {
        const int j = tiles_.column(c);
        sum += entries[c] * beta_[j] * cost(i, j);
      }
      spent += double(a_[i] * u_[i] * carry_) * double(sum);
    });
    spent = block_sum(spent);
    double a_mass = 0, b_mass = 0, f_part = 0, g_part = 0;
    each(n_, [&](int i) {
      a_mass += a_[i];
      f_part += double(a_[i]) * marginal_slope(f_[i], t_.tau_a);
    });
    a_mass = block_sum(a_mass);
    f_part = block_sum(f_part);
    each(m_, [&](int j) {
      b_mass += b_[j];
      g_part += double(b_[j]) * marginal_slope(g_[j], t_.tau_b);
    });
    b_mass = block_sum(b_mass);
    g_part = block_sum(g_part);
    const double error = off / wanted;
    const T between = relaxed() ? T(0) : T((g_part - f_part) / (2 * a_mass));
    each(t_.n, [&](int i) { f_out[i] = i < n_ ? f_[i] + between : T(0); });
    each(t_.m, [&](int j) { g_out[j] = j < m_ ? g_[j] - between : T(0); });
    if (team_thread() > 0) return;
    out_.value[p_] = T(f_part + g_part - double(now_) * (moved - a_mass * b_mass));
    out_.transport_cost[p_] = T(spent * double(inverse_scale_));
    out_.marginal_error[p_] = error < L::kHuge ? T(error) : T(kInfinity);
    out_.iterations[p_] = iterations;
    out_.converged[p_] = error <= s_.tolerance && now_ == t_.eps[p_];
  }

  const Stopping& s_;
  const Potentials<T>& out_;
  T *const a_, *const f_, *const u_;
  T *const b_, *const g_, *v_, *next_v_, *const beta_;
  T inverse_scale_ = 1, target_ = 1, now_ = 1, carry_ = 1, mass_a_ = 0, mass_b_ = 0;
  double error_ = 0;
};

// The gradient of one problem. E_ij = exp((f_i + g_j - C_ij) / eps), so that P_ij = a_i b_j E_ij.
template <class W>
class Differentiator : Worker<W> {
  using Base = Worker<W>;
  using typename Base::L;
  using typename Base::T;
  using Base::block_sum, Base::cost, Base::each, Base::each_pair, Base::take;
  using Base::cost_, Base::m_, Base::n_, Base::p_, Base::rows, Base::t_, Base::tiles_, Base::width;

 public:
  SEER_DEVICE Differentiator(const Transport<T>& t, const Potentials<T>& at, const TransportGradient<T>& d, int64_t p,
                             const BlockPlan& plan, T* scratch)
      : Base(t, p, plan, scratch),
        d_(d),
        eps_(t.eps[p]),
        scale_(at.scale[p]),
        value_(d.value ? d.value[p] : T(0)),
        spent_(d.transport_cost ? d.transport_cost[p] : T(0)),
        f_in_(at.f + p * t.n),
        g_in_(at.g + p * t.m),
        a_(take(plan.rows)),
        a_gradient_(take(plan.rows)),
        row_sum_(take(plan.rows)),
        row_slope_(take(plan.rows)),
        row_adjoint_(take(plan.rows)),
        at_f_(take(plan.rows)),
        b_(take(plan.width)),
        b_gradient_(take(plan.width)),
        column_sum_(take(plan.width)),
        diagonal_(take(plan.width)),
        column_adjoint_(take(plan.width)),
        at_g_(take(plan.width)),
        solution_(take(plan.width)),
        residual_(take(plan.width)),
        direction_(take(plan.width)),
        product_(take(plan.width)) {}

  SEER_DEVICE void run() {
    form_kernel();
    value_part();
    if (d_.transport_cost || d_.f || d_.g) potentials_part();
    write();
  }

 private:
  SEER_DEVICE T f(int i) const { return i < n_ ? f_in_[i] : T(0); }
  SEER_DEVICE T g(int j) const { return j < m_ ? g_in_[j] : T(0); }

  // Weights and E, padded by zeros; its sums over rows and columns.
  SEER_DEVICE void form_kernel() {
    each(rows(), [&](int i) {
      a_[i] = i < n_ ? t_.a[p_ * t_.n + i] : T(0);
      at_f_[i] = f(i) / eps_;
      row_adjoint_[i] = 0;
    });
    each(width(), [&](int j) {
      b_[j] = j < m_ ? t_.b[p_ * t_.m + j] : T(0);
      at_g_[j] = g(j) / eps_;
      column_adjoint_[j] = 0;
    });
    barrier();
    const T factor = T(1) / (scale_ * eps_);
    tiles_.form([&](int i, T (&entries)[kColumns<T>]) {
      const T level = at_f_[i];
#pragma unroll
      for (int c = 0; c < kColumns<T>; ++c) {
        const int j = tiles_.column(c);
        entries[c] = i < n_ && j < m_ ? exp_bounded(at_g_[j] + level - cost(i, j) * factor) : T(0);
      }
    });
    tiles_.sweep(b_, [&](int i, T sum, bool owns) {
      if (owns) row_sum_[i] = sum;
      return a_[i];
    });
    barrier();
    each(width(), [&](int j) { column_sum_[j] = tiles_.column_total(j); });
  }

  SEER_DEVICE void value_part() {
    double a_mass = 0, b_mass = 0;
    each(n_, [&](int i) { a_mass += a_[i]; });
    each(m_, [&](int j) { b_mass += b_[j]; });
    a_mass_ = T(block_sum(a_mass));
    b_mass_ = T(block_sum(b_mass));
    each(rows(), [&](int i) {
      a_gradient_[i] = value_ * (T(marginal_slope(f(i), t_.tau_a)) - eps_ * (row_sum_[i] - b_mass_));
    });
    each(width(), [&](int j) {
      b_gradient_[j] = value_ * (T(marginal_slope(g(j), t_.tau_b)) - eps_ * (column_sum_[j] - a_mass_));
    });
  }

  // What reaches the potentials, and the adjoints of the optimality conditions that it makes: README, "Gradients".
  SEER_DEVICE void potentials_part() {
    each(rows(), [&](int i) { at_f_[i] = d_.f && i < n_ ? d_.f[p_ * t_.n + i] : T(0); });
    each(width(), [&](int j) { at_g_[j] = d_.g && j < m_ ? d_.g[p_ * t_.m + j] : T(0); });
    barrier();
    if (spent_ != T(0)) {
      const T factor = spent_ / scale_;
      const auto spent = [&](int i, int c) { return cost(recomputed(i), tiles_.column(c)) * factor; };
      const auto row = [&](int i, T total, bool owns) {
        if (owns) {
          a_gradient_[i] += total;
          at_f_[i] += a_[i] * total / eps_;
        }
        return a_[i];
      };
      tiles_.sweep(b_, row, spent);
      barrier();
      each(width(), [&](int j) {
        const T total = tiles_.column_total(j);
        b_gradient_[j] += total;
        at_g_[j] += b_[j] * total / eps_;
      });
    }
    const bool balanced = t_.tau_a == kInfinity && t_.tau_b == kInfinity;
    if (balanced) {  // through the choice of the constant between f and g
      double excess = 0;
      each(rows(), [&](int i) { excess += at_f_[i]; });
      each(width(), [&](int j) { excess -= at_g_[j]; });
      const T share = T(block_sum(excess) / (2 * double(a_mass_)));
      each(rows(), [&](int i) {
        at_f_[i] -= a_[i] * share;
        a_gradient_[i] -= share * f(i);
      });
      each(width(), [&](int j) {
        at_g_[j] += b_[j] * share;
        b_gradient_[j] += share * g(j);
      });
    }
    solve(balanced);
  }

  // Conjugate gradients on the Schur complement of the columns, preconditioned by its diagonal part. Points of weight 0
  // move no other; what lies on them is solved directly.
  SEER_DEVICE void solve(bool balanced) {
    const T row_factor = T(1) + eps_ / T(t_.tau_a), column_factor = T(1) + eps_ / T(t_.tau_b);
    each(rows(), [&](int i) {
      row_slope_[i] = row_sum_[i] > T(0) ? T(1) / (row_sum_[i] * row_factor) : T(0);
      row_adjoint_[i] = a_[i] > T(0) ? T(0) : at_f_[i] * row_slope_[i];
    });
    each(width(), [&](int j) {
      const T d = column_sum_[j] * column_factor;
      diagonal_[j] = b_[j] > T(0) && d > T(0) ? b_[j] * d : T(1);
      column_adjoint_[j] = b_[j] > T(0) || !(d > T(0)) ? T(0) : at_g_[j] / d;
      solution_[j] = 0;
    });
    barrier();
    // at_f over a, the part of weight 0 being done; and what it leaves for the columns.
    tiles_.sweep(column_adjoint_, [&](int i, T sum, bool owns) {
      const T a = a_[i], rest = a > T(0) ? at_f_[i] / a - sum : T(0);
      if (owns) row_sum_[i] = rest;
      return row_adjoint_[i] + a * rest * row_slope_[i];
    });
    T* const rest = row_sum_;
    barrier();
    each(width(), [&](int j) {
      residual_[j] = b_[j] > T(0) ? at_g_[j] - b_[j] * tiles_.column_total(j) : T(0);
    });
    double size = settle_residual(balanced);
    each(width(), [&](int j) { direction_[j] = residual_[j] / diagonal_[j]; });
    const double small = size * L::kSolved;
    for (int step = 0; step < 4 * (m_ + 25) && size > small; ++step) {
      each(width(), [&](int j) { product_[j] = b_[j] * direction_[j]; });
      barrier();
      tiles_.sweep(product_, [&](int i, T sum, bool) { return a_[i] * sum * row_slope_[i]; });
      barrier();
      double curvature = 0;
      each(width(), [&](int j) {
        product_[j] = diagonal_[j] * direction_[j] - b_[j] * tiles_.column_total(j);
        curvature += double(direction_[j]) * double(product_[j]);
      });
      curvature = block_sum(curvature);
      if (!(curvature > 0)) break;
      const T length = T(size / curvature);
      each(width(), [&](int j) {
        solution_[j] += length * direction_[j];
        residual_[j] -= length * product_[j];
      });
      const double next = settle_residual(balanced);
      const T turn = T(next / size);
      each(width(), [&](int j) { direction_[j] = residual_[j] / diagonal_[j] + turn * direction_[j]; });
      size = next;
    }
    each(width(), [&](int j) { product_[j] = b_[j] * solution_[j]; });
    barrier();
    tiles_.sweep(product_, [&](int i, T sum, bool owns) {
      if (owns) row_adjoint_[i] += a_[i] * (rest[i] - sum) * row_slope_[i];
      return T(0);
    });
    each(width(), [&](int j) { column_adjoint_[j] += product_[j]; });
  }

  // Returns the square of the residual. That of a balanced problem sums to 0 but for rounding, which grows unless taken
  // off: a constant is no direction.
  SEER_DEVICE double settle_residual(bool balanced) {
    double surplus = 0, size = 0;
    if (balanced) {
      each(width(), [&](int j) { surplus += residual_[j]; });
      surplus = block_sum(surplus) / double(b_mass_);
    }
    each(width(), [&](int j) {
      residual_[j] -= b_[j] * T(surplus);
      size += double(residual_[j]) * double(residual_[j]) / double(diagonal_[j]);
    });
    return block_sum(size);
  }

  // The gradients to the costs and, through the adjoints, to the weights.
  SEER_DEVICE void write() {
    T* gradient = d_.cost_gradient + p_ * t_.n * t_.m;
    const bool scaled = t_.scale_cost != CostScale::kNone, mean = t_.scale_cost == CostScale::kMean;
    const T flat = value_ + spent_, sloped = spent_ / (eps_ * scale_);
    barrier();
    tiles_.sweep(column_adjoint_, [&](int i, T sum, bool owns) {
      if (owns) a_gradient_[i] -= eps_ * sum;
      return row_adjoint_[i];
    });
    barrier();
    each(t_.n, [&](int i) { d_.a_gradient[p_ * t_.n + i] = i < n_ ? a_gradient_[i] : T(0); });
    each(t_.m, [&](int j) {
      d_.b_gradient[p_ * t_.m + j] = j < m_ ? b_gradient_[j] - eps_ * tiles_.column_total(j) : T(0);
    });
    double along = 0;
    tiles_.visit([&](int i, T (&entries)[kColumns<T>]) {
      const T a = a_[i], adjoint = row_adjoint_[i];
      T dot = 0;
#pragma unroll
      for (int c = 0; c < kColumns<T>; ++c) {
        const int j = tiles_.column(c);
        if (i >= n_ || j >= m_) continue;
        const T b = b_[j], x = cost(i, j);
        const T result = entries[c] * (b * adjoint + column_adjoint_[j] * a + b * a * (flat - x * sloped));
        dot += result * x;
        gradient[int64_t(i) * t_.m + j] = result;
      }
      along += double(dot);
    });
    if (n_ < t_.n || m_ < t_.m) {
      each_pair(t_.n, t_.m, [&](int i, int j) {
        if (i >= n_ || j >= m_) gradient[int64_t(i) * t_.m + j] = 0;
      });
    }
    if (!scaled) return;
    const auto sets_scale = [&](int i, int j) { return mean || cost_[int64_t(i) * t_.m + j] == scale_; };
    double count = 0;
    each_pair(n_, m_, [&](int i, int j) { count += sets_scale(i, j); });
    count = block_sum(count);
    double to_scale = -block_sum(along) / (double(scale_) * double(scale_));
    if (d_.scale) to_scale += d_.scale[p_];
    const T share = T(to_scale / (count > 0 ? count : 1)), inverse = T(1) / scale_;
    each_pair(n_, m_, [&](int i, int j) {
      T& entry = gradient[int64_t(i) * t_.m + j];
      entry = entry * inverse + (sets_scale(i, j) ? share : T(0));
    });
  }

  const TransportGradient<T>& d_;
  const T eps_, scale_, value_, spent_;
  const T *const f_in_, *const g_in_;
  T *const a_, *const a_gradient_, *const row_sum_, *const row_slope_, *const row_adjoint_, *const at_f_;
  T *const b_, *const b_gradient_, *const column_sum_, *const diagonal_, *const column_adjoint_, *const at_g_;
  T *const solution_, *const residual_, *const direction_, *const product_;
  T a_mass_ = 0, b_mass_ = 0;
};

// For all threads: the problem that the block solves next. All of them have left the one before when it returns.
SEER_DEVICE inline int64_t next_problem(int64_t problems, int64_t blocks, int* ticket) {
  if (blocks == problems) return problems;
  SEER_SHARED(int, drawn, 1);
  if (team_thread() == 0) drawn[0] = draw_ticket(ticket);
  barrier();
  return blocks + drawn[0];
}

template <class W>
SEER_KERNEL_OF(kMostThreads)
sinkhorn_solve_kernel(const Transport<typename W::T> t, const Stopping s, const Potentials<typename W::T> out,
                      const BlockPlan plan, typename W::T* scratch, int* ticket) {
  for (int64_t p = block_index(); p < t.B; p = next_problem(t.B, plan.blocks, ticket)) {
    Solver<W>(t, s, out, p, plan, scratch).run();
  }
}

template <class W>
SEER_KERNEL_OF(kMostThreads)
sinkhorn_gradient_kernel(const Transport<typename W::T> t, const Potentials<typename W::T> at,
                         const TransportGradient<typename W::T> d, const BlockPlan plan, typename W::T* scratch,
                         int* ticket) {
  for (int64_t p = block_index(); p < t.B; p = next_problem(t.B, plan.blocks, ticket)) {
    Differentiator<W>(t, at, d, p, plan, scratch).run();
  }
}

constexpr int kTicketBytes = 16;  // at the start of the scratch memory

template <class T>
BlockPlan plan_for(const char* kernel, const Transport<T>& t, Vectors vectors, Place place) {
  const int64_t B = t.B, n = t.n, m = t.m;
  const int64_t most = kSinkhornBytes / int64_t(sizeof(T));
  if (std::min({B, n, m}) < 1 || std::max(n, m) > most || B > kMostProblems) {
    throw std::invalid_argument(std::string(kernel) + ": 1 to " + std::to_string(kMostProblems) + " problems of 1 to " +
                                std::to_string(most) + " points; got " + std::to_string(B) + " problems of " +
                                std::to_string(n) + " x " + std::to_string(m));
  }
  BlockPlan plan = {};
  plan.warps = Grid<T>(int(n), int(m), kMostWarps).warps();
  plan.resident = true;
  for (int width = kWarp;; width += kWarp) {  // all that ragged problems may have
    const Grid<T> grid(int(n), std::min(width, int(m)), plan.warps);
    plan.resident = plan.resident && grid.steps <= kResidentSteps;
    plan.rows = std::max(plan.rows, grid.rows());
    plan.width = std::max(plan.width, grid.width());
    plan.partial_values = std::max(plan.partial_values, grid.partial_values());
    plan.exchange_values = std::max(plan.exchange_values, grid.exchange_values());
    plan.entries = std::max(plan.entries, grid.entries());
    if (width >= m) break;
  }
  const int values =
      vectors.of_rows * plan.rows + vectors.of_columns * plan.width + plan.partial_values + plan.exchange_values;
  const int64_t limit = most_shared_memory(kernel, place), least = kSlots * sizeof(double) + values * sizeof(T);
  const int64_t whole = least + plan.entries * int64_t(sizeof(T));
  if (least > limit) {
    throw std::runtime_error(std::string(kernel) + ": " + std::to_string(n) + " x " + std::to_string(m) +
                             " points need " + std::to_string(least) + " bytes of shared memory; this GPU gives " +
                             std::to_string(limit));
  }
  plan.in_shared = !plan.resident && whole <= limit;
  plan.shared_bytes = int(plan.in_shared ? whole : least);
  plan.blocks = plan.resident || plan.in_shared ? B : std::min<int64_t>(B, multiprocessors(kernel, place));
  return plan;
}

template <class T>
int64_t scratch_bytes(const BlockPlan& plan) {
  return plan.resident || plan.in_shared ? 0 : kTicketBytes + plan.blocks * plan.entries * int64_t(sizeof(T));
}

// Launches the kernel that the plan asks for, with what both take after their own arguments.
template <class T, class... Parameters, class... Arguments>
void launch_planned(const char* name, void (*resident)(Parameters...), void (*other)(Parameters...),
                    const BlockPlan& plan, std::uintptr_t scratch, Place place, const Arguments&... arguments) {
  int* ticket = reinterpret_cast<int*>(scratch);
  if (ticket) queue_zeros(name, place, ticket, kTicketBytes);
  launch(name, plan.resident ? resident : other, place, plan.blocks, 1, plan.warps * kWarp, plan.shared_bytes,
         arguments..., plan, reinterpret_cast<T*>(scratch + kTicketBytes), ticket);
}

}  // namespace

template <class T>
int64_t sinkhorn_scratch(const Transport<T>& t, bool gradient, int device) {
  const Place place{device, 0};
  return scratch_bytes<T>(gradient ? plan_for("sinkhorn_gradient", t, kOfGradients, place)
                                   : plan_for("sinkhorn_solve", t, kOfSolutions, place));
}

template <class T>
void sinkhorn_solve(const Transport<T>& t, const Stopping& s, const Potentials<T>& out, std::uintptr_t scratch,
                    int device, std::uintptr_t stream) {
  const Place place{device, stream};
  launch_planned<T>("sinkhorn_solve", sinkhorn_solve_kernel<Way<T, true>>, sinkhorn_solve_kernel<Way<T, false>>,
                    plan_for("sinkhorn_solve", t, kOfSolutions, place), scratch, place, t, s, out);
}

template <class T>
void sinkhorn_gradient(const Transport<T>& t, const Potentials<T>& at, const TransportGradient<T>& d,
                       std::uintptr_t scratch, int device, std::uintptr_t stream) {
  const Place place{device, stream};
  launch_planned<T>("sinkhorn_gradient", sinkhorn_gradient_kernel<Way<T, true>>,
                    sinkhorn_gradient_kernel<Way<T, false>>,
                    plan_for("sinkhorn_gradient", t, kOfGradients, place), scratch, place, t, at, d);
}

#define SEER_INSTANTIATE(T)                                                                                       \
  template int64_t sinkhorn_scratch(const Transport<T>&, bool, int);                                              \
  template void sinkhorn_solve(const Transport<T>&, const Stopping&, const Potentials<T>&, std::uintptr_t, int,   \
                               std::uintptr_t);                                                                   \
  template void sinkhorn_gradient(const Transport<T>&, const Potentials<T>&, const TransportGradient<T>&,         \
                                  std::uintptr_t, int, std::uintptr_t);
SEER_INSTANTIATE(float)
SEER_INSTANTIATE(double)

}  // namespace seer::cuda
