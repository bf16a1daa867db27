// A matrix that one block multiplies from both sides in one read of it: n x m, divided among the lanes of all warps.
//
// A lane has tiles of kRows neighbouring rows and kColumns columns; the columns are a few apart, so that neighbouring
// lanes read neighbours in memory. The lanes of a warp form a grid over rows and columns, and so do the warps of the
// block, which covers all columns and goes down the rows in steps. Where kResidentSteps are enough the tiles stay in
// registers; else each lane keeps its own in memory, in an order of its own, and touches no other lane's.
#pragma once

#include "warp.h"

#if defined(__CUDACC__)
#define SEER_HOST_DEVICE __host__ __device__
#else
#define SEER_HOST_DEVICE
#endif

namespace seer::cuda {
namespace {

constexpr int kRows = 8;
constexpr int kResidentSteps = 2;
template <class T>
constexpr int kColumns = 16 / sizeof(T);  // a pack

SEER_HOST_DEVICE constexpr int divided_up(int count, int by) { return (count + by - 1) / by; }

// How n x m entries are divided among at most `warps` warps. All counts grow with n.
template <class T>
struct Grid {
  int column_lanes, column_warps, row_warps, steps;  // lanes: 8, 16 or 32

  SEER_HOST_DEVICE Grid(int n, int m, int warps) {
    column_lanes = m <= 8 * kColumns<T> ? 8 : m <= 16 * kColumns<T> ? 16 : 32;
    column_warps = divided_up(m, column_lanes * kColumns<T>);
    const int wanted = divided_up(n, warp_rows());
    steps = divided_up(wanted, warps / column_warps);
    row_warps = divided_up(wanted, steps);
  }
  SEER_HOST_DEVICE int warp_rows() const { return kRows * kWarp / column_lanes; }
  SEER_HOST_DEVICE int step_rows() const { return row_warps * warp_rows(); }
  SEER_HOST_DEVICE int rows() const { return steps * step_rows(); }
  SEER_HOST_DEVICE int width() const { return column_warps * column_lanes * kColumns<T>; }
  SEER_HOST_DEVICE int warps() const { return row_warps * column_warps; }

  // How many values Tiles needs in memory, for the divided sums of the columns, and for those of the rows.
  SEER_HOST_DEVICE int entries() const { return steps * warps() * kWarp * kRows * kColumns<T>; }
  SEER_HOST_DEVICE int partial_values() const { return row_warps * width(); }
  SEER_HOST_DEVICE int exchange_values() const { return column_warps > 1 ? 2 * warps() * kRows : 0; }
};

// The matrix and its divided sums. `kResident`: in registers.
template <class T, bool kResident>
class Tiles {
 public:
  static constexpr int kColumns = cuda::kColumns<T>;

  // `memory` serves where the matrix is not resident.
  SEER_DEVICE Tiles(const Grid<T>& grid, T* memory, T* partial, T* exchange)
      : grid_(grid), memory_(memory), partial_(partial), exchange_(exchange) {
    const int group = lane() / grid.column_lanes, column_lane = lane() % grid.column_lanes;
    working_ = warp() < grid.warps();
    row_warp_ = warp() / grid.column_warps;
    first_row_ = row_warp_ * grid.warp_rows() + group * kRows;
    first_column_ = warp() % grid.column_warps * grid.column_lanes * kColumns + column_lane;
    own_row_ = column_lane / copies();
    owns_ = column_lane % copies() == 0 && first_column_ < grid.column_lanes;
  }

  SEER_DEVICE int column(int c) const { return first_column_ + c * grid_.column_lanes; }

  // Makes the matrix anew: body(i, entries) writes this lane's kColumns entries of row i, at column(0), column(1), ...
  template <class Body>
  SEER_DEVICE void form(const Body& body) {
    each_step([&](int step, Tile& tile) {
      each_row(step, tile, body);
      put(step, tile);
    });
  }

  // body(i, entries) may change the entries.
  template <class Body>
  SEER_DEVICE void change(const Body& body) {
    each_step([&](int step, Tile& tile) {
      get(step, tile);
      each_row(step, tile, body);
      put(step, tile);
    });
  }

  template <class Body>
  SEER_DEVICE void visit(const Body& body) {
    each_step([&](int step, Tile& tile) {
      get(step, tile);
      each_row(step, tile, body);
    });
  }

