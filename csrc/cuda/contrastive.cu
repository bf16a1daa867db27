#include "../contrastive.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "device.h"
#include "summary.h"

namespace seer::cuda {
namespace {

// Both kernels are bound by memory. Their floors per element: contrastive_rows reads and writes one product, 8 bytes in
// fp32, 4 without a gradient; project_rows reads x and reads and writes the gradient, 12 bytes. So a row waits in
// shared memory between its only read and its only write. A row that does not fit is walked in tiles, of which all but
// the last are read a second time, latest first, while the L2 cache may still hold them.
//
// A row belongs to a team of threads: a warp if it is short, else a block. Its columns come in packs, what one access
// moves: 16 bytes where alignment allows, else single elements. A thread visits the same packs in every pass, so that
// the passes over shared memory need no barrier.
constexpr int kPackBytes = 16;
constexpr int kShortRow = 1024;      // columns
constexpr int kPacksPerThread = 4;   // of a longer row, as long as the block has threads
constexpr int64_t kLimit = 1 << 30;  // of rows, and of columns

// Blocks that must fit on a multiprocessor: one computes while another waits for memory. fp64 needs the registers of
// two.
template <class T>
constexpr int kBlocks = sizeof(T) == 8 ? 1 : 2;

// Calls use(k) for the calling thread's packs k in [0, packs).
template <class Use>
SEER_DEVICE inline void each_pack(int packs, const Use& use) {
#pragma unroll 2
  for (int k = team_thread(); k < packs; k += team_threads()) use(k);
}

// What the threads of a team hold, merged, in each of them. At most once per kernel: nothing guards a second use of
// the shared memory.
template <class Value>
SEER_DEVICE inline Value merge_team(Value value) {
  value = value.merged_over_warp();
  const int warps = team_threads() / kWarp, lane = team_thread() % kWarp;
  if (warps == 1) return value;
  SEER_SHARED(Value, of_warp, kMaxThreads / kWarp);
  static_assert(sizeof(Value) * (kMaxThreads / kWarp) <= kStaticSharedBytes);
  if (lane == 0) of_warp[team_thread() / kWarp] = value;
  barrier();
  value = lane < warps ? of_warp[lane] : Value::empty();
  return value.merged_over_warp();
}

// One query, as its pairs see it.
template <class T>
struct Row {
  int N, M, own, label;
  SameLabel same_label;
  const T* weights;           // of this problem, as the next two
  const T* key_scales;        //
  const int32_t* key_labels;  //
  T scale;                    // a product times this and the key's scale is a logit

  SEER_DEVICE Row(const RowBlock<T>& b, int64_t p, int64_t i)
      : N(int(b.N)),
        M(int(b.M)),
        own(int(i)),
        label(b.query_labels ? b.query_labels[p * b.N + i] : 0),
        same_label(b.same_label),
        weights(b.weights ? b.weights + p * b.N : nullptr),
        key_scales(b.key_scale ? b.key_scale + p * b.M : nullptr),
        key_labels(b.key_labels ? b.key_labels + p * b.M : nullptr),
        scale((b.query_scale ? b.query_scale[p * b.N + i] : T(1)) / *b.temperature) {}

  SEER_DEVICE bool exists() const { return !weights || weights[own] > T(0); }

  template <int kWidth>
  SEER_DEVICE void load_key_scales(int begin, int k, T (&scales)[kWidth]) const {
    if (key_scales) {
      load_constant(key_scales + begin, k, scales);
    } else {
#pragma unroll
      for (int v = 0; v < kWidth; ++v) scales[v] = T(1);
    }
  }

  // The classes of the keys of pack k after column `begin`.
  template <int kWidth>
  SEER_DEVICE void classes(int begin, int k, PairClass<int> (&pairs)[kWidth]) const {
    const int j = begin + k * kWidth;
    int same[kWidth] = {}, absent[kWidth] = {};
    if (key_labels) {
      int32_t labels[kWidth];
      load_constant(key_labels + begin, k, labels);
#pragma unroll
      for (int v = 0; v < kWidth; ++v) same[v] = -int(labels[v] == label);
    }
    if (weights) {
#pragma unroll
      for (int v = 0; v < kWidth; ++v) absent[v] = -int(j + v < N && !(weights[j + v] > T(0)));
    }
#pragma unroll
    for (int v = 0; v < kWidth; ++v) pairs[v] = classify<int>(-int(j + v == own), same[v], ~absent[v], same_label);
  }
};

// A part of a row in shared memory: `packs` packs from column `begin` on.
template <class T, int kWidth>
struct Tile {
  T* cache;
  int begin, packs;

  SEER_DEVICE Tile(T* cache, int begin, int columns, int M)
      : cache(cache), begin(begin), packs((begin + columns < M ? columns : M - begin) / kWidth) {}

