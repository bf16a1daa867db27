// One transport problem on one team. Rows are padded to blocks of kRows and columns to whole cache lines by copies of
// the last row and column with weight 0, so that no loop has a tail and no sum is empty.

constexpr int kRows = kBlockRows;

// e^x within the range of exponents; anything below, and NaN, counts as the smallest.
template <class T, class V>
inline V exp_bounded(V x) {
  x = x > Limits<T>::kLowExponent ? x : V{} + Limits<T>::kLowExponent;
  x = x < Limits<T>::kTopExponent ? x : V{} + Limits<T>::kTopExponent;
  const V y = exp_nonpositive(x);  // its range reduction holds above 0 as well
  return x > Limits<T>::kLowExponent ? y : V{};
}

// log x for normal x > 0: of the exponent and, as log1p, of the mantissa in [1, 2).
inline typename Simd<float>::V log_positive(typename Simd<float>::V x) {
  typedef Simd<float>::V V;
  typedef Simd<float>::I I;
  I bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  const I exponent = (bits >> 23) - 127;
  bits = (bits & 0x7fffff) | 0x3f800000;
  V mantissa;
  __builtin_memcpy(&mantissa, &bits, sizeof bits);
  return log1p_unit(mantissa - 1.0f) + __builtin_convertvector(exponent, V) * 0.693147181f;
}

inline typename Simd<double>::V log_positive(typename Simd<double>::V x) {
  for (int l = 0; l < Simd<double>::kLanes; ++l) x[l] = std::log(x[l]);
  return x;
}

