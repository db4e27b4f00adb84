// The norm of a mix and its gradient, on padded rows that have not been rounded.
#pragma once

#include "arguments.h"

namespace attnres {
namespace {

// The arguments of the norm as they come from the dispatcher: weight and bias [d], or null.
struct NormArguments {
  const at::Tensor* weight;
  const at::Tensor* bias;
  bool centered;
  double eps;

  NormArguments(const c10::IValue* parameters, const c10::IValue* options)
      : weight(tensor_or_null(parameters[0])),
        bias(tensor_or_null(parameters[1])),
        centered(options[0].toBool()),
        eps(options[1].toDouble()) {}
};

// RMSNorm, or LayerNorm where centered.
template <typename T>
class Norm {
 public:
  using A = Acc<T>;
  using S = Storage<T>;
  using Vec = typename S::Vec;

  Norm(const NormArguments& given, int64_t width)
      : centered_(given.centered),
        eps_(static_cast<A>(given.eps)),
        width_(width),
        padded_(padded_width<T>(width)),
        weight_rows_(given.weight == nullptr ? 0 : padded_),
        bias_rows_(given.bias == nullptr ? 0 : padded_),
        affine_{given.weight == nullptr ? nullptr : weight_rows_.get(),
                given.bias == nullptr ? nullptr : bias_rows_.get()} {
    if (given.weight != nullptr) {
      widen<T>(*given.weight, weight_rows_.get(), padded_);
    }
    if (given.bias != nullptr) {
      widen<T>(*given.bias, bias_rows_.get(), padded_);
    }
  }

  // Takes its mean from a row, where centered, and returns the factor that makes the standard row of what is left.
  A standardize(A* row) const {
    if (centered_) {
      const A mean = sum([&](int64_t at) ATTNRES_INLINE { return Vec::loadu(row + at); }) / static_cast<A>(width_);
      centre(row, mean);
    }
    const A squares = sum([&](int64_t at) ATTNRES_INLINE {
      const Vec part = Vec::loadu(row + at);
      return part * part;
    });
    return A(1) / std::sqrt(squares / static_cast<A>(width_) + eps_);
  }

  // The norm of a row that standardize has seen, rounded.
  void write(const A* row, A scale, T* out) const {
    const Vec factor(scale);
    const Affine affine = affine_;
    chunks([&](int64_t column, int64_t left) ATTNRES_INLINE {
      put(out, column, left, affine.of(Vec::loadu(row + column) * factor, column),
          affine.of(Vec::loadu(row + column + S::width) * factor, column + S::width));
    });
  }

  // The norm again, and the gradient of the row before it, times `outer`; adds to the gradients of weight and bias, if
  // there are any. With x the standard row and G = grad * weight: scale * (G - x mean(G x)), less its mean where centered.
  void backward(const A* row, A scale, const T* grad, T* out, A outer, A* row_grad, A* weight_sum, A* bias_sum) const {
    const Vec factor(scale);
    const Affine affine = affine_;
    Vec along_low(0), along_high(0), own_low(0), own_high(0);
    const auto half = [&](int64_t at, const Vec& grads, Vec& along, Vec& owns) ATTNRES_INLINE {
      const Vec standard = Vec::loadu(row + at) * factor;
      const Vec own = affine.weight == nullptr ? grads : grads * Vec::loadu(affine.weight + at);
      own.store(row_grad + at);
      along = at::vec::fmadd(own, standard, along);
      owns = owns + own;
      if (weight_sum != nullptr) {
        at::vec::fmadd(grads, standard, Vec::loadu(weight_sum + at)).store(weight_sum + at);
      }
      if (bias_sum != nullptr) {
        (grads + Vec::loadu(bias_sum + at)).store(bias_sum + at);
      }
      return affine.of(standard, at);
    };
    chunks([&](int64_t column, int64_t left) ATTNRES_INLINE {
      Vec low, high;
      left < S::chunk ? S::load(grad + column, left, low, high) : S::load(grad + column, low, high);
      low = half(column, low, along_low, own_low);
      high = half(column + S::width, high, along_high, own_high);
      put(out, column, left, low, high);
    });
    const A width = static_cast<A>(width_), along = total(along_low + along_high) / width;
    const A mean = centered_ ? total(own_low + own_high) / width : A(0);
    const Vec by(scale * outer), back(-along * scale), shift(mean);
    // What remains beyond the width is multiplied by zeros.
    for (int64_t at = 0; at < padded_; at += S::width) {
      const Vec own = Vec::loadu(row_grad + at) - shift;
      (by * at::vec::fmadd(back, Vec::loadu(row + at), own)).store(row_grad + at);
    }
  }

 private:
  // Weight and bias [padded], or null. Copied to the stack where they are used: otherwise a store might change them, as far
  // as the compiler knows.
  struct Affine {
    const A* weight;
    const A* bias;

    ATTNRES_INLINE inline Vec of(const Vec& standard, int64_t at) const {
      if (weight == nullptr) {
        return bias == nullptr ? standard : standard + Vec::loadu(bias + at);
      }
      const Vec by = Vec::loadu(weight + at);
      return bias == nullptr ? standard * by : at::vec::fmadd(standard, by, Vec::loadu(bias + at));
    }
  };

  bool centered_;
  A eps_;
  int64_t width_, padded_;
  Buffer<A> weight_rows_, bias_rows_;
  Affine affine_;

  template <typename Visit>
  ATTNRES_INLINE inline void chunks(const Visit& visit) const {
    const int64_t width = width_;
    int64_t column = 0;
    for (; column + S::chunk <= width; column += S::chunk) {
      visit(column, S::chunk);
    }
    if (column < width) {
      visit(column, width - column);
    }
  }

  template <typename Term>
  ATTNRES_INLINE inline A sum(const Term& term) const {
    Vec low(0), high(0);
    for (int64_t column = 0; column < padded_; column += S::chunk) {
      low = low + term(column);
      high = high + term(column + S::width);
    }
    return total(low + high);
  }

  // Elements beyond the width stay zero.
  void centre(A* row, A mean) const {
    const Vec shift(mean);
    chunks([&](int64_t column, int64_t left) ATTNRES_INLINE {
      Vec low(1), high(1);
      if (left < S::chunk) {
        alignas(64) T ones[S::chunk];
        std::fill(ones, ones + S::chunk, T(1));
        S::load(ones, left, low, high);
      }
      (Vec::loadu(row + column) - low * shift).store(row + column);
      (Vec::loadu(row + column + S::width) - high * shift).store(row + column + S::width);
    });
  }

  static ATTNRES_INLINE inline void put(T* out, int64_t column, int64_t left, const Vec& low, const Vec& high) {
    left < S::chunk ? S::store(out + column, left, low, high) : S::store(out + column, low, high);
  }
};

} // namespace
} // namespace attnres
