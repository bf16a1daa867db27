#include "../sinkhorn.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <new>
#include <optional>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "parallel.h"
#include "team.h"

namespace seer::cpu {

constexpr int kBlockRows = 8;  // rows of the kernel that are multiplied at a time
constexpr int kTurns = 4;      // small problems that a core has in hand at a time
constexpr int kSlots = 3;      // numbers that members of a team exchange per iteration

// What the work on one problem writes besides its results; rows and columns are padded.
template <class T>
struct Workspace {
  T* kernel;  // [rows, columns]
  T *a, *f, *u;
  T *b, *log_b, *g, *v, *next_v, *beta, *top;
  T* columns;      // [members, stride]: sums over the rows of each
  int64_t stride;  // columns, and a cache line between members
  double* slots;   // [2, members, kSlots]
  // of small problems, else null
  T* transposed;  // [columns, rows]
  T* scales;      // [rows]
  // for gradients
  T *row_sum, *row_slope, *row_adjoint, *at_f;
  T *column_sum, *diagonal, *column_adjoint, *at_g, *solution, *residual, *direction;
};

// What an alternation writes besides its results, each padded to `width`, in whole cache lines.
template <class T>
struct AlternationSpace {
  int64_t width;
  T *level, *column, *gradient, *arrived;
  T* partial;  // [members, 2, width]: the largest term of each column, and the sum of all relative to it
};

namespace {

template <class T>
constexpr int64_t kLineOf = 64 / sizeof(T);

constexpr int64_t padded(int64_t count, int64_t block) { return (count + block - 1) / block * block; }

// Hands out aligned arrays from one allocation.
template <class T>
class Arena {
 public:
  explicit Arena(int64_t elements)
      : memory_(static_cast<T*>(::operator new(elements * sizeof(T), std::align_val_t(64)))), next_(memory_) {}
  ~Arena() { ::operator delete(memory_, std::align_val_t(64)); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  T* take(int64_t elements) {
    T* taken = next_;
    next_ += padded(elements, kLineOf<T>);
    return taken;
  }

 private:
  T* memory_;
  T* next_;
};

// A workspace for problems of up to n x m points, for a team of `members`.
template <class T>
class Space {
 public:
  // `small`: the kernel's transpose beside it, and rows padded like columns.
  Space(int64_t n, int64_t m, int members, bool gradient, bool small = false)
      : rows_(padded(padded(n, kBlockRows), kLineOf<T>)),
        columns_(padded(m, kLineOf<T>)),
        kernel_((small ? rows_ : padded(n, kBlockRows)) * columns_),
        slots_(2 * kSlots * members),
        arena_((small ? 2 : 1) * kernel_ + (gradient ? 7 : 4) * rows_ + (gradient ? 14 : 7) * columns_ +
               members * (columns_ + kLineOf<T>)) {
    w.kernel = arena_.take(kernel_);
    for (T** rows : {&w.a, &w.f, &w.u}) *rows = arena_.take(rows_);
    for (T** columns : {&w.b, &w.log_b, &w.g, &w.v, &w.next_v, &w.beta, &w.top}) *columns = arena_.take(columns_);
    w.stride = columns_ + kLineOf<T>;
    w.columns = arena_.take(members * w.stride);
    w.slots = slots_.data();
    if (small) {
      w.transposed = arena_.take(kernel_);
      w.scales = arena_.take(rows_);
    }
    if (!gradient) return;
    for (T** rows : {&w.row_sum, &w.row_slope, &w.row_adjoint, &w.at_f}) *rows = arena_.take(rows_);
    for (T** columns :
         {&w.column_sum, &w.diagonal, &w.column_adjoint, &w.at_g, &w.solution, &w.residual, &w.direction}) {
      *columns = arena_.take(columns_);
    }
  }

  Workspace<T> w{};

