// The arithmetic of one position of the mix: sums over a row, the softmax over depth, weighted sums of rows.
#pragma once

#include "storage.h"

namespace attnres {

template <typename Vec>
inline typename Vec::value_type total(const Vec& vec) {
  using Value = typename Vec::value_type;
  return at::vec::vec_reduce_all<Value>([](Vec& x, Vec& y) { return x + y; }, vec);
}

// Ask for the rows of a later position while this one is computed: rows of several sources lie far apart, and the
// hardware follows a source only after it has missed on it.
template <typename T>
inline void fetch(const T* next, int64_t column) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t offset = 0; offset < 2 * Storage<T>::chunk; offset += line) {
    __builtin_prefetch(next + column + offset, 0, 2);
  }
}

template <typename T>
inline void fetch_row(const T* next, int64_t width) {
  for (int64_t column = 0; column < width; column += 2 * Storage<T>::chunk) {
    fetch(next, column);
  }
}

// The sums of row_sums. Each is a variable of its own, so that they stay in registers; an array of them is written to memory
// at every step and costs twice the time.
template <typename T, int Count>
struct Dots {
  using S = Storage<T>;
  typename S::Vec low{0}, high{0};
  Dots<T, Count - 1> others;

  ATTNRES_INLINE inline void add(
      const typename S::Vec& row_low, const typename S::Vec& row_high, const Acc<T>* const* with,
      int64_t column) {
    low = at::vec::fmadd(row_low, S::Vec::loadu(*with + column), low);
    high = at::vec::fmadd(row_high, S::Vec::loadu(*with + column + S::width), high);
    others.add(row_low, row_high, with + 1, column);
  }
  ATTNRES_INLINE inline void add(const Dots& more) {
    low = low + more.low;
    high = high + more.high;
    others.add(more.others);
  }
  ATTNRES_INLINE inline void finish(Acc<T>* sums) const {
    *sums = total(low + high);
    others.finish(sums + 1);
  }
};

template <typename T>
struct Dots<T, 0> {
  using Vec = typename Storage<T>::Vec;
  void add(const Vec&, const Vec&, const Acc<T>* const*, int64_t) {}
  void add(const Dots&) {}
  void finish(Acc<T>*) const {}
};

template <typename T, int Count>
struct RowSums {
  using Vec = typename Storage<T>::Vec;
  Vec low{0}, high{0};
  Dots<T, Count> dots;

  ATTNRES_INLINE inline void add(const Vec& row_low, const Vec& row_high, const Acc<T>* const* with, int64_t column) {
    low = at::vec::fmadd(row_low, row_low, low);
    high = at::vec::fmadd(row_high, row_high, high);
    dots.add(row_low, row_high, with, column);
  }
};

// sums[0] = <row, row>, sums[1 + k] = <row, with[k]>. `next` is the row to fetch meanwhile, or null.
template <typename T, int Count>
inline void row_sums(const T* row, const T* next, const Acc<T>* const* with, int64_t width, Acc<T>* sums) {
  using S = Storage<T>;
  // Few sums are taken in two halves, or each addition would wait for the last; many would not fit the registers twice.
  constexpr bool halves = Count <= 2;
  RowSums<T, Count> even, odd_half;
  RowSums<T, Count>& odd = halves ? odd_half : even;
  typename S::Vec low, high;
  int64_t column = 0;
  for (; column + 2 * S::chunk <= width; column += 2 * S::chunk) {
    if (next != nullptr) {
      fetch(next, column);
    }
    S::load(row + column, low, high);
    even.add(low, high, with, column);
    S::load(row + column + S::chunk, low, high);
    odd.add(low, high, with, column + S::chunk);
  }
  if (column + S::chunk <= width) {
    S::load(row + column, low, high);
    even.add(low, high, with, column);
    column += S::chunk;
  }
  if (column < width) {
    S::load(row + column, width - column, low, high);
    odd.add(low, high, with, column);
  }
  even.low = even.low + odd_half.low;
  even.high = even.high + odd_half.high;
  even.dots.add(odd_half.dots);
  sums[0] = total(even.low + even.high);
  even.dots.finish(sums + 1);
}