  // One read of the matrix for products with the rows and the sums over the columns that follow from them:
  // row(i, dot, owns) gets the product of row i with `weights` and says by how much the row counts in the sums, which go
  // to add_up(). All lanes with a part of the row call it; one of them `owns` it. factor(i, c) multiplies entries.
  template <class Row, class Factor>
  SEER_DEVICE void sweep(const T* weights, const Row& row, const Factor& factor) {
    T weight[kColumns] = {}, sums[kColumns] = {};
    if (working_) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) weight[c] = weights[column(c)];
    }
    each_step([&](int step, Tile& tile) {
      const int first = step * grid_.step_rows() + first_row_;
      T dot = 0;
      if (working_) {
        get(step, tile);
        T dots[kRows];
#pragma unroll
        for (int k = 0; k < kRows; ++k) {
          dots[k] = 0;
#pragma unroll
          for (int c = 0; c < kColumns; ++c) dots[k] += tile[k][c] * factor(first + k, c) * weight[c];
        }
        dot = scattered_sum<kRows>(dots, grid_.column_lanes);
      }
      if (grid_.column_warps > 1) dot = total_over_column_warps(dot);
      if (!working_) return;
      const T scale = row(first + own_row_, dot, owns_);
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        const T of_row = shuffle_from(scale, (lane() & -grid_.column_lanes) + k * copies());
#pragma unroll
        for (int c = 0; c < kColumns; ++c) sums[c] += tile[k][c] * factor(first + k, c) * of_row;
      }
    });
    add_up(sums, [](T x, T y) { return x + y; });
  }
  template <class Row>
  SEER_DEVICE void sweep(const T* weights, const Row& row) {
    sweep(weights, row, [](int, int) { return T(1); });
  }

  // Combines what the lanes have for their columns as far as a warp goes; a barrier, and column_total() has the rest.
  template <class Combine>
  SEER_DEVICE void add_up(T (&mine)[kColumns], const Combine& combine) {
    if (!working_) return;
#pragma unroll 1
    for (int mask = grid_.column_lanes; mask < kWarp; mask *= 2) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) mine[c] = combine(mine[c], shuffle_xor(mine[c], mask));
    }
    if (lane() >= grid_.column_lanes) return;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) partial_[row_warp_ * grid_.width() + column(c)] = mine[c];
  }

  template <class Combine>
  SEER_DEVICE T column_total(int j, const Combine& combine) const {
    T total = partial_[j];
#pragma unroll 4
    for (int r = 1; r < grid_.row_warps; ++r) total = combine(total, partial_[r * grid_.width() + j]);
    return total;
  }
  SEER_DEVICE T column_total(int j) const {
    return column_total(j, [](T x, T y) { return x + y; });
  }

 private:
  using Tile = T[kRows][kColumns];

  // Lanes that hold the sum of the same row.
  SEER_DEVICE int copies() const { return grid_.column_lanes / kRows; }

  template <class Body>
  SEER_DEVICE void each_step(const Body& body) {
    if constexpr (kResident) {
#pragma unroll
      for (int step = 0; step < kResidentSteps; ++step) {
        if (step < grid_.steps) body(step, tiles_[step]);
      }
    } else {
#pragma unroll 1
      for (int step = 0; step < grid_.steps; ++step) body(step, tiles_[0]);
    }
  }

  template <class Body>
  SEER_DEVICE void each_row(int step, Tile& tile, const Body& body) {
    if (!working_) return;
    const int first = step * grid_.step_rows() + first_row_;
#pragma unroll
    for (int k = 0; k < kRows; ++k) body(recomputed(first + k), tile[k]);
  }

  // The packs of a warp lie side by side.
  SEER_DEVICE int pack(int step, int k) const {
    return ((step * grid_.warps() + warp()) * kRows + k) * kWarp + lane();
  }
  SEER_DEVICE void get(int step, Tile& tile) const {
    if constexpr (!kResident) {
      if (!working_) return;
#pragma unroll
      for (int k = 0; k < kRows; ++k) load(memory_, pack(step, k), tile[k]);
    }
  }
  SEER_DEVICE void put(int step, const Tile& tile) {
    if constexpr (!kResident) {
      if (!working_) return;
#pragma unroll
      for (int k = 0; k < kRows; ++k) store(memory_, pack(step, k), tile[k]);
    }
  }

  // For all threads: warps beside each other have parts of the same rows. Two places take turns, so that one barrier is
  // enough: whoever writes to a place again has met everybody who read it.
  SEER_DEVICE T total_over_column_warps(T dot) {
    turn_ ^= 1;
    T* place = exchange_ + (turn_ * grid_.row_warps + row_warp_) * kRows * grid_.column_warps;
    const int row = own_row_ * grid_.column_warps;
    if (working_ && lane() % (kWarp / kRows) == 0) place[row + warp() % grid_.column_warps] = dot;
    barrier();
    T total = 0;
    if (working_) {
#pragma unroll 1
      for (int w = 0; w < grid_.column_warps; ++w) total += place[row + w];
    }
    return total;
  }

  const Grid<T> grid_;
  T *memory_, *partial_, *exchange_;
  Tile tiles_[kResident ? kResidentSteps : 1];
  int row_warp_, first_row_, first_column_, own_row_, turn_ = 0;
  bool working_, owns_;
};

}  // namespace
}  // namespace seer::cuda
