// Normalisations of rows and columns in turn, in the logarithmic domain, and their gradient: one problem on one team.

// The part of one member.
template <class T>
class Alternator {
  using V = typename Simd<T>::V;
  static constexpr int kLanes = Simd<T>::kLanes;
  static constexpr int kTogether = 4;  // rows that enter the sums over columns at a time

 public:
  Alternator(const Alternation<T>& t, int64_t p, const AlternationSpace<T>& space, const Team& team)
      : t_(t), space_(space), team_(team), p_(p), cost_(t.cost + p * t.N * t.M) {
    first_row_ = team.begin(t.N, 1);
    last_row_ = team.end(t.N, 1);
    first_column_ = team.begin(space.width, kLine);
    last_column_ = team.end(space.width, kLine);
    top_ = space.partial + team.rank * 2 * space.width;
    sum_ = top_ + space.width;
  }

  // Rows and columns of every iteration; the last potential. One read of the costs per iteration, 9/4 exponentials each.
  void forward(T* potential, T* rows, T* columns) {
    const V absent = V{} + Limits<T>::kAbsentLog;
    set_levels(t_.start + p_ * t_.M);
    for (int64_t k = 0; k < t_.iterations; ++k) {
      T* row = rows + (k * t_.P + p_) * t_.N;
      T* column = columns + (k * t_.P + p_) * t_.M;
      for (int64_t j = 0; j < space_.width; j += kLanes) {
        store_first(top_ + j, absent, kLanes);
        store_first(sum_ + j, V{}, kLanes);
      }
      for (int64_t i = first_row_; i < last_row_; i += kTogether) {
        const int64_t count = last_row_ - i < kTogether ? last_row_ - i : kTogether;
        T level[kTogether];
        for (int64_t r = 0; r < kTogether; ++r) level[r] = Limits<T>::kAbsentLog;  // of a row that is not there
        for (int64_t r = 0; r < count; ++r) {
          row[i + r] = normalizer(cost_ + (i + r) * t_.M);
          level[r] = t_.log_a[p_ * t_.N + i + r] - t_.share_a * row[i + r];
        }
        add_to_columns(cost_ + i * t_.M, count, level);
      }
      team_.sync();
      combine_columns();
      for (int64_t j = first_column_; j < last_column_ && j < t_.M; j += kLanes) {
        const V sum = load<V>(space_.partial + space_.width + j);
        store_first(column + j, load<V>(space_.partial + j) + log_positive(sum > 0 ? sum : V{} + T(1)), t_.M - j);
      }
      const T* log_b = t_.log_b + p_ * t_.M;
      T* next = potential + p_ * t_.M;
      for (int64_t j = first_column_; j < last_column_ && j < t_.M; ++j) next[j] = log_b[j] - t_.share_b * column[j];
      team_.sync();
      if (k + 1 < t_.iterations) set_levels(next);
    }
  }