// The same for any number of vectors, several per read of the row.
template <typename T>
inline void row_sums(
    const T* row, const T* next, const Acc<T>* const* with, int64_t count, int64_t width, Acc<T>* sums) {
  int64_t k = 0;
  const auto some = [&]<int Count>() ATTNRES_INLINE {
    Acc<T> found[1 + Count];
    row_sums<T, Count>(row, k == 0 ? next : nullptr, with + k, width, found);
    sums[0] = found[0];
    std::copy(found + 1, found + 1 + Count, sums + 1 + k);
    k += Count;
  };
  while (count - k >= 4) {
    some.template operator()<4>();
  }
  if (count - k >= 2) {
    some.template operator()<2>();
  }
  if (count - k == 1) {
    some.template operator()<1>();
  }
}

// to = factor * row, padded with zeros.
template <typename T>
inline void widened_row(const T* row, Acc<T> factor, int64_t width, Acc<T>* to) {
  using S = Storage<T>;
  typename S::Vec low, high;
  const typename S::Vec scale(factor);
  for (int64_t column = 0; column < width; column += S::chunk) {
    const int64_t left = width - column;
    left < S::chunk ? S::load(row + column, left, low, high) : S::load(row + column, low, high);
    (low * scale).store(to + column);
    (high * scale).store(to + column + S::width);
  }
}

// to = factor * row, from a padded row.
template <typename T>
inline void rounded_row(const Acc<T>* row, Acc<T> factor, int64_t width, T* to) {
  using S = Storage<T>;
  using Vec = typename S::Vec;
  const Vec scale(factor);
  for (int64_t column = 0; column < width; column += S::chunk) {
    const Vec low = scale * Vec::loadu(row + column), high = scale * Vec::loadu(row + column + S::width);
    const int64_t left = width - column;
    left < S::chunk ? S::store(to + column, left, low, high) : S::store(to + column, low, high);
  }
}

// to = row + more, rounded; `to` may be `row`.
template <typename T>
inline void added_row(const T* row, const T* more, int64_t width, T* to) {
  using S = Storage<T>;
  typename S::Vec low, high, more_low, more_high;
  for (int64_t column = 0; column < width; column += S::chunk) {
    const int64_t left = width - column;
    if (left < S::chunk) {
      S::load(row + column, left, low, high);
      S::load(more + column, left, more_low, more_high);
      S::store(to + column, left, low + more_low, high + more_high);
      return;
    }
    S::load(row + column, low, high);
    S::load(more + column, more_low, more_high);
    S::store(to + column, low + more_low, high + more_high);
  }
}

// The softmax over depth of one query, group by group: sources seen so far weigh exp(logit - top), and `total` together.
// A NaN among the logits makes every weight NaN, as torch.softmax does.
template <typename A>
class Running {
 public:
  A top = -std::numeric_limits<A>::infinity();
  A total = 0;

  Running() = default;
  explicit Running(A lse) : top(lse), total(1) {}

  // Turns the logits of a group into weights, and returns the factor for the sum over the earlier groups.
  A add(A* logits, int64_t count) {
    A high = top;
    for (int64_t i = 0; i < count; ++i) {
      high = logits[i] > high ? logits[i] : high;
    }
    // The difference of two infinities would be NaN, and so would the log-sum-exp.
    const A base = base_of(high);
    const A earlier = std::exp(top - base);
    total *= earlier;
    for (int64_t i = 0; i < count; ++i) {
      logits[i] = std::exp(logits[i] - base);
      total += logits[i];
    }
    top = high;
    return earlier;
  }

  // The weight of a logit that is not in a group, as a share of the whole.
  A share(A logit) const { return std::exp(logit - base_of(top)) / total; }
  A log_sum_exp() const { return base_of(top) + std::log(total); }

 private:
  static A base_of(A high) { return std::isinf(high) ? A(0) : high; }
};

