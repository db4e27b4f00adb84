// The forward of the mix, of its two phases, and of addition, mix and norm as one.
#pragma once

#include "mix_norm.h"
#include "mix_sweep.h"

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

template <typename T>
at::Tensor mix_forward(const Arguments& a) {
  c10::SmallVector<int64_t, 6> shape;
  if (a.query.dim() == 2) {
    shape.push_back(a.queries());
  }
  shape.append(a.first().sizes().begin(), a.first().sizes().end());
  at::Tensor result = at::detail::empty_cpu(shape, a.first().scalar_type());
  c10::SmallVector<T*, 16> out;
  for (int64_t m = 0; m < a.queries(); ++m) {
    out.push_back(static_cast<T*>(result.mutable_data_ptr()) + m * a.rows() * a.width());
  }
  forward<T>(a, nullptr, out.data(), nullptr);
  return result;
}

template <typename T>
Tensors phase1_forward(const Arguments& a) {
  const at::IntArrayRef shape = a.first().sizes();
  const at::ScalarType type = a.first().scalar_type(), statistics = c10::CppTypeToScalarType<Acc<T>>::value;
  c10::SmallVector<T*, 16> out;
  c10::SmallVector<Acc<T>*, 16> lse;
  Tensors result;
  result.reserve(2 * a.queries());
  for (int64_t m = 0; m < a.queries(); ++m) {
    result.push_back(at::detail::empty_cpu(shape, type));
    out.push_back(static_cast<T*>(result.back().mutable_data_ptr()));
  }
  for (int64_t m = 0; m < a.queries(); ++m) {
    result.push_back(at::detail::empty_cpu(shape.slice(0, shape.size() - 1), statistics));
    lse.push_back(static_cast<Acc<T>*>(result.back().mutable_data_ptr()));
  }
  forward<T>(a, nullptr, out.data(), lse.data());
  return result;
}

template <typename T>
at::Tensor phase2_forward(const Known& given, const Arguments& a) {
  Tensors keep;
  const KnownRows known(given, keep);
  at::Tensor result = at::detail::empty_cpu(a.first().sizes(), a.first().scalar_type());
  T* const out = static_cast<T*>(result.mutable_data_ptr());
  forward<T>(a, &known, &out, nullptr);
  return result;
}

// The norm of the mix, then the completed partial sum if there is a `delta`.
template <typename T>
Tensors mix_norm_forward(const Arguments& a, const at::Tensor* delta, const Known* given, const NormArguments& norm_given) {
  Tensors keep, results;
  const Norm<T> norm(norm_given, a.width());
  std::optional<KnownRows> known;
  if (given != nullptr) {
    known.emplace(*given, keep);
  }
  results.push_back(at::detail::empty_cpu(a.first().sizes(), a.first().scalar_type()));
  T* const out = static_cast<T*>(results[0].mutable_data_ptr());
  Addition<T> addition{};
  std::optional<Rows> deltas;
  if (delta != nullptr) {
    results.push_back(at::detail::empty_cpu(a.first().sizes(), a.first().scalar_type()));
    addition = {&deltas.emplace(rows_of(*delta, keep)), static_cast<T*>(results[1].mutable_data_ptr())};
  }
  each_position<T>(a, known ? &*known : nullptr, addition, true, [&](Sweep<T>& sweep, int64_t row) {
    sweep.read(row, nullptr);
    const Acc<T> scale = norm.standardize(sweep.mixed(0));
    norm.write(sweep.mixed(0), scale, out + row * a.width());
  });
  return results;
}

} // namespace
} // namespace attnres
