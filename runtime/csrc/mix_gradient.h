// The arithmetic of the gradients of one position.
#pragma once

#include "mix_rows.h"

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
  const Acc<T>* row_grad;    // [queries, padded]: the same without the gain; null where the gain has no part in values
  Acc<T>* keyed_sum;         // [queries, padded], added to: the gradient of keyed
  Acc<T>* gain_sum;          // [queries, padded], added to: what the values contribute to the gradient of the gain
};

// One source, one chunk of columns: its gradient, and its part of the sums over sources and positions.
template <typename T, bool One, bool Gain, bool Whole>
inline void source_grad_at(const Gradient<T>& g, int64_t i, const T* row, T* out, int64_t column, int64_t left) {
  using S = Storage<T>;
  using Vec = typename S::Vec;
  Vec low, high;
  Whole ? S::load(row + column, low, high) : S::load(row + column, left, low, high);
  const Vec shrink(-g.shrink[i]);
  Vec grad0 = shrink * low, grad1 = shrink * high;
  const int64_t queries = One ? 1 : g.queries;
  for (int64_t m = 0; m < queries; ++m) {
    const int64_t at = m * g.padded + column;
    const Vec key(g.key[m * g.count + i]), value(g.value[m * g.count + i]);
    grad0 = at::vec::fmadd(value, Vec::loadu(g.value_grad + at), grad0);
    grad1 = at::vec::fmadd(value, Vec::loadu(g.value_grad + at + S::width), grad1);
    grad0 = at::vec::fmadd(key, Vec::loadu(g.keyed + at), grad0);
    grad1 = at::vec::fmadd(key, Vec::loadu(g.keyed + at + S::width), grad1);
    at::vec::fmadd(key, low, Vec::loadu(g.keyed_sum + at)).store(g.keyed_sum + at);
    at::vec::fmadd(key, high, Vec::loadu(g.keyed_sum + at + S::width)).store(g.keyed_sum + at + S::width);
    if constexpr (Gain) {
      const Vec pull0 = value * Vec::loadu(g.row_grad + at), pull1 = value * Vec::loadu(g.row_grad + at + S::width);
      at::vec::fmadd(pull0, low, Vec::loadu(g.gain_sum + at)).store(g.gain_sum + at);
      at::vec::fmadd(pull1, high, Vec::loadu(g.gain_sum + at + S::width)).store(g.gain_sum + at + S::width);
    }
  }
  Whole ? S::store(out + column, grad0, grad1) : S::store(out + column, left, grad0, grad1);
}

// All source gradients of one position. Row after row, so that the hardware sees streams; in blocks of columns, so that
// what all rows share (the gradient, the query, the sums) stays in the first-level cache.
template <typename T, bool One, bool Gain>
inline void source_grads(const Gradient<T>& g, const T* const* rows, T* const* outs) {
  constexpr int64_t chunk = Storage<T>::chunk, block = 1024;
  for (int64_t begin = 0; begin < g.width; begin += block) {
    const int64_t end = std::min(begin + block, g.width);
    for (int64_t i = 0; i < g.count; ++i) {
      int64_t column = begin;
      for (; column + chunk <= end; column += chunk) {
        source_grad_at<T, One, Gain, true>(g, i, rows[i], outs[i], column, 0);
      }
      if (column < end) {
        source_grad_at<T, One, Gain, false>(g, i, rows[i], outs[i], column, end - column);
      }
    }
  }
}

} // namespace attnres