  // Reads the logits, kAbsent for keys that are neither positive nor negative; adds all but their exponentials to
  // `summary`.
  SEER_DEVICE void read_logits(const Row<T>& row, const T* products, Summary<T>& summary) const {
    each_pack(packs, [&](int k) { copy_async<kWidth>(cache, products + begin, k); });
    wait_for_copies();
    each_pack(packs, [&](int k) {
      T value[kWidth], key_scale[kWidth];
      PairClass<int> pair[kWidth];
      load(cache, k, value);
      row.load_key_scales(begin, k, key_scale);
      row.classes(begin, k, pair);
#pragma unroll
      for (int v = 0; v < kWidth; ++v) {
        const T logit = value[v] * row.scale * key_scale[v];
        summary.add(logit, pair[v]);
        value[v] = pair[v].positive | pair[v].negative ? logit : kAbsent<T>;
      }
      store(cache, k, value);
    });
  }

  // Turns logits into exponentials relative to `top`, and adds them to `summary`.
  SEER_DEVICE void exponentiate(T top, Summary<T>& summary) const {
    each_pack(packs, [&](int k) {
      T value[kWidth];
      load(cache, k, value);
#pragma unroll
      for (int v = 0; v < kWidth; ++v) {
        const T below = value[v] - top;
        value[v] = std::exp(below);
        summary.total += value[v];
        summary.total_logit += value[v] * below;
      }
      store(cache, k, value);
    });
  }

  // Writes (exponential * factor - target if positive) * slope * key scale over the products.
  SEER_DEVICE void write_gradient(const Row<T>& row, T factor, T target, T slope, T* products) const {
    each_pack(packs, [&](int k) {
      T value[kWidth], key_scale[kWidth];
      PairClass<int> pair[kWidth];
      load(cache, k, value);
      row.load_key_scales(begin, k, key_scale);
      row.classes(begin, k, pair);
#pragma unroll
      for (int v = 0; v < kWidth; ++v) {
        value[v] = (value[v] * factor - (pair[v].positive ? target : T(0))) * slope * key_scale[v];
      }
      store(products + begin, k, value);
    });
  }
};

// One team per row, `columns` of which are in shared memory at a time.
template <class T, int kWidth>
SEER_KERNEL(kBlocks<T>) contrastive_rows_kernel(const RowBlock<T> b, unsigned rows, int columns) {
  const unsigned r = block_index() * team_count() + team_index();
  if (r >= rows) return;
  const int64_t p = b.first_problem + r / unsigned(b.row_count), i = b.first_row + r % unsigned(b.row_count);
  const Row<T> row(b, p, i);
  T* products = b.products + r * b.M;
  T* cache = dynamic_shared<T>() + team_index() * columns;
  const int last = (row.M - 1) / columns * columns;

  Summary<T> mine = Summary<T>::empty();
  if (row.exists()) {
    for (int begin = 0; begin <= last; begin += columns) {
      const Tile<T, kWidth> tile(cache, begin, columns, row.M);
      const T reference = mine.top();
      tile.read_logits(row, products, mine);
      mine.restate(reference);
      tile.exponentiate(mine.top(), mine);
    }
  }
  const Summary<T> all = merge_team(mine);

  const bool valid = all.positives > 0;
  const T top = all.top(), row_gradient = b.row_gradient[p * b.N + i];
  if (team_thread() == 0) {
    T planes[kLogitSum];  // the last plane is of the sigmoid loss: left as it is
    all.results(*b.temperature, row_gradient, planes);
#pragma unroll
    for (int which = 0; which < kLogitSum; ++which) b.rows[(which * b.P + p) * b.N + i] = planes[which];
  }
  if (!b.write_gradient) return;

  if (!valid) {
    const T zeros[kWidth] = {};
    each_pack(row.M / kWidth, [&](int k) { store(products, k, zeros); });
    return;
  }
  // The exponentials are relative to this thread's own top.
  const T factor = std::exp(mine.top() - top) / all.total, target = T(1) / T(all.positives);
  const T slope = row_gradient * row.scale;
  for (int begin = last; begin >= 0; begin -= columns) {
    const Tile<T, kWidth> tile(cache, begin, columns, row.M);
    if (begin != last) {
      Summary<T> unused = Summary<T>::empty();
      tile.read_logits(row, products, unused);
      tile.exponentiate(mine.top(), unused);
    }
    tile.write_gradient(row, factor, target, slope, products);
  }
}

// A share of an inner product.
template <class T>
struct Dot {
  T value;
  SEER_DEVICE static Dot empty() { return {0}; }
  SEER_DEVICE Dot merged_over_warp() const { return {warp_sum(value)}; }
};

// One team per row, `columns` of which are in shared memory at a time: of the gradient, then of x.
template <class T, int kWidth>
SEER_KERNEL(kBlocks<T>) project_rows_kernel(T* gradient, const T* x, const T* inverse_norm, unsigned rows, int D,
                                            int columns) {
  const unsigned r = block_index() * team_count() + team_index();
  if (r >= rows) return;
  gradient += int64_t(r) * D;
  x += int64_t(r) * D;
  T* cached_gradient = dynamic_shared<T>() + 2 * team_index() * columns;
  T* cached_x = cached_gradient + columns;
  const int last = (D - 1) / columns * columns;

  Dot<T> dot = Dot<T>::empty();
  const auto packs = [&](int begin) { return (begin == last ? D - begin : columns) / kWidth; };
  const auto read = [&](int begin) {
    each_pack(packs(begin), [&](int k) {
      copy_async<kWidth>(cached_gradient, gradient + begin, k);
      copy_async<kWidth>(cached_x, x + begin, k);
    });
    wait_for_copies();
  };
  for (int begin = 0; begin <= last; begin += columns) {
    read(begin);
    each_pack(packs(begin), [&](int k) {
      T g[kWidth], u[kWidth];
      load(cached_gradient, k, g);
      load(cached_x, k, u);
#pragma unroll
      for (int v = 0; v < kWidth; ++v) dot.value += g[v] * u[v];
    });
  }
  const T along = merge_team(dot).value * inverse_norm[r] * inverse_norm[r];
  for (int begin = last; begin >= 0; begin -= columns) {
    if (begin != last) read(begin);
    each_pack(packs(begin), [&](int k) {
      T g[kWidth], u[kWidth];
      load(cached_gradient, k, g);
      load(cached_x, k, u);
#pragma unroll
      for (int v = 0; v < kWidth; ++v) g[v] -= along * u[v];
      store(gradient + begin, k, g);
    });
  }
}

constexpr int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// How rows are divided among blocks, teams and tiles.
struct Plan {
  int64_t blocks;
  int teams, threads;  // per block, per team
  int columns;         // of a tile
  int shared_bytes;    // per block