// One group's part of a weighted sum of rows. `sum` [padded] is carried from group to group: taken times `earlier` unless
// this is the first. The last group makes the mix of it: the sum times `scale` (and gain, if there is one), plus the row
// `mixed` of phase 1 times its weight, if there is one; rounded to `out`, or left in `sum` where that is null.
template <typename T>
struct Group {
  const T* const* rows;
  const Acc<T>* weights;
  int64_t count;
  bool first;
  Acc<T> earlier;
  Acc<T>* sum;
  bool last;
  T* out;
  Acc<T> scale;
  const Acc<T>* gain;
  const T* mixed;
  Acc<T> mixed_weight;
};

// The sums are variables of their own, and visited by `each`, so that they stay in registers; an array of them is written
// to memory at every step and costs twice the time.
template <typename T, int Chunks, bool Whole>
inline void add_group_at(const Group<T>& g, int64_t column, int64_t left) {
  using S = Storage<T>;
  using Vec = typename S::Vec;
  Vec low0, high0, low1, high1, low2, high2, low3, high3;
  const auto each = [&](const auto& visit) ATTNRES_INLINE {
    visit(low0, high0, column);
    if constexpr (Chunks == 4) {
      visit(low1, high1, column + S::chunk);
      visit(low2, high2, column + 2 * S::chunk);
      visit(low3, high3, column + 3 * S::chunk);
    }
  };
  const Vec earlier(g.earlier);
  each([&](Vec& sum_low, Vec& sum_high, int64_t at) ATTNRES_INLINE {
    sum_low = g.first ? Vec(0) : earlier * Vec::loadu(g.sum + at);
    sum_high = g.first ? Vec(0) : earlier * Vec::loadu(g.sum + at + S::width);
  });
  for (int64_t i = 0; i < g.count; ++i) {
    const Vec weight(g.weights[i]);
    const T* row = g.rows[i];
    each([&](Vec& sum_low, Vec& sum_high, int64_t at) ATTNRES_INLINE {
      Vec low, high;
      Whole ? S::load(row + at, low, high) : S::load(row + at, left, low, high);
      sum_low = at::vec::fmadd(weight, low, sum_low);
      sum_high = at::vec::fmadd(weight, high, sum_high);
    });
  }
  const Vec scale(g.scale);
  each([&](Vec& sum_low, Vec& sum_high, int64_t at) ATTNRES_INLINE {
    if (!g.last) {
      sum_low.store(g.sum + at);
      sum_high.store(g.sum + at + S::width);
      return;
    }
    Vec low = scale * sum_low, high = scale * sum_high;
    if (g.gain != nullptr) {
      low = low * Vec::loadu(g.gain + at);
      high = high * Vec::loadu(g.gain + at + S::width);
    }
    if (g.mixed != nullptr) {
      const Vec weight(g.mixed_weight);
      Vec mixed_low, mixed_high;
      Whole ? S::load(g.mixed + at, mixed_low, mixed_high) : S::load(g.mixed + at, left, mixed_low, mixed_high);
      low = at::vec::fmadd(weight, mixed_low, low);
      high = at::vec::fmadd(weight, mixed_high, high);
    }
    if (g.out == nullptr) {
      low.store(g.sum + at);
      high.store(g.sum + at + S::width);
    } else {
      Whole ? S::store(g.out + at, low, high) : S::store(g.out + at, left, low, high);
    }
  });
}

template <typename T>
inline void add_group(const Group<T>& g, int64_t width) {
  constexpr int64_t chunk = Storage<T>::chunk;
  int64_t column = 0;
  for (; column + 4 * chunk <= width; column += 4 * chunk) {
    add_group_at<T, 4, true>(g, column, 0);
  }
  for (; column + chunk <= width; column += chunk) {
    add_group_at<T, 1, true>(g, column, 0);
  }
  if (column < width) {
    add_group_at<T, 1, false>(g, column, width - column);
  }
}

} // namespace attnres
