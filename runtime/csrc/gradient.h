// The arithmetic of the gradients of one position.
#pragma once

#include "rows.h"

namespace attnres {

// What the gradients of one position are made of. Per query m (of `queries`) and source i, at [m * count + i]:
// value[] multiplies value_grad, key[] multiplies the folded query; per source, shrink[] multiplies the row itself.
template <typename T>
struct Gradient {
  int64_t count, queries, width, padded;
  const Acc<T>* value;
  const Acc<T>* key;
  const Acc<T>* shrink;
  const Acc<T>* keyed;       // [queries, padded]: query * gain
  const Acc<T>* value_grad;  // [queries, padded]: the gradient of the sum of the values
  const Acc<T>* row_grad;    // [queries, padded]: the same without the gain
  Acc<T>* keyed_sum;         // [queries, padded], added to: the gradient of keyed
  Acc<T>* gain_sum;          // [queries, padded], added to: what the values contribute to that of the gain, or null
  Acc<T>* pull;              // [padded]: room for a sum
};

// All source gradients of one position are written to `outs`; `more` is a row that the last one has added to it, or null.
template <typename T>
struct Position {
  const T* const* rows;
  T* const* outs;
  const T* more;
};

// One query, one chunk of columns: what all sources share, in registers from the first source to the last.
template <typename T, bool Gain>
struct Columns {
  using S = Storage<T>;
  using Vec = typename S::Vec;
  int64_t column;
  Vec value_low, value_high, keyed_low, keyed_high, sum_low, sum_high;
  Vec pull_low{0}, pull_high{0};

  ATTNRES_INLINE inline Columns(const Gradient<T>& g, int64_t column)
      : column(column),
        value_low(Vec::loadu(g.value_grad + column)),
        value_high(Vec::loadu(g.value_grad + column + S::width)),
        keyed_low(Vec::loadu(g.keyed + column)),
        keyed_high(Vec::loadu(g.keyed + column + S::width)),
        sum_low(Vec::loadu(g.keyed_sum + column)),
        sum_high(Vec::loadu(g.keyed_sum + column + S::width)) {}

  // Source i: writes its gradient, and adds its part of the sums over sources and positions.
  template <bool Whole, bool Stream>
  ATTNRES_INLINE inline void add(const Gradient<T>& g, int64_t i, const T* row, T* out, int64_t left) {
    Vec low, high;
    load<Whole>(row, left, low, high);
    const Vec shrink(-g.shrink[i]);
    give<Whole, Stream>(g, i, low, high, shrink * low, shrink * high, out, left);
  }
  // The same where `more` is added to the gradient.
  template <bool Whole, bool Stream>
  ATTNRES_INLINE inline void add(const Gradient<T>& g, int64_t i, const T* row, const T* more, T* out, int64_t left) {
    Vec low, high, more_low, more_high;
    load<Whole>(row, left, low, high);
    load<Whole>(more, left, more_low, more_high);
    const Vec shrink(-g.shrink[i]);
    give<Whole, Stream>(g, i, low, high, at::vec::fmadd(shrink, low, more_low), at::vec::fmadd(shrink, high, more_high), out,
                        left);
  }

  ATTNRES_INLINE inline void finish(const Gradient<T>& g) const {
    sum_low.store(g.keyed_sum + column);
    sum_high.store(g.keyed_sum + column + S::width);
    if constexpr (Gain) {
      add_product(g.row_grad + column, pull_low, g.gain_sum + column);
      add_product(g.row_grad + column + S::width, pull_high, g.gain_sum + column + S::width);
    }
  }

 private:
  template <bool Whole>
  ATTNRES_INLINE inline void load(const T* row, int64_t left, Vec& low, Vec& high) const {
    Whole ? S::load(row + column, low, high) : S::load(row + column, left, low, high);
  }

  // The gradient of a row, on top of what there is of it.
  template <bool Whole, bool Stream>
  ATTNRES_INLINE inline void give(const Gradient<T>& g, int64_t i, const Vec& low, const Vec& high, const Vec& on_low,
                                  const Vec& on_high, T* out, int64_t left) {
    const Vec key(g.key[i]), value(g.value[i]);
    const Vec grad_low = at::vec::fmadd(key, keyed_low, at::vec::fmadd(value, value_low, on_low));
    const Vec grad_high = at::vec::fmadd(key, keyed_high, at::vec::fmadd(value, value_high, on_high));
    sum_low = at::vec::fmadd(key, low, sum_low);
    sum_high = at::vec::fmadd(key, high, sum_high);
    if constexpr (Gain) {
      pull_low = at::vec::fmadd(value, low, pull_low);
      pull_high = at::vec::fmadd(value, high, pull_high);
    }
    Whole ? S::template store<Stream>(out + column, grad_low, grad_high) : S::store(out + column, left, grad_low, grad_high);
  }

