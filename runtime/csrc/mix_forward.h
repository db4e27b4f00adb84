// The forward of the mix and of its two phases.
#pragma once

#include "mix_sweep.h"

namespace attnres {
namespace {

// Calls `visit(sweep, row)` for every position, on several threads if there are many; it has to let the sweep read.
template <typename T, typename Visit>
void each_position(const Arguments& a, const KnownRows* known, bool keep, const Visit& visit) {
  const int64_t rows = a.rows();
  if (rows == 0) {
    return;
  }
  Tensors copies;
  const auto places = rows_of(a, copies);
  const Parameters<T> parameters(a, padded_width<T>(a.width()));
  const int64_t work = (a.count() + (known != nullptr)) * a.width() * ((parameters.queries + 3) / 4);
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / work), [&](int64_t begin, int64_t end) {
    const FlushTiny flush;
    Sweep<T> sweep(a, parameters, places, known, keep, begin, end);
    for (int64_t row = begin; row < end; ++row) {
      visit(sweep, row);
    }
  });
}

// Writes query m's mix to out[m] and, where asked for, its log-sum-exp to lse[m]. `known` comes before the sources.
template <typename T>
void forward(const Arguments& a, const KnownRows* known, T* const* out, Acc<T>* const* lse) {
  const int64_t width = a.width(), queries = a.queries();
  each_position<T>(a, known, false, [&](Sweep<T>& sweep, int64_t row) {
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

} // namespace
} // namespace attnres