// Sums of neighbouring lanes, those of x before those of y.
template <class V>
inline V add_neighbours(V x, V y) {
  constexpr int kLanes = sizeof(V) / sizeof(x[0]);
  if constexpr (kLanes == 2) {
    return __builtin_shufflevector(x, y, 0, 2) + __builtin_shufflevector(x, y, 1, 3);
  } else if constexpr (kLanes == 4) {
    return __builtin_shufflevector(x, y, 0, 2, 4, 6) + __builtin_shufflevector(x, y, 1, 3, 5, 7);
  } else if constexpr (kLanes == 8) {
    return __builtin_shufflevector(x, y, 0, 2, 4, 6, 8, 10, 12, 14) +
           __builtin_shufflevector(x, y, 1, 3, 5, 7, 9, 11, 13, 15);
  } else {
    return __builtin_shufflevector(x, y, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           __builtin_shufflevector(x, y, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  }
}

// One number per row of a block.
template <class T>
struct Block {
  typedef T R __attribute__((vector_size(kRows * sizeof(T))));
};

// Half of the lanes, from lane kFirst on.
template <int kFirst, class V>
inline auto half_of(V v) {
  constexpr int kLanes = sizeof(V) / sizeof(v[0]), f = kFirst;
  if constexpr (kLanes == 2) {
    return v[f];
  } else if constexpr (kLanes == 4) {
    return __builtin_shufflevector(v, v, f, f + 1);
  } else if constexpr (kLanes == 8) {
    return __builtin_shufflevector(v, v, f, f + 1, f + 2, f + 3);
  } else {
    return __builtin_shufflevector(v, v, f, f + 1, f + 2, f + 3, f + 4, f + 5, f + 6, f + 7);
  }
}

// The sum of all lanes, in a few steps rather than lane by lane.
template <class V>
inline auto sum_all(V v) {
  constexpr int kLanes = sizeof(V) / sizeof(v[0]);
  const auto half = half_of<0>(v) + half_of<kLanes / 2>(v);
  if constexpr (kLanes == 2) {
    return half;
  } else {
    return sum_all(half);
  }
}

template <class T, class V>
inline T max_all(V v) {
  constexpr int kHalf = sizeof(V) / sizeof(T) / 2;
  T halves[2 * kHalf];
  __builtin_memcpy(halves, &v, sizeof v);
  for (int width = kHalf; width > 0; width /= 2) {
    for (int l = 0; l < width; ++l) halves[l] = halves[l] < halves[l + width] ? halves[l + width] : halves[l];
  }
  return halves[0];
}

// Sums of the lanes of kRows vectors.
template <class T, class V>
inline typename Block<T>::R sum_each(V (&v)[kRows]) {
  static_assert(kRows == 8);
  constexpr int kLanes = Simd<T>::kLanes;
  typename Block<T>::R sums;
  // Written out: arrays indexed by variables would leave the registers.
  v[0] = add_neighbours(v[0], v[1]);
  v[1] = add_neighbours(v[2], v[3]);
  v[2] = add_neighbours(v[4], v[5]);
  v[3] = add_neighbours(v[6], v[7]);
  if constexpr (kLanes >= 4) {
    v[0] = add_neighbours(v[0], v[1]);
    v[1] = add_neighbours(v[2], v[3]);
  }
  if constexpr (kLanes >= 8) v[0] = add_neighbours(v[0], v[1]);
  if constexpr (kLanes >= 16) v[0] = add_neighbours(v[0], v[0]);
  __builtin_memcpy(&sums, v, sizeof sums);
  return sums;
}

// One read of the matrix for a row update and the column sums that follow from it: `row(i, sums)` gets the products of
// rows i to i + kRows - 1 with `beta` and says by how much each row counts in `columns`. The rows are still in the L1
// cache when they are added.
template <class T, class Row>
inline void sweep(const T* matrix, int64_t width, int64_t begin, int64_t end, const T* beta, T* columns,
                  const Row& row) {
  using V = typename Simd<T>::V;
  constexpr int kLanes = Simd<T>::kLanes;
  if (begin >= end) {
    for (int64_t j = 0; j < width; ++j) columns[j] = T(0);
    return;
  }
  for (int64_t i = begin; i < end; i += kRows) {
    const T* block = matrix + i * width;
    V dots[kRows] = {};
    for (int64_t j = 0; j < width; j += kLanes) {
      const V weight = load<V>(beta + j);
#pragma GCC unroll 8
      for (int k = 0; k < kRows; ++k) dots[k] += load<V>(block + k * width + j) * weight;
    }
    const typename Block<T>::R chosen = row(i, sum_each<T>(dots));
    T scales[kRows];
    __builtin_memcpy(scales, &chosen, sizeof scales);
    for (int64_t j = 0; j < width; j += kLanes) {
      V even = i == begin ? V{} : load<V>(columns + j), odd = {};
#pragma GCC unroll 8
      for (int k = 0; k < kRows; k += 2) {
        even += load<V>(block + k * width + j) * scales[k];
        odd += load<V>(block + (k + 1) * width + j) * scales[k + 1];
      }
      store_first(columns + j, even + odd, kLanes);
    }
  }
}

// For each vector of columns, take(j, sums) with the sums over k < count of weights[k] times row k of the matrix. Reads
// up to 3 rows and weights more.
template <class T, class Take>
inline void weighted_rows(const T* matrix, int64_t width, int64_t count, const T* weights, const Take& take) {
  using V = typename Simd<T>::V;
  for (int64_t j = 0; j < width; j += Simd<T>::kLanes) {
    V parts[4] = {};  // so many sums are under way at a time
    for (int64_t k = 0; k < count; k += 4) {
#pragma GCC unroll 4
      for (int l = 0; l < 4; ++l) parts[l] += load<V>(matrix + (k + l) * width + j) * weights[k + l];
    }
    take(j, (parts[0] + parts[1]) + (parts[2] + parts[3]));
  }
}

template <class T>
class Solver {
  using V = typename Simd<T>::V;
  using R = typename Block<T>::R;
  using L = Limits<T>;
  static constexpr int kLanes = Simd<T>::kLanes;

 public:
  Solver(const Transport<T>& t, const Stopping& s, const Potentials<T>& out, int64_t p, const Workspace<T>& w,
         const Team& team)
      : t_(t), s_(s), out_(out), w_(w), team_(team), p_(p) {
    n_ = t.x_lengths ? t.x_lengths[p] : t.n;
    m_ = t.y_lengths ? t.y_lengths[p] : t.m;
    const int64_t block = w.transposed ? kLine : kRows;
    rows_ = (n_ + block - 1) / block * block;
    width_ = (m_ + kLine - 1) / kLine * kLine;
    first_row_ = team.begin(rows_, kRows);
    last_row_ = team.end(rows_, kRows);
    real_row_ = last_row_ < n_ ? last_row_ : n_;
    first_column_ = team.begin(width_, kLine);
    last_column_ = team.end(width_, kLine);
    columns_ = w.columns + team.rank * w.stride;
    cost_ = t.cost + p * t.n * t.m;
    costs_end_ = t.cost + t.B * t.n * t.m;
    relaxed_a_ = t.tau_a < kInfinity;
    relaxed_b_ = t.tau_b < kInfinity;
  }

  // False where there is nothing to solve.
  bool begin() {
    load_weights();
    if (!inspect()) return false;
    restart(now_);
    return true;
  }

  // An iteration; false after the last, with the results written.
  bool step() {
    if (iteration_ >= s_.max_iterations) return finish();
    ++iteration_;
    if (!iterate()) {
      restart(now_);  // from the scalings before
      return true;
    }
    accept();
    if (now_ > target_) {
      if (within(s_.until) && iteration_ < s_.max_iterations) {
        const T last = now_;
        now_ = now_ * T(s_.factor) > target_ ? now_ * T(s_.factor) : target_;
        ++iteration_;
        restart(last);
        return true;
      }
      if (within(s_.until)) return true;
    } else if (within(s_.tolerance)) {
      return finish();
    }
    if ((relaxed_a_ || relaxed_b_) && iteration_ < s_.max_iterations) shift();
    return true;
  }

 private:
  static constexpr double kInfinity = __builtin_inf();

  // Weights, padded.
  void load_weights() {
    const T* a = t_.a + p_ * t_.n;
    const T* b = t_.b + p_ * t_.m;
    for (int64_t i = first_row_; i < last_row_; ++i) {
      w_.a[i] = i < n_ ? a[i] : T(0);
      mass_a_ += w_.a[i];
    }
    mass_a_ = share(mass_a_);
    for (int64_t j = first_column_; j < last_column_; ++j) w_.b[j] = j < m_ ? b[j] : T(0);
    for (int64_t j = first_column_; j < last_column_; j += kLanes) {
      const V weight = load<V>(w_.b + j);
      store_first(w_.log_b + j, weight > 0 ? log_positive(weight) : V{} + L::kAbsentLog, kLanes);
      store_first(w_.g + j, V{}, kLanes);
      store_first(w_.v + j, V{} + T(1), kLanes);
    }
  }

  // Scale, spread and usability of the costs, and with them the first and the last eps. False: unusable.
  bool inspect() {
    V low = V{} + L::kHuge, high = V{} - L::kHuge, outside = {};
    double total = 0;
    for (int64_t i = first_row_; i < real_row_; ++i) {
      const T* c = cost_ + i * t_.m;
      V sum = {};
      each_cost(c, [&](int64_t, V x, auto exists) {
        const V known = exists(x, V{} + c[0]);
        low = known < low ? known : low;
        high = known > high ? known : high;
        outside = ((known < L::kHuge) & (known > -L::kHuge)) ? outside : V{} + T(1);
        sum += x;
      });
      total += sum_all(sum);
    }
    const T lowest = -max_all<T>(-low), highest = max_all<T>(high);
    const double sums = share(total), bad = share(sum_all(outside));
    const T smallest = T(-share_max(-lowest)), largest = T(share_max(highest));
    if (team_.rank == 0) out_.usable[p_] = bad == 0;
    T scale = T(1);
    if (t_.scale_cost == CostScale::kMean) scale = T(sums / (double(n_) * double(m_)));
    if (t_.scale_cost == CostScale::kMax) scale = largest;
    if (scale == T(0)) scale = T(1);
    if (team_.rank == 0) out_.scale[p_] = scale;
    if (bad != 0 || !(scale > 0)) return false;
    inverse_scale_ = T(1) / scale;
    const T magnitude = (largest > -smallest ? largest : -smallest) * inverse_scale_;
    const T spread = (largest - smallest) * inverse_scale_, floor = magnitude / L::kRootOfMax;
    eps_ = t_.eps[p_];
    // Below the floor exponents overflow: such a problem is solved at the floor, and reported as not converged.
    target_ = eps_ > floor ? eps_ : floor;
    now_ = spread > T(s_.above) * target_ ? T(spread / s_.start) : target_;
    return true;
  }

  // Calls body(j, costs, exists) on the entries of a row of costs, with zeros past its end; exists(x, y) is y there.
  template <class Body>
  void each_cost(const T* c, const Body& body) const {
    int64_t j = 0;
    for (; j + kLanes <= m_; j += kLanes) body(j, load<V>(c + j), [](V x, V) { return x; });
    if (j == m_) return;
    const auto inside = lane_indices<T>(0) < typename Simd<T>::Lane(m_ - j);
    // Reading on is allowed where more costs follow: a copy of a few lanes takes longer.
    const V x = c + j + kLanes <= costs_end_ ? load<V>(c + j) : load_first<V>(c + j, m_ - j);
    body(j, inside ? x : V{}, [inside](V known, V other) { return inside ? known : other; });
  }

  // Sum, or maximum, of one number per member.
  double share(double mine) {
    if (team_.size == 1) return mine;
    double total = 0;
    gather(mine, [&](double x) { total += x; });
    return total;
  }
  double share_max(double mine) {
    if (team_.size == 1) return mine;
    double top = mine;
    gather(mine, [&](double x) { top = x > top ? x : top; });
    return top;
  }
  template <class Take>
  void gather(double mine, const Take& take) {
    slots_ ^= 1;  // a member may still be reading the numbers before
    double* slots = w_.slots + slots_ * kSlots * team_.size;
    slots[team_.rank] = mine;
    team_.sync();
    for (int r = 0; r < team_.size; ++r) take(slots[r]);
  }

  // Makes each column of this member the combination of all members' partial ones.
  template <class Combine>
  void combine_columns(const Combine& combine) {
    if (team_.size == 1) return;
    for (int64_t j = first_column_; j < last_column_; j += kLanes) {
      V x = load<V>(w_.columns + j);
      for (int r = 1; r < team_.size; ++r) x = combine(x, load<V>(w_.columns + r * w_.stride + j));
      store_first(w_.columns + j, x, kLanes);
    }
  }

  // An iteration in the logarithmic domain at now_, from g, which scales v at eps `last`, alone; then the kernel between
  // the new potentials, whose scalings are 1. Two exponentials per entry.
  void restart(T last) {
    const T inverse = T(1) / now_, cost_factor = inverse_scale_ * inverse;
    for (int64_t j = first_column_; j < last_column_; j += kLanes) {
      const V g = load<V>(w_.g + j) + log_positive(load<V>(w_.v + j)) * last;
      store_first(w_.beta + j, load<V>(w_.log_b + j) + g * inverse, kLanes);
    }
    team_.sync();
    V none = V{} + L::kAbsentLog;
    for (int64_t j = 0; j < width_; j += kLanes) store_first(columns_ + j, none, kLanes);
    const T share_a = relaxed_a_ ? T(t_.tau_a / (t_.tau_a + now_)) : T(1);
    for (int64_t i = first_row_; i < real_row_; ++i) {
      const T* c = cost_ + i * t_.m;
      V top = none;
      each_cost(c, [&](int64_t j, V x, auto) { top = max(top, load<V>(w_.beta + j) - x * cost_factor); });
      const T highest = max_all<T>(top);
      V total = {};
      each_cost(c, [&](int64_t j, V x, auto) {
        total += exp_bounded<T>(load<V>(w_.beta + j) - x * cost_factor - highest);
      });
      w_.f[i] = highest;
      w_.u[i] = sum_all(total);
    }
    each_chunk<T>(real_row_ - first_row_, [&](int64_t i, auto count) {
      T* f = w_.f + first_row_ + i;
      const V log_sum = load_first<V>(f, count) + log_positive(load_first<V>(w_.u + first_row_ + i, count));
      store_first(f, log_sum * (-share_a * now_), count);
    });
    for (int64_t i = first_row_; i < real_row_; ++i) {
      if (!(w_.a[i] > 0)) continue;
      const T level = w_.f[i] * inverse;
      each_cost(cost_ + i * t_.m, [&](int64_t j, V x, auto) {
        store_first(columns_ + j, max(load<V>(columns_ + j), level - x * cost_factor), kLanes);
      });
    }
    team_.sync();
    combine_columns([](V x, V y) { return max(x, y); });
    for (int64_t j = first_column_; j < last_column_; j += kLanes) {
      store_first(w_.top + j, load<V>(w_.columns + j), kLanes);
    }
    team_.sync();
    for (int64_t j = 0; j < width_; j += kLanes) store_first(columns_ + j, V{}, kLanes);
    for (int64_t i = first_row_; i < real_row_; ++i) {
      T* k = w_.kernel + i * width_;
      const T level = w_.f[i] * inverse, weight = w_.a[i];
      each_cost(cost_ + i * t_.m, [&](int64_t j, V x, auto) {
        const V e = exp_bounded<T>(level - x * cost_factor - load<V>(w_.top + j));
        store_first(k + j, e, kLanes);
        store_first(columns_ + j, load<V>(columns_ + j) + e * weight, kLanes);
      });
    }
    team_.sync();
    combine_columns([](V x, V y) { return x + y; });
    const T share_b = relaxed_b_ ? T(t_.tau_b / (t_.tau_b + now_)) : T(1);
    for (int64_t j = first_column_; j < last_column_; j += kLanes) {
      const V top = load<V>(w_.top + j);
      const V log_sum = top + log_positive(load<V>(w_.columns + j) + L::kTiny);
      store_first(w_.g + j, log_sum * (-share_b * now_), kLanes);
      store_first(w_.top + j, exp_bounded<T>(top - log_sum * share_b), kLanes);
      store_first(w_.v + j, V{} + T(1), kLanes);
      store_first(w_.beta + j, load<V>(w_.b + j), kLanes);
    }
    if (first_column_ < last_column_ && last_column_ == width_) {
      for (int64_t j = m_; j < width_; ++j) w_.g[j] = w_.g[m_ - 1];
    }
    team_.sync();
    for (int64_t i = first_row_; i < last_row_; ++i) {
      T* k = w_.kernel + i * width_;
      w_.u[i] = T(1);
      if (i >= n_) {
        __builtin_memcpy(k, w_.kernel + (n_ - 1) * width_, width_ * sizeof(T));
        w_.f[i] = w_.f[n_ - 1];
        continue;
      }
      for (int64_t j = 0; j < width_; j += kLanes) store_first(k + j, load<V>(k + j) * load<V>(w_.top + j), kLanes);
      for (int64_t j = m_; j < width_; ++j) k[j] = k[m_ - 1];
    }
    if (w_.transposed) {
      for (int64_t i = 0; i < rows_; ++i) {
        for (int64_t j = 0; j < width_; ++j) w_.transposed[j * rows_ + i] = w_.kernel[i * width_ + j];
      }
    }
    carry_ = T(1);
    team_.sync();
  }

  bool iterate() {
    const bool relaxed = relaxed_a_ || relaxed_b_;
    if (w_.transposed) return relaxed ? iterate<true, true>() : iterate<false, true>();
    return relaxed ? iterate<true, false>() : iterate<false, false>();
  }

  // One iteration. False where a scaling left its range, and the iteration must not be used. A small kernel lies in the
  // L1 cache together with its transpose, so that no sum runs across lanes; else it is read once.
  template <bool kRelaxed, bool kSmall>
  bool iterate() {
    using Rows = std::conditional_t<kSmall, V, R>;
    constexpr int kCount = sizeof(Rows) / sizeof(T);
    const Workspace<T> w = w_;  // a copy: for all the compiler knows, stores change the members
    const T carry = carry_, lowest = T(1) / L::kScaling, highest = L::kScaling;
    const T share_a = relaxed_a_ ? T(t_.tau_a / (t_.tau_a + now_)) : T(1);
    const T rate_a = relaxed_a_ ? T(1 / (t_.tau_a + now_)) : T(0);
    const T share_b = relaxed_b_ ? T(t_.tau_b / (t_.tau_b + now_)) : T(1);
    const T rate_b = relaxed_b_ ? T(1 / (t_.tau_b + now_)) : T(0);
    Rows off = {}, mass_a = {};  // infinite where a scaling is outside
    V outside = {}, mass_b = {};
    const auto update_rows = [&](int64_t i, Rows sums) {
      const Rows a = load<Rows>(w.a + i);
      Rows next;
      if constexpr (kRelaxed) {
        T products[kCount], scalings[kCount + kLanes];
        __builtin_memcpy(products, &sums, sizeof products);
        for (int k = 0; k < kCount; k += kLanes) {
          const V x = load_first<V>(products + k, kCount - k);
          const V safe = x > L::kTiny ? x : V{} + L::kTiny;
          const V y = exp_bounded<T>(-log_positive(safe) * share_a - load_first<V>(w.f + i + k, kCount - k) * rate_a);
          store_first(scalings + k, y, kLanes);
        }
        next = load<Rows>(scalings);
      } else {
        next = T(1) / sums;
      }
      const Rows difference = load<Rows>(w.u + i) * carry - next, weighted = a * sums;
      const Rows distance = weighted * (difference < 0 ? -difference : difference);
      off += ((next > lowest) & (next < highest)) ? distance : Rows{} + T(kInfinity);
      if constexpr (kRelaxed) mass_a += weighted * next;
      store_first(w.u + i, next, kCount);
      return a * next;
    };
    const auto update_columns = [&](int64_t j, V sums) {
      V next;
      if constexpr (kRelaxed) {
        const V safe = sums > L::kTiny ? sums : V{} + L::kTiny;
        next = exp_bounded<T>(-log_positive(safe) * share_b - load<V>(w.g + j) * rate_b);
      } else {
        next = T(1) / sums;
      }
      outside = ((next > lowest) & (next < highest)) ? outside : V{} + T(kInfinity);
      const V beta = load<V>(w.b + j) * next;
      if constexpr (kRelaxed) mass_b += beta * sums;
      store_first(w.next_v + j, next, kLanes);
      store_first(w.beta + j, beta, kLanes);
    };
    if constexpr (kSmall) {
      weighted_rows(w.transposed, rows_, m_, w.beta, [&](int64_t i, V sums) {
        store_first(w.scales + i, update_rows(i, sums), kLanes);
      });
      weighted_rows(w.kernel, width_, n_, w.scales, update_columns);
    } else {
      sweep(w.kernel, width_, first_row_, last_row_, w.beta, columns_, update_rows);
      team_.sync();
      combine_columns([](V x, V y) { return x + y; });
      for (int64_t j = first_column_; j < last_column_; j += kLanes) update_columns(j, load<V>(w.columns + j));
    }
    off_ = double(sum_all(off) + sum_all(outside));
    if constexpr (kRelaxed) {
      mass_a_ = double(sum_all(mass_a));
      mass_b_ = double(sum_all(mass_b));
    }
    if (team_.size > 1) {
      slots_ ^= 1;
      double* slots = w.slots + slots_ * kSlots * team_.size;
      const double mine[kSlots] = {off_, mass_a_, mass_b_};
      for (int s = 0; s < kSlots; ++s) slots[team_.rank * kSlots + s] = mine[s];
      team_.sync();
      off_ = mass_b_ = 0;
      if constexpr (kRelaxed) mass_a_ = 0;
      for (int r = 0; r < team_.size; ++r) {
        off_ += slots[r * kSlots];
        if constexpr (kRelaxed) mass_a_ += slots[r * kSlots + 1];
        mass_b_ += slots[r * kSlots + 2];
      }
    }
    return off_ < kInfinity;
  }

  // Whether the marginal error of the last iteration is below a tolerance.
  bool within(double tolerance) const { return off_ < tolerance * mass_a_; }

  // The scalings of the columns are the new ones.
  void accept() {
    carry_ = T(1);
    T* next = w_.next_v;
    w_.next_v = w_.v;
    w_.v = next;
  }

  // Moves mass between the potentials of relaxed marginals as far as the dual objective rises, which alternating updates
  // do slowly. Scalings of the rows are not touched, but `carry_` says by how much they are to be read larger.
  void shift() {
    const double step = std::log(mass_a_ / mass_b_) / (1 / t_.tau_a + 1 / t_.tau_b) / now_;
    if (!(step < 10 && step > -10)) return;
    carry_ = T(std::exp(step));
    const T factor = T(std::exp(-step));
    for (int64_t j = first_column_; j < last_column_; j += kLanes) {
      store_first(w_.v + j, load<V>(w_.v + j) * factor, kLanes);
      store_first(w_.beta + j, load<V>(w_.beta + j) * factor, kLanes);
    }
    team_.sync();
  }

  // Writes the results; false, as nothing is left to do.
  bool finish() {
    const T tau_a = T(t_.tau_a);
    double off = 0, wanted = 0, spent = 0, moved = 0;
    T* f_out = out_.f + p_ * t_.n;
    T* g_out = out_.g + p_ * t_.m;
    each_chunk<T>(real_row_ - first_row_, [&](int64_t i, auto count) {
      const V u = load_first<V>(w_.u + first_row_ + i, count) * carry_;
      const V f = load_first<V>(w_.f + first_row_ + i, count) + log_positive(u) * now_;
      store_first(f_out + first_row_ + i, f, count);
    });
    each_chunk<T>((last_column_ < m_ ? last_column_ : m_) - first_column_, [&](int64_t j, auto count) {
      const V g = load<V>(w_.g + first_column_ + j) + log_positive(load<V>(w_.v + first_column_ + j)) * now_;
      store_first(g_out + first_column_ + j, g, count);
    });
    for (int64_t i = first_row_; i < real_row_; ++i) {
      const T* k = w_.kernel + i * width_;
      V sum = {}, costs = {};
      each_cost(cost_ + i * t_.m, [&](int64_t j, V x, auto) {  // past the end beta is 0
        const V share = load<V>(k + j) * load<V>(w_.beta + j);
        sum += share;
        costs += share * x;
      });
      const T u = w_.u[i] * carry_, f = f_out[i];
      const double weight = double(w_.a[i]) * double(u), row = weight * double(sum_all(sum));
      const double target = relaxed_a_ ? w_.a[i] * std::exp(-double(f) / tau_a) : double(w_.a[i]);
      off += std::fabs(row - target);
      wanted += target;
      moved += row;
      spent += weight * double(sum_all(costs));
    }
    off = share(off);
    wanted = share(wanted);
    moved = share(moved);
    spent = share(spent);
    if (team_.rank > 0) return false;
    double a_mass = 0, b_mass = 0, f_part = 0, g_part = 0;
    for (int64_t i = 0; i < n_; ++i) {
      a_mass += w_.a[i];
      f_part += double(w_.a[i]) * marginal_slope(f_out[i], t_.tau_a);
    }
    for (int64_t j = 0; j < m_; ++j) {
      b_mass += w_.b[j];
      g_part += double(w_.b[j]) * marginal_slope(g_out[j], t_.tau_b);
    }
    const T between = relaxed_a_ || relaxed_b_ ? T(0) : T((g_part - f_part) / (2 * a_mass));
    for (int64_t i = 0; i < t_.n; ++i) f_out[i] = i < n_ ? f_out[i] + between : T(0);
    for (int64_t j = 0; j < t_.m; ++j) g_out[j] = j < m_ ? g_out[j] - between : T(0);
    const double error = off / wanted;
    out_.value[p_] = T(f_part + g_part - double(now_) * (moved - a_mass * b_mass));
    out_.transport_cost[p_] = T(spent * double(inverse_scale_));
    out_.marginal_error[p_] = error < L::kHuge ? T(error) : T(kInfinity);
    out_.iterations[p_] = int32_t(iteration_);
    out_.converged[p_] = error <= s_.tolerance && now_ == eps_;
    return false;
  }

  static double marginal_slope(T potential, double tau) {
    return tau < kInfinity ? -tau * std::expm1(-double(potential) / tau) : double(potential);
  }

  static constexpr int64_t kLine = 64 / sizeof(T);

  const Transport<T>& t_;
  const Stopping& s_;
  const Potentials<T>& out_;
  Workspace<T> w_;
  const Team team_;
  const int64_t p_;
  int64_t iteration_ = 1;
  const T *cost_, *costs_end_;
  T* columns_;
  int64_t n_, m_, rows_, width_, first_row_, last_row_, real_row_, first_column_, last_column_;
  bool relaxed_a_, relaxed_b_;
  int slots_ = 0;
  T inverse_scale_ = 1, eps_ = 1, target_ = 1, now_ = 1, carry_ = 1;
  double off_ = 0, mass_a_ = 0, mass_b_ = 0;
};

template <class T>
void solve_problem(const Transport<T>& t, const Stopping& s, const Potentials<T>& out, int64_t p,
                   const Workspace<T>& w, const Team& team) {
  Solver<T> solver(t, s, out, p, w, team);
  bool more = solver.begin();
  while (more) more = solver.step();
}

// The problems that `next` gives out, up to kTurns at a time on one core, in turns of an iteration. An iteration of a
// small problem is a chain of dependent steps; the core overlaps the chains of different problems by itself.
template <class T, class Next>
void solve_in_turns(const Transport<T>& t, const Stopping& s, const Potentials<T>& out, Next& next,
                    const Workspace<T> (&w)[kTurns]) {
  std::optional<Solver<T>> solvers[kTurns];
  const auto refill = [&](int k) {
    for (int64_t p = next(); p < t.B; p = next()) {
      if (solvers[k].emplace(t, s, out, p, w[k], Team{0, 1, nullptr}).begin()) return true;
    }
    solvers[k].reset();
    return false;
  };
  int busy = 0;
  for (int k = 0; k < kTurns; ++k) busy += refill(k);
  while (busy > 0) {
    for (int k = 0; k < kTurns; ++k) {
      if (solvers[k] && !solvers[k]->step()) busy -= !refill(k);
    }
  }
}

// The gradient of one problem, on one core. E_ij = exp((f_i + g_j - C_ij) / eps), so that P_ij = a_i b_j E_ij.
template <class T>
class Differentiator {
  using V = typename Simd<T>::V;
  using R = typename Block<T>::R;
  static constexpr int kLanes = Simd<T>::kLanes;

 public:
  Differentiator(const Transport<T>& t, const Potentials<T>& at, const TransportGradient<T>& d, int64_t p,
                 const Workspace<T>& w)
      : t_(t), d_(d), w_(w), p_(p), eps_(t.eps[p]), scale_(at.scale[p]) {
    n_ = t.x_lengths ? t.x_lengths[p] : t.n;
    m_ = t.y_lengths ? t.y_lengths[p] : t.m;
    rows_ = (n_ + kRows - 1) / kRows * kRows;
    width_ = (m_ + kLine - 1) / kLine * kLine;
    cost_ = t.cost + p * t.n * t.m;
    f_ = at.f + p * t.n;
    g_ = at.g + p * t.m;
    value_ = d.value ? d.value[p] : T(0);
    spent_ = d.transport_cost ? d.transport_cost[p] : T(0);
  }

  void run() {
    form_kernel();
    value_part();
    for (int64_t i = 0; i < rows_; ++i) w_.row_adjoint[i] = T(0);
    for (int64_t j = 0; j < width_; ++j) w_.column_adjoint[j] = T(0);
    if (d_.transport_cost || d_.f || d_.g) potentials_part();
    write();
  }

 private:
  // Weights and E, padded by zeros; its sums over rows and columns.
  void form_kernel() {
    for (int64_t i = 0; i < rows_; ++i) w_.a[i] = i < n_ ? t_.a[p_ * t_.n + i] : T(0);
    for (int64_t j = 0; j < width_; ++j) {
      w_.b[j] = j < m_ ? t_.b[p_ * t_.m + j] : T(0);
      w_.g[j] = j < m_ ? g_[j] / eps_ : T(0);
    }
    const T factor = T(1) / (scale_ * eps_);
    for (int64_t i = 0; i < rows_; ++i) {
      T* e = w_.kernel + i * width_;
      for (int64_t j = 0; j < width_; j += kLanes) store_first(e + j, V{}, kLanes);
      if (i >= n_) continue;
      const T* c = cost_ + i * t_.m;
      const T level = f_[i] / eps_;
      each_chunk<T>(m_, [&](int64_t j, auto count) {
        store_first(e + j, exp_bounded<T>(load<V>(w_.g + j) + level - load_first<V>(c + j, count) * factor), count);
      });
    }
    sweep(w_.kernel, width_, 0, rows_, w_.b, w_.columns, [&](int64_t i, R sums) {
      store_first(w_.row_sum + i, sums, kRows);
      return load<R>(w_.a + i);
    });
    for (int64_t j = 0; j < width_; ++j) w_.column_sum[j] = w_.columns[j];
  }

  void value_part() {
    T* a_gradient = d_.a_gradient + p_ * t_.n;
    T* b_gradient = d_.b_gradient + p_ * t_.m;
    T a_mass = 0, b_mass = 0;
    for (int64_t i = 0; i < n_; ++i) a_mass += w_.a[i];
    for (int64_t j = 0; j < m_; ++j) b_mass += w_.b[j];
    for (int64_t i = 0; i < t_.n; ++i) {
      a_gradient[i] = i < n_ ? value_ * (slope(f_[i], t_.tau_a) - eps_ * (w_.row_sum[i] - b_mass)) : T(0);
    }
    for (int64_t j = 0; j < t_.m; ++j) {
      b_gradient[j] = j < m_ ? value_ * (slope(g_[j], t_.tau_b) - eps_ * (w_.column_sum[j] - a_mass)) : T(0);
    }
    a_mass_ = a_mass;
  }

  static T slope(T potential, double tau) {
    return tau < __builtin_inf() ? T(-tau * std::expm1(-double(potential) / tau)) : potential;
  }

  // What reaches the potentials, and the adjoints of the optimality conditions that it makes: README, "Gradients".
  void potentials_part() {
    T* at_f = w_.at_f;
    T* at_g = w_.at_g;
    for (int64_t i = 0; i < rows_; ++i) at_f[i] = d_.f && i < n_ ? d_.f[p_ * t_.n + i] : T(0);
    for (int64_t j = 0; j < width_; ++j) at_g[j] = d_.g && j < m_ ? d_.g[p_ * t_.m + j] : T(0);
    T* a_gradient = d_.a_gradient + p_ * t_.n;
    T* b_gradient = d_.b_gradient + p_ * t_.m;
    if (spent_ != T(0)) {
      for (int64_t j = 0; j < width_; j += kLanes) store_first(w_.columns + j, V{}, kLanes);
      const T factor = spent_ / scale_;
      for (int64_t i = 0; i < n_; ++i) {
        const T* e = w_.kernel + i * width_;
        const T* c = cost_ + i * t_.m;
        const T weight = w_.a[i];
        V sum = {};
        each_chunk<T>(m_, [&](int64_t j, auto count) {
          const V x = load<V>(e + j) * load_first<V>(c + j, count) * factor;
          sum += x * load<V>(w_.b + j);
          store_first(w_.columns + j, load<V>(w_.columns + j) + x * weight, kLanes);
        });
        const T total = sum_lanes<T>(sum);
        a_gradient[i] += total;
        at_f[i] += weight * total / eps_;
      }
      for (int64_t j = 0; j < m_; ++j) {
        b_gradient[j] += w_.columns[j];
        at_g[j] += w_.b[j] * w_.columns[j] / eps_;
      }
    }
    const bool balanced = t_.tau_a == __builtin_inf() && t_.tau_b == __builtin_inf();
    if (balanced) {  // through the choice of the constant between f and g
      double excess = 0;
      for (int64_t i = 0; i < n_; ++i) excess += at_f[i];
      for (int64_t j = 0; j < m_; ++j) excess -= at_g[j];
      const T share = T(excess / (2 * double(a_mass_)));
      for (int64_t i = 0; i < n_; ++i) {
        at_f[i] -= w_.a[i] * share;
        a_gradient[i] -= share * f_[i];
      }
      for (int64_t j = 0; j < m_; ++j) {
        at_g[j] += w_.b[j] * share;
        b_gradient[j] += share * g_[j];
      }
    }
    solve(balanced);
  }

  // Conjugate gradients on the Schur complement of the columns, preconditioned by its diagonal part. Points of weight 0
  // move no other; what lies on them is solved directly.
  void solve(bool balanced) {
    T *slope = w_.row_slope, *diagonal = w_.diagonal, *q = w_.solution, *r = w_.residual, *s = w_.direction;
    T *at_f = w_.at_f, *at_g = w_.at_g, *product = w_.beta;
    const T row_factor = T(1) + eps_ / T(t_.tau_a), column_factor = T(1) + eps_ / T(t_.tau_b);
    for (int64_t i = 0; i < rows_; ++i) {
      slope[i] = w_.row_sum[i] > 0 ? T(1) / (w_.row_sum[i] * row_factor) : T(0);
      w_.row_adjoint[i] = w_.a[i] > 0 ? T(0) : at_f[i] * slope[i];
    }
    for (int64_t j = 0; j < width_; ++j) {
      const T d = w_.column_sum[j] * column_factor;
      diagonal[j] = w_.b[j] > 0 && d > 0 ? w_.b[j] * d : T(1);
      w_.column_adjoint[j] = w_.b[j] > 0 || !(d > 0) ? T(0) : at_g[j] / d;
      q[j] = T(0);
    }
    // at_f over a, the part of weight 0 being done; and what it leaves for the columns.
    sweep(w_.kernel, width_, 0, rows_, w_.column_adjoint, w_.columns, [&](int64_t i, R sums) {
      const R weight = load<R>(w_.a + i), arrived = load<R>(at_f + i);
      const R rest = weight > 0 ? arrived / (weight > 0 ? weight : R{} + T(1)) - sums : R{};
      store_first(at_f + i, rest, kRows);
      return load<R>(w_.row_adjoint + i) + weight * rest * load<R>(slope + i);
    });
    double b_mass = 0;
    for (int64_t j = 0; j < width_; ++j) {
      r[j] = w_.b[j] > 0 ? at_g[j] - w_.b[j] * w_.columns[j] : T(0);
      b_mass += w_.b[j];
    }
    // The square of the residual. That of a balanced problem sums to 0 but for rounding, which grows unless taken off: a
    // constant is no direction.
    const auto settle_residual = [&] {
      double surplus = 0, square = 0;
      if (balanced) {
        for (int64_t j = 0; j < width_; ++j) surplus += r[j];
        surplus /= b_mass;
      }
      for (int64_t j = 0; j < width_; ++j) {
        r[j] -= w_.b[j] * T(surplus);
        square += double(r[j]) * double(r[j]) / double(diagonal[j]);
      }
      return square;
    };
    double size = settle_residual();
    for (int64_t j = 0; j < width_; ++j) s[j] = r[j] / diagonal[j];
    const double small = size * Limits<T>::kSolved;
    const auto through_rows = [&](int64_t i, R sums) { return load<R>(w_.a + i) * sums * load<R>(slope + i); };
    for (int64_t step = 0; step < 4 * (m_ + 25) && size > small; ++step) {
      for (int64_t j = 0; j < width_; ++j) product[j] = w_.b[j] * s[j];
      sweep(w_.kernel, width_, 0, rows_, product, w_.columns, through_rows);
      double curvature = 0;
      for (int64_t j = 0; j < width_; ++j) {
        product[j] = diagonal[j] * s[j] - w_.b[j] * w_.columns[j];
        curvature += double(s[j]) * double(product[j]);
      }
      if (!(curvature > 0)) break;
      const T length = T(size / curvature);
      for (int64_t j = 0; j < width_; ++j) {
        q[j] += length * s[j];
        r[j] -= length * product[j];
      }
      const double next = settle_residual();
      const T turn = T(next / size);
      for (int64_t j = 0; j < width_; ++j) s[j] = r[j] / diagonal[j] + turn * s[j];
      size = next;
    }
    for (int64_t j = 0; j < width_; ++j) product[j] = w_.b[j] * q[j];
    sweep(w_.kernel, width_, 0, rows_, product, w_.columns, [&](int64_t i, R sums) {
      const R adjoint = load<R>(w_.a + i) * (load<R>(at_f + i) - sums) * load<R>(slope + i);
      store_first(w_.row_adjoint + i, load<R>(w_.row_adjoint + i) + adjoint, kRows);
      return R{};
    });
    for (int64_t j = 0; j < width_; ++j) w_.column_adjoint[j] += product[j];
  }

  // The gradients to the costs and, through the adjoints, to the weights.
  void write() {
    T* gradient = d_.cost_gradient + p_ * t_.n * t_.m;
    const bool scaled = t_.scale_cost != CostScale::kNone;
    const T flat = value_ + spent_, sloped = spent_ / (eps_ * scale_);
    double along = 0;
    int64_t largest = 0;
    for (int64_t j = 0; j < width_; j += kLanes) store_first(w_.columns + j, V{}, kLanes);
    for (int64_t i = 0; i < t_.n; ++i) {
      T* out = gradient + i * t_.m;
      if (i >= n_) {
        for (int64_t j = 0; j < t_.m; ++j) out[j] = T(0);
        continue;
      }
      const T* e = w_.kernel + i * width_;
      const T* c = cost_ + i * t_.m;
      const T a = w_.a[i], adjoint = w_.row_adjoint[i];
      V moved = {}, dot = {};
      each_chunk<T>(m_, [&](int64_t j, auto count) {
        const V x = load<V>(e + j), b = load<V>(w_.b + j), mu = load<V>(w_.column_adjoint + j);
        const V costs = load_first<V>(c + j, count);
        const V result = x * (b * adjoint + mu * a + b * a * (flat - costs * sloped));
        moved += x * mu;
        dot += result * costs;
        store_first(w_.columns + j, load<V>(w_.columns + j) + x * adjoint, kLanes);
        store_first(out + j, result, count);
      });
      for (int64_t j = m_; j < t_.m; ++j) out[j] = T(0);
      d_.a_gradient[p_ * t_.n + i] -= eps_ * sum_lanes<T>(moved);
      if (scaled) along += double(sum_lanes<T>(dot));
    }
    for (int64_t j = 0; j < m_; ++j) d_.b_gradient[p_ * t_.m + j] -= eps_ * w_.columns[j];
    if (!scaled) return;
    double to_scale = -along / (double(scale_) * double(scale_));
    if (d_.scale) to_scale += d_.scale[p_];
    const bool mean = t_.scale_cost == CostScale::kMean;
    if (mean) {
      largest = n_ * m_;
    } else {
      for (int64_t i = 0; i < n_; ++i) {
        for (int64_t j = 0; j < m_; ++j) largest += cost_[i * t_.m + j] == scale_;
      }
    }
    const T share = T(to_scale / double(largest > 0 ? largest : 1)), inverse = T(1) / scale_;
    for (int64_t i = 0; i < n_; ++i) {
      T* out = gradient + i * t_.m;
      const T* c = cost_ + i * t_.m;
      for (int64_t j = 0; j < m_; ++j) out[j] = out[j] * inverse + (mean || c[j] == scale_ ? share : T(0));
    }
  }

  static constexpr int64_t kLine = 64 / sizeof(T);

  const Transport<T>& t_;
  const TransportGradient<T>& d_;
  const Workspace<T>& w_;
  const int64_t p_;
  const T eps_, scale_;
  const T* cost_;
  const T* f_;
  const T* g_;
  int64_t n_, m_, rows_, width_;
  T value_, spent_, a_mass_ = 0;
};

template <class T>
void differentiate_problem(const Transport<T>& t, const Potentials<T>& at, const TransportGradient<T>& d, int64_t p,
                           const Workspace<T>& w) {
  Differentiator<T>(t, at, d, p, w).run();
}

// The ground costs of one problem. Clouds are centred (or, for the cosine, scaled to unit vectors) into `x` and `y`,
// whose rows are padded by zeros to whole cache lines, and dot products run along the features: no transposition.
template <class T>
void form_costs(const Clouds<T>& c, int64_t p, T* x, T* y, T* centre, T* x_size, T* y_size, T* dots) {
  using V = typename Simd<T>::V;
  constexpr int kLanes = Simd<T>::kLanes;
  constexpr int64_t kLine = 64 / sizeof(T);
  constexpr int kSide = 4;  // products are formed kSide x kSide at a time
  constexpr int64_t kPrefetched = 1 << 15;
  const int64_t n = c.x_lengths ? c.x_lengths[p] : c.n, m = c.y_lengths ? c.y_lengths[p] : c.m, D = c.D;
  const int64_t depth = (D + kLine - 1) / kLine * kLine, width = (m + kLine - 1) / kLine * kLine;
  const bool cosine = c.ground == Ground::kCosine;
  const T* from_x = c.x + p * c.n * D;
  const T* from_y = c.y + p * c.m * D;

  // The first point is subtracted before the mean is formed: a sum of large coordinates would lose digits.
  for (int64_t d = 0; d < depth; ++d) centre[d] = T(0);
  if (!cosine) {
    for (int64_t i = 0; i < n + m; ++i) {
      const T* row = i < n ? from_x + i * D : from_y + (i - n) * D;
      for (int64_t d = 0; d < D; ++d) centre[d] += row[d] - from_x[d];
    }
    const T inverse = T(1) / T(n + m);
    for (int64_t d = 0; d < D; ++d) centre[d] = centre[d] * inverse + from_x[d];
  }
  const auto prepare = [&](const T* from, int64_t count, T* to, T* size) {
    for (int64_t i = 0; i < count; ++i) {
      const T* row = from + i * D;
      T* out = to + i * depth;
      V squares = {};
      each_chunk<T>(D, [&](int64_t d, auto lanes) {
        const V v = load_first<V>(row + d, lanes) - load_first<V>(centre + d, lanes);
        squares += v * v;
        store_first(out + d, v, kLanes);
      });
      for (int64_t d = (D + kLanes - 1) / kLanes * kLanes; d < depth; ++d) out[d] = T(0);
      size[i] = sum_all(squares);
      if (cosine) {
        const T inverse = size[i] > 0 ? T(1) / T(std::sqrt(size[i])) : T(0);
        for (int64_t d = 0; d < D; ++d) out[d] *= inverse;
      }
    }
    const int64_t padded = (count + kSide - 1) / kSide * kSide;
    for (int64_t e = count * depth; e < padded * depth; ++e) to[e] = T(0);
  };
  prepare(from_x, n, x, x_size);
  prepare(from_y, m, y, y_size);
  for (int64_t j = m; j < width; ++j) y_size[j] = T(0);

  // Small clouds of the next problem come into the cache meanwhile: hardware does not look so far ahead.
  for (const auto& [next, points] : {std::pair(from_x + c.n * D, c.n), std::pair(from_y + c.m * D, c.m)}) {
    if (p + 1 == c.B || points * D * int64_t(sizeof(T)) > kPrefetched) continue;
    for (int64_t e = 0; e < points * D; e += kLine) __builtin_prefetch(next + e);
  }
  for (int64_t i = 0; i < n; i += kSide) {
    const T* rows = x + i * depth;
    for (int64_t j = 0; j < m; j += kSide) {
      const T* others = y + j * depth;
      V sums[2][kRows] = {};
      for (int64_t d = 0; d < depth; d += kLanes) {
        V other[kSide];
        for (int l = 0; l < kSide; ++l) other[l] = load<V>(others + l * depth + d);
        for (int k = 0; k < kSide; ++k) {
          const V one = load<V>(rows + k * depth + d);
          for (int l = 0; l < kSide; ++l) sums[k / 2][k % 2 * kSide + l] += one * other[l];
        }
      }
      for (int half = 0; half < 2; ++half) {
        const auto summed = sum_each<T>(sums[half]);
        T tile[kRows];
        __builtin_memcpy(tile, &summed, sizeof tile);
        for (int k = 0; k < 2; ++k) {
          __builtin_memcpy(dots + (half * 2 + k) * width + j, tile + k * kSide, kSide * sizeof(T));
        }
      }
    }
    for (int k = 0; k < kSide && i + k < n; ++k) {
      T* out = c.cost + (p * c.n + i + k) * c.m;
      T* row = dots + k * width;
      const T size = x_size[i + k];
      each_chunk<T>(m, [&](int64_t j, auto count) {
        const V dot = load<V>(row + j);
        if (cosine) {
          store_first(out + j, T(1) - dot, count);
          return;
        }
        const V bound = load<V>(y_size + j) + size;
        V squared = bound - dot * T(2);
        const auto close = squared < bound * c.cancelled;
        if (sum_all(close ? V{} + T(1) : V{}) > 0) {
          for (int l = 0; l < kLanes && l < count; ++l) {
            if (!close[l]) continue;
            const T* mine = x + (i + k) * depth;
            const T* other = y + (j + l) * depth;
            V sum = {};
            for (int64_t d = 0; d < depth; d += kLanes) {
              const V difference = load<V>(mine + d) - load<V>(other + d);
              sum += difference * difference;
            }
            squared[l] = sum_lanes<T>(sum);
          }
        }
        if (c.ground == Ground::kEuclidean) {
          for (int l = 0; l < kLanes; ++l) squared[l] = std::sqrt(squared[l]);
        }
        store_first(out + j, squared, count);
      });
    }
  }
}

#include "alternation_kernels.h"