  // Rows of `length` columns, of which each takes `column_bytes` of shared memory and kPackBytes hold `width`.
  Plan(const char* kernel, Place place, int64_t rows, int64_t length, int column_bytes, int width) {
    if (rows > kLimit || length > kLimit) {
      throw std::invalid_argument(std::string(kernel) + ": at most 2^30 rows of 2^30 columns; got " +
                                  std::to_string(rows) + " of " + std::to_string(length));
    }
    const int warp_columns = kWarp * kPacksPerThread * width;
    const int64_t warps = length <= kShortRow ? 1 : (length + warp_columns - 1) / warp_columns;
    threads = int(std::min<int64_t>(warps * kWarp, kMaxThreads));
    // Short rows share a block once there are enough of them to occupy every multiprocessor.
    teams = threads == kWarp ? int(std::clamp<int64_t>(rows / 512, 1, 4)) : 1;
    blocks = (rows + teams - 1) / teams;
    const int64_t room = shared_memory_of_half_a_multiprocessor(kernel, place) - kStaticSharedBytes;
    columns = int(std::min<int64_t>(round_up(length, width), room / column_bytes / width * width));
    shared_bytes = teams * columns * column_bytes;
  }
};

template <class T>
bool aligned(const T* pointer, int width) {
  return reinterpret_cast<std::uintptr_t>(pointer) % (width * sizeof(T)) == 0;
}

}  // namespace

template <class T>
void contrastive_rows(const RowBlock<T>& b, int device, std::uintptr_t stream) {
  constexpr int kWidth = kPackBytes / int(sizeof(T));
  const Place place{device, stream};
  const int64_t rows = b.problem_count * b.row_count;
  if (rows == 0) return;
  const Plan plan("contrastive_rows", place, rows, b.M, sizeof(T), kWidth);
  const bool packs = b.M % kWidth == 0 && aligned(b.products, kWidth) && aligned(b.key_scale, kWidth) &&
                     aligned(b.key_labels, kWidth);
  launch("contrastive_rows", packs ? contrastive_rows_kernel<T, kWidth> : contrastive_rows_kernel<T, 1>, place,
         plan.blocks, plan.teams, plan.threads, plan.shared_bytes, b, unsigned(rows), plan.columns);
}

template <class T>
void project_rows(T* gradient, const T* x, const T* inverse_norm, int64_t rows, int64_t D, int device,
                  std::uintptr_t stream) {
  constexpr int kWidth = kPackBytes / int(sizeof(T));
  const Place place{device, stream};
  if (rows == 0 || D == 0) return;
  const Plan plan("project_rows", place, rows, D, 2 * sizeof(T), kWidth);
  const bool packs = D % kWidth == 0 && aligned(gradient, kWidth) && aligned(x, kWidth);
  launch("project_rows", packs ? project_rows_kernel<T, kWidth> : project_rows_kernel<T, 1>, place, plan.blocks,
         plan.teams, plan.threads, plan.shared_bytes, gradient, x, inverse_norm, unsigned(rows), int(D), plan.columns);
}

template void contrastive_rows(const RowBlock<float>&, int, std::uintptr_t);
template void contrastive_rows(const RowBlock<double>&, int, std::uintptr_t);
template void project_rows(float*, const float*, const float*, int64_t, int64_t, int, std::uintptr_t);
template void project_rows(double*, const double*, const double*, int64_t, int64_t, int, std::uintptr_t);

}  // namespace seer::cuda
