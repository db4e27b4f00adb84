// The forward of the mix, of its two phases, and of addition, mix and norm as one.
#pragma once

#include "norm.h"
#include "sweep.h"

#include <optional>

namespace attnres {
namespace {

// Calls `visit(sweep, row)` for every position, on several threads if there are many; it has to let the sweep read.
template <typename T, typename Visit>
void each_position(
    const Arguments& a, const KnownRows* known, const Addition<T>& addition, bool keep, const Visit& visit) {
  const int64_t rows = a.rows();
  if (rows == 0) {
    return;
  }
  Tensors copies;
  const auto places = rows_of(a, copies);
  const Parameters<T> parameters(a, padded_width<T>(a.width()));
  const int64_t read = a.count() + (known != nullptr) + (addition.delta != nullptr);
  const int64_t work = read * a.width() * ((parameters.queries + 3) / 4);
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / work), [&](int64_t begin, int64_t end) {
    const FlushTiny flush;
    Sweep<T> sweep(a, parameters, places, known, addition, keep, begin, end);
    for (int64_t row = begin; row < end; ++row) {
      visit(sweep, row);
    }
  });
}

// Writes query m's mix to out[m] and, where asked for, its log-sum-exp to lse[m]. `known` comes before the sources.
template <typename T>
void forward(const Arguments& a, const KnownRows* known, T* const* out, Acc<T>* const* lse) {
  const int64_t width = a.width(), queries = a.queries();
  each_position<T>(a, known, {}, false, [&](Sweep<T>& sweep, int64_t row) {
    c10::SmallVector<T*, 16> to(queries);
    for (int64_t m = 0; m < queries; ++m) {
      to[m] = out[m] + row * width;
    }
    sweep.read(row, to.data());
    for (int64_t m = 0; lse != nullptr && m < queries; ++m) {
      lse[m][row] = sweep.log_sum_exp(m);
    }
  });
}

// The functions below write to contiguous tensors of the right shape and dtype.

template <typename A>
A* data_of(const at::Tensor& tensor) {
  return static_cast<A*>(tensor.mutable_data_ptr());
}

template <typename T>
void mix_forward(const Arguments& a, const at::Tensor& result) {
  c10::SmallVector<T*, 16> out;
  for (int64_t m = 0; m < a.queries(); ++m) {
    out.push_back(data_of<T>(result) + m * a.rows() * a.width());
  }
  forward<T>(a, nullptr, out.data(), nullptr);
}

template <typename T>
void phase1_forward(const Arguments& a, at::ArrayRef<at::Tensor> mixed, at::ArrayRef<at::Tensor> lses) {
  c10::SmallVector<T*, 16> out;
  c10::SmallVector<Acc<T>*, 16> lse;
  for (int64_t m = 0; m < a.queries(); ++m) {
    out.push_back(data_of<T>(mixed[m]));
    lse.push_back(data_of<Acc<T>>(lses[m]));
  }
  forward<T>(a, nullptr, out.data(), lse.data());
}

template <typename T>
void phase2_forward(const Known& given, const Arguments& a, const at::Tensor& result) {
  Tensors keep;
  const KnownRows known(given, keep);
  T* const out = data_of<T>(result);
  forward<T>(a, &known, &out, nullptr);
}

// The norm of the mix, and the completed partial sum if there is a `delta`. The partial sum may be written in the place of
// the last source: a row of it is read once, by added_row, and its sum from then on.
template <typename T>
void mix_norm_forward(const Arguments& a, const at::Tensor* delta, const Known* given, const NormArguments& norm_given,
                      const at::Tensor& normed, const at::Tensor* partial) {
  Tensors keep;
  const Norm<T> norm(norm_given, a.width());
  std::optional<KnownRows> known;
  if (given != nullptr) {
    known.emplace(*given, keep);
  }
  T* const out = data_of<T>(normed);
  Addition<T> addition{};
  std::optional<Rows> deltas;
  if (delta != nullptr) {
    addition = {&deltas.emplace(rows_of(*delta, keep)), data_of<T>(*partial)};
  }
  each_position<T>(a, known ? &*known : nullptr, addition, true, [&](Sweep<T>& sweep, int64_t row) {
    sweep.read(row, nullptr);
    const Acc<T> scale = norm.standardize(sweep.mixed(0));
    norm.write(sweep.mixed(0), scale, out + row * a.width());
  });
}

} // namespace
} // namespace attnres