  // The gradient to the costs, from the one to the last potential: the iterations backwards, from what was kept of each.
  // One read of the costs per iteration, 2 exponentials each.
  void backward(const T* rows, const T* columns, const T* gradient, T* cost_gradient) {
    T* result = cost_gradient + p_ * t_.N * t_.M;
    const T* arrived = gradient + p_ * t_.M;  // at the first, the gradient to the last potential
    for (int64_t k = t_.iterations - 1; k >= 0; --k) {
      const T* row = rows + (k * t_.P + p_) * t_.N;
      const T* column = columns + (k * t_.P + p_) * t_.M;
      const T* before = k > 0 ? columns + ((k - 1) * t_.P + p_) * t_.M : nullptr;
      set_levels(before ? nullptr : t_.start + p_ * t_.M, before);
      for (int64_t j = first_column_; j < last_column_; ++j) {
        space_.column[j] = j < t_.M ? column[j] : -Limits<T>::kAbsentLog;
        space_.gradient[j] = j < t_.M ? t_.share_b * arrived[j] : T(0);
      }
      for (int64_t j = 0; j < space_.width; j += kLanes) store_first(sum_ + j, V{}, kLanes);
      team_.sync();
      for (int64_t i = first_row_; i < last_row_; ++i) {
        const T* c = cost_ + i * t_.M;
        T* out = result + i * t_.M;
        const T of_row = t_.log_a[p_ * t_.N + i] - t_.share_a * row[i], normalizer = row[i];
        const bool first = k == t_.iterations - 1;
        V total = {};
        each_chunk<T>(t_.M, [&](int64_t j, auto count) {
          const V flow = exp_bounded<T>(of_row - load_first<V>(c + j, count) - load<V>(space_.column + j)) *
                         load<V>(space_.gradient + j);
          total += flow;
          store_first(out + j, first ? flow : load_first<V>(out + j, count) + flow, count);
        });
        const T moved = -t_.share_a * sum_all(total);
        each_chunk<T>(t_.M, [&](int64_t j, auto count) {
          const V flow =
              exp_bounded<T>(load<V>(space_.level + j) - load_first<V>(c + j, count) - normalizer) * moved;
          store_first(out + j, load_first<V>(out + j, count) + flow, count);
          store_first(sum_ + j, load<V>(sum_ + j) - flow, kLanes);
        });
      }
      team_.sync();
      for (int64_t j = first_column_; j < last_column_; j += kLanes) {
        V sum = {};
        for (int r = 0; r < team_.size; ++r) sum += load<V>(space_.partial + (2 * r + 1) * space_.width + j);
        store_first(space_.arrived + j, sum, kLanes);
      }
      arrived = space_.arrived;
      team_.sync();
    }
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(T);

  // The potential of every column: as given, or from the normalisers of the columns before; absent past the end.
  void set_levels(const T* potential, const T* normalizers = nullptr) {
    const T* log_b = t_.log_b + p_ * t_.M;
    for (int64_t j = first_column_; j < last_column_; ++j) {
      T level = Limits<T>::kAbsentLog;
      if (j < t_.M) level = normalizers ? log_b[j] - t_.share_b * normalizers[j] : potential[j];
      space_.level[j] = level > Limits<T>::kAbsentLog ? level : Limits<T>::kAbsentLog;  // the log of 0 is -infinity
    }
    team_.sync();
  }

  // log sum_j exp(level_j - c_j).
  T normalizer(const T* c) const {
    V top = V{} + Limits<T>::kAbsentLog, total = {};
    each_chunk<T>(t_.M, [&](int64_t j, auto count) {
      top = max(top, load<V>(space_.level + j) - load_first<V>(c + j, count));
    });
    const T highest = max_all<T>(top);
    each_chunk<T>(t_.M, [&](int64_t j, auto count) {
      total += exp_bounded<T>(load<V>(space_.level + j) - load_first<V>(c + j, count) - highest);
    });
    return highest + std::log(sum_all(total));
  }

  // Adds exp(level - c) of some rows to the sums over columns, which are kept relative to their largest term.
  void add_to_columns(const T* c, int64_t count, const T (&level)[kTogether]) {
    each_chunk<T>(t_.M, [&](int64_t j, auto lanes) {
      V terms[kTogether];
      const V before = load<V>(top_ + j);
      V top = before;
      for (int r = 0; r < kTogether; ++r) {
        terms[r] = level[r] - load_first<V>(c + (r < count ? r : 0) * t_.M + j, lanes);
        top = max(top, terms[r]);
      }
      V sum = load<V>(sum_ + j) * exp_bounded<T>(before - top);
      for (int r = 0; r < kTogether; ++r) sum += exp_bounded<T>(terms[r] - top);
      store_first(top_ + j, top, kLanes);
      store_first(sum_ + j, sum, kLanes);
    });
  }

  // Makes the first member's sums, on the columns of this one, those of all.
  void combine_columns() {
    const int64_t width = space_.width;
    for (int64_t j = first_column_; j < last_column_; j += kLanes) {
      V top = load<V>(space_.partial + j), sum = load<V>(space_.partial + width + j);
      for (int r = 1; r < team_.size; ++r) {
        const V other = load<V>(space_.partial + 2 * r * width + j), both = max(top, other);
        sum = sum * exp_bounded<T>(top - both) +
              load<V>(space_.partial + (2 * r + 1) * width + j) * exp_bounded<T>(other - both);
        top = both;
      }
      store_first(space_.partial + j, top, kLanes);
      store_first(space_.partial + width + j, sum, kLanes);
    }
  }

  const Alternation<T>& t_;
  const AlternationSpace<T>& space_;
  const Team team_;
  const int64_t p_;
  const T* cost_;
  T *top_, *sum_;
  int64_t first_row_, last_row_, first_column_, last_column_;
};

template <class T>
void alternate_problem(const Alternation<T>& t, int64_t p, const AlternationSpace<T>& space, const Team& team,
                       T* potential, T* rows, T* columns) {
  Alternator<T>(t, p, space, team).forward(potential, rows, columns);
}

template <class T>
void differentiate_alternation(const Alternation<T>& t, int64_t p, const AlternationSpace<T>& space, const Team& team,
                               const T* rows, const T* columns, const T* gradient, T* cost_gradient) {
  Alternator<T>(t, p, space, team).backward(rows, columns, gradient, cost_gradient);
}
