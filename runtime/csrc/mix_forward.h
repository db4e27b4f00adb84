// The forward of the mix and of its two phases: every source row is read from memory once, all queries of a position share
// the sweep.
#pragma once

#include "mix_arguments.h"

namespace attnres {
namespace {

// Sources are taken in groups of about this many bytes a row, which stay in the first-level cache between the sums over a
// row and its part of the weighted sum.
constexpr int64_t kGroupBytes = 20 * 1024;

// Writes query m's mix to out[m] and, where asked for, its log-sum-exp to lse[m]. `known` comes before the sources.
template <typename T>
void forward(const Arguments& a, const KnownRows* known, T* const* out, Acc<T>* const* lse) {
  using A = Acc<T>;
  const int64_t count = a.count(), width = a.width(), rows = a.rows(), queries = a.queries();
  if (rows == 0) {
    return;
  }
  Tensors keep;
  const auto places = rows_of(a, keep);
  const int64_t padded = padded_width<T>(width);
  const Parameters<T> parameters(a, padded);
  const A eps = static_cast<A>(a.options.eps), scale = static_cast<A>(a.options.logit_scale);
  const A factor = static_cast<A>(a.options.factor);

  const int64_t group = std::max<int64_t>(1, kGroupBytes / (width * static_cast<int64_t>(sizeof(T))));
  const int64_t work = (count + (known != nullptr)) * width * ((queries + 3) / 4);

  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / work), [&](int64_t begin, int64_t end) {
    const FlushTiny flush;
    c10::SmallVector<const T*, 32> here(count), next(count);
    c10::SmallVector<A, 64> inverse(count), logits(queries * count), found(1 + queries);
    c10::SmallVector<const A*, 16> keyed(queries);
    c10::SmallVector<Running<A>, 16> running(queries);
    Buffer<A> sums(count > group ? queries * padded : 0);
    for (int64_t m = 0; m < queries; ++m) {
      keyed[m] = parameters.keyed(m);
    }
    for (int64_t i = 0; i < count; ++i) {
      next[i] = static_cast<const T*>(places[i].at(begin));
    }
    for (int64_t row = begin; row < end; ++row) {
      std::swap(here, next);
      const T* mixed = nullptr;
      A known_lse = 0;
      std::fill(running.begin(), running.end(), Running<A>());
      if (known != nullptr) {
        mixed = static_cast<const T*>(known->mixed.at(row));
        known_lse = *static_cast<const A*>(known->lse.at(row));
        running[0] = Running<A>(known_lse);
        if (row + 1 < end) {
          fetch_row(static_cast<const T*>(known->mixed.at(row + 1)), width);
        }
      }
      for (int64_t low = 0; low < count; low += group) {
        const int64_t high = std::min(count, low + group);
        for (int64_t i = low; i < high; ++i) {
          next[i] = row + 1 < end ? static_cast<const T*>(places[i].at(row + 1)) : nullptr;
          row_sums(here[i], next[i], keyed.data(), queries, width, found.data());
          inverse[i] = A(1) / std::sqrt(found[0] / static_cast<A>(width) + eps);
          for (int64_t m = 0; m < queries; ++m) {
            logits[m * count + i] = found[1 + m] * inverse[i] * scale;
          }
        }
        for (int64_t m = 0; m < queries; ++m) {
          A* weights = logits.data() + m * count + low;
          const A earlier = running[m].add(weights, high - low);
          for (int64_t i = low; a.options.normalize && i < high; ++i) {
            weights[i - low] *= inverse[i];
          }
          T* to = high == count ? out[m] + row * width : nullptr;
          add_group<T>({here.data() + low, weights, high - low, low == 0, earlier, sums.get() + m * padded, to,
                        factor / running[m].total, a.options.normalize ? parameters.gain(m) : nullptr, mixed,
                        mixed != nullptr ? factor * running[m].share(known_lse) : A(0)}, width);
        }
      }
      for (int64_t m = 0; lse != nullptr && m < queries; ++m) {
        lse[m][row] = running[m].log_sum_exp();
      }
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