  static inline void add_product(const Acc<T>* row, const Vec& pull, Acc<T>* sum) {
    at::vec::fmadd(Vec::loadu(row), pull, Vec::loadu(sum)).store(sum);
  }
};

// All source gradients of one position, for one query.
template <typename T, bool Gain, bool Stream>
inline void grads_of_one(const Gradient<T>& g, const Position<T>& p) {
  constexpr int64_t chunk = Storage<T>::chunk;
  const int64_t last = g.count - 1, count = p.more == nullptr ? g.count : last;
  int64_t column = 0;
  for (; column + 2 * chunk <= g.width; column += 2 * chunk) {
    Columns<T, Gain> first(g, column), second(g, column + chunk);
    for (int64_t i = 0; i < count; ++i) {
      first.template add<true, Stream>(g, i, p.rows[i], p.outs[i], 0);
      second.template add<true, Stream>(g, i, p.rows[i], p.outs[i], 0);
    }
    if (p.more != nullptr) {
      first.template add<true, Stream>(g, last, p.rows[last], p.more, p.outs[last], 0);
      second.template add<true, Stream>(g, last, p.rows[last], p.more, p.outs[last], 0);
    }
    first.finish(g);
    second.finish(g);
  }
  const auto rest = [&]<bool Whole>(int64_t left) {
    Columns<T, Gain> columns(g, column);
    for (int64_t i = 0; i < count; ++i) {
      columns.template add<Whole, Stream>(g, i, p.rows[i], p.outs[i], left);
    }
    if (p.more != nullptr) {
      columns.template add<Whole, Stream>(g, last, p.rows[last], p.more, p.outs[last], left);
    }
    columns.finish(g);
  };
  for (; column < g.width; column += chunk) {
    const int64_t left = g.width - column;
    left < chunk ? rest.template operator()<false>(left) : rest.template operator()<true>(left);
  }
}

// One source, one chunk of columns, any number of queries: its gradient.
template <typename T, bool Whole, bool Stream>
inline void grad_of_several(const Gradient<T>& g, int64_t i, const T* row, T* out, int64_t column, int64_t left) {
  using S = Storage<T>;
  using Vec = typename S::Vec;
  Vec low, high;
  Whole ? S::load(row + column, low, high) : S::load(row + column, left, low, high);
  const Vec shrink(-g.shrink[i]);
  low = shrink * low;
  high = shrink * high;
  for (int64_t m = 0; m < g.queries; ++m) {
    const int64_t at = m * g.padded + column;
    const Vec key(g.key[m * g.count + i]), value(g.value[m * g.count + i]);
    low = at::vec::fmadd(value, Vec::loadu(g.value_grad + at), low);
    high = at::vec::fmadd(value, Vec::loadu(g.value_grad + at + S::width), high);
    low = at::vec::fmadd(key, Vec::loadu(g.keyed + at), low);
    high = at::vec::fmadd(key, Vec::loadu(g.keyed + at + S::width), high);
  }
  Whole ? S::template store<Stream>(out + column, low, high) : S::store(out + column, left, low, high);
}

// The same for several queries. In blocks of columns, so that what all rows share stays in the first-level cache.
template <typename T, bool Gain, bool Stream>
inline void grads_of_several(const Gradient<T>& g, const T* const* rows, T* const* outs) {
  constexpr int64_t chunk = Storage<T>::chunk;
  for (int64_t m = 0; m < g.queries; ++m) {
    Acc<T>* const sum = g.keyed_sum + m * g.padded;
    add_group<T>({rows, g.key + m * g.count, g.count, false, 1, sum}, g.width);
    if constexpr (Gain) {
      add_group<T>({rows, g.value + m * g.count, g.count, true, 0, g.pull}, g.width);
      for (int64_t j = 0; j < g.padded; ++j) {
        g.gain_sum[m * g.padded + j] += g.row_grad[m * g.padded + j] * g.pull[j];
      }
    }
  }
  const int64_t block = std::max<int64_t>(8, 2048 / (g.queries * chunk)) * chunk;
  for (int64_t begin = 0; begin < g.width; begin += block) {
    const int64_t end = std::min(begin + block, g.width);
    for (int64_t i = 0; i < g.count; ++i) {
      int64_t column = begin;
      for (; column + chunk <= end; column += chunk) {
        grad_of_several<T, true, Stream>(g, i, rows[i], outs[i], column, 0);
      }
      if (column < end) {
        grad_of_several<T, false, Stream>(g, i, rows[i], outs[i], column, end - column);
      }
    }
  }
}

// All source gradients of one position, and its part of the sums over positions. Only one query may have `more`.
template <typename T, bool Stream>
inline void source_grads(const Gradient<T>& g, const Position<T>& p) {
  const bool gained = g.gain_sum != nullptr;
  if (g.queries == 1) {
    gained ? grads_of_one<T, true, Stream>(g, p) : grads_of_one<T, false, Stream>(g, p);
  } else {
    gained ? grads_of_several<T, true, Stream>(g, p.rows, p.outs) : grads_of_several<T, false, Stream>(g, p.rows, p.outs);
  }
}

} // namespace attnres