 private:
  int64_t rows_, columns_, kernel_;
  std::vector<double> slots_;
  Arena<T> arena_;
};

}  // namespace

}  // namespace seer::cpu

#define SEER_KERNELS "sinkhorn_kernels.h"
#include "multiversion.h"

namespace seer::cpu {

namespace {

// The variant for the machine's instruction set, as a function: SEER_DISPATCH returns.
template <class T>
void solve_on(const Transport<T>& t, const Stopping& s, const Potentials<T>& out, int64_t p, const Workspace<T>& w,
              const Team& team) {
  SEER_DISPATCH(solve_problem(t, s, out, p, w, team));
}

template <class T, class Next>
void solve_in_turns_on(const Transport<T>& t, const Stopping& s, const Potentials<T>& out, Next& next,
                       const Workspace<T> (&w)[kTurns]) {
  SEER_DISPATCH(solve_in_turns(t, s, out, next, w));
}

template <class T>
void differentiate_on(const Transport<T>& t, const Potentials<T>& at, const TransportGradient<T>& d, int64_t p,
                      const Workspace<T>& w) {
  SEER_DISPATCH(differentiate_problem(t, at, d, p, w));
}

template <class T>
void alternate_on(const Alternation<T>& t, int64_t p, const AlternationSpace<T>& space, const Team& team, T* potential,
                  T* rows, T* columns) {
  SEER_DISPATCH(alternate_problem(t, p, space, team, potential, rows, columns));
}

template <class T>
void differentiate_alternation_on(const Alternation<T>& t, int64_t p, const AlternationSpace<T>& space,
                                  const Team& team, const T* rows, const T* columns, const T* gradient,
                                  T* cost_gradient) {
  SEER_DISPATCH(differentiate_alternation(t, p, space, team, rows, columns, gradient, cost_gradient));
}

template <class T>
void costs_on(const Clouds<T>& c, int64_t p, T* x, T* y, T* centre, T* x_size, T* y_size, T* dots) {
  SEER_DISPATCH(form_costs(c, p, x, y, centre, x_size, y_size, dots));
}

constexpr int64_t kTeamEntries = 1 << 16;  // a problem below this is not worth the waiting of a team
constexpr int64_t kTurnEntries = 32 * 32;   // a problem above this keeps a core busy by itself

// Whether `threads` work on one problem together, rather than on one each.
bool in_teams(int64_t problems, int64_t entries, int threads) {
  const bool even = problems % threads == 0 || problems >= 8 * threads;
  return threads > 1 && !even && entries >= kTeamEntries;
}

// Calls work(p, space, team) for all problems of an alternation.
template <class T, class Work>
void each_alternation(const Alternation<T>& t, int threads, const Work& work) {
  const int64_t width = padded(t.M, kLineOf<T>);
  const auto space_in = [&](Arena<T>& arena, int members) {
    AlternationSpace<T> space{};
    space.width = width;
    for (T** columns : {&space.level, &space.column, &space.gradient, &space.arrived}) *columns = arena.take(width);
    space.partial = arena.take(2 * members * width);
    return space;
  };
  if (in_teams(t.P, t.N * t.M, threads)) {
    Arena<T> arena((4 + 2 * threads) * width);
    const AlternationSpace<T> space = space_in(arena, threads);
    Barrier barrier;
    run_together(threads, [&](int rank, int size) {
      for (int64_t p = 0; p < t.P; ++p) work(p, space, Team{rank, size, &barrier});
    });
    return;
  }
  parallel_take(t.P, t.N * t.M * t.iterations, threads, [&](auto& next) {
    Arena<T> arena(6 * width);
    const AlternationSpace<T> space = space_in(arena, 1);
    for (int64_t p = next(); p < t.P; p = next()) work(p, space, Team{0, 1, nullptr});
  });
}

}  // namespace

template <class T>
void sinkhorn_cost(const Clouds<T>& c, int threads) {
  parallel_take(c.B, c.n * c.m * c.D / 16, threads, [&](auto& next) {
    const int64_t depth = padded(c.D, kLineOf<T>), n = padded(c.n, kLineOf<T>), m = padded(c.m, kLineOf<T>);
    Arena<T> arena((n + m + 1) * depth + n + m + 4 * m);
    T *x = arena.take(n * depth), *y = arena.take(m * depth), *centre = arena.take(depth);
    T *x_size = arena.take(n), *y_size = arena.take(m), *dots = arena.take(4 * m);
    for (int64_t p = next(); p < c.B; p = next()) costs_on(c, p, x, y, centre, x_size, y_size, dots);
  });
}

template <class T>
void sinkhorn_solve(const Transport<T>& t, const Stopping& s, const Potentials<T>& out, int threads) {
  if (in_teams(t.B, t.n * t.m, threads)) {
    Space<T> space(t.n, t.m, threads, false);
    Barrier barrier;
    run_together(threads, [&](int rank, int size) {
      const Team team{rank, size, &barrier};
      for (int64_t p = 0; p < t.B; ++p) {
        solve_on(t, s, out, p, space.w, team);
        team.sync();
      }
    });
    return;
  }
  const int64_t passes = s.max_iterations < 16 ? s.max_iterations + 4 : 20;
  parallel_take(t.B, t.n * t.m * passes, threads, [&](auto& next) {
    if (t.n * t.m <= kTurnEntries) {
      std::optional<Space<T>> spaces[kTurns];
      Workspace<T> w[kTurns];
      for (int k = 0; k < kTurns; ++k) w[k] = spaces[k].emplace(t.n, t.m, 1, false, true).w;
      solve_in_turns_on(t, s, out, next, w);
      return;
    }
    Space<T> space(t.n, t.m, 1, false);
    for (int64_t p = next(); p < t.B; p = next()) solve_on(t, s, out, p, space.w, Team{0, 1, nullptr});
  });
}

template <class T>
void sinkhorn_gradient(const Transport<T>& t, const Potentials<T>& at, const TransportGradient<T>& d, int threads) {
  const int64_t passes = d.transport_cost || d.f || d.g ? 20 : 4;
  parallel_take(t.B, t.n * t.m * passes, threads, [&](auto& next) {
    Space<T> space(t.n, t.m, 1, true);
    for (int64_t p = next(); p < t.B; p = next()) differentiate_on(t, at, d, p, space.w);
  });
}

template <class T>
void alternate(const Alternation<T>& t, T* potential, T* rows, T* columns, int threads) {
  each_alternation(t, threads, [&](int64_t p, const AlternationSpace<T>& space, const Team& team) {
    alternate_on(t, p, space, team, potential, rows, columns);
  });
}

template <class T>
void alternate_gradient(const Alternation<T>& t, const T* rows, const T* columns, const T* gradient, T* cost_gradient,
                        int threads) {
  each_alternation(t, threads, [&](int64_t p, const AlternationSpace<T>& space, const Team& team) {
    differentiate_alternation_on(t, p, space, team, rows, columns, gradient, cost_gradient);
  });
}

#define SEER_INSTANTIATE(T)                                                                                \
  template void sinkhorn_cost(const Clouds<T>&, int);                                                      \
  template void sinkhorn_solve(const Transport<T>&, const Stopping&, const Potentials<T>&, int);           \
  template void sinkhorn_gradient(const Transport<T>&, const Potentials<T>&, const TransportGradient<T>&, int); \
  template void alternate(const Alternation<T>&, T*, T*, T*, int);                                             \
  template void alternate_gradient(const Alternation<T>&, const T*, const T*, const T*, T*, int);
SEER_INSTANTIATE(float)
SEER_INSTANTIATE(double)

}  // namespace seer::cpu
