// The forward of the mix: every source row is read from memory once, all queries of a position share the sweep.
#pragma once

#include "mix_arguments.h"

namespace attnres {
namespace {

// Sources are taken in groups of about this many bytes a row, which stay in the first-level cache between the sums over a
// row and its part of the weighted sum.
constexpr int64_t kGroupBytes = 20 * 1024;

template <typename T>
at::Tensor forward(const Arguments& a) {
  using A = Acc<T>;
  const int64_t count = a.count(), width = a.width(), rows = a.rows(), queries = a.queries();
  c10::SmallVector<int64_t, 6> shape;
  if (a.query.dim() == 2) {
    shape.push_back(queries);
  }
  shape.append(a.first().sizes().begin(), a.first().sizes().end());
  at::Tensor result = at::detail::empty_cpu(shape, a.first().scalar_type());
  if (rows == 0) {
    return result;
  }
  Tensors keep;
  const auto places = rows_of(a, keep);
  const int64_t padded = padded_width<T>(width);
  const Parameters<T> parameters(a, padded);
  T* out = static_cast<T*>(result.mutable_data_ptr());
  const A eps = static_cast<A>(a.options.eps), scale = static_cast<A>(a.options.logit_scale);
  const A factor = static_cast<A>(a.options.factor);

  const int64_t group = std::max<int64_t>(1, kGroupBytes / (width * static_cast<int64_t>(sizeof(T))));

  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / (count * width)), [&](int64_t begin, int64_t end) {
    const FlushTiny flush;
    c10::SmallVector<const T*, 32> here(count), next(count);
    c10::SmallVector<A, 64> inverse(count), logits(queries * count);
    Buffer<A> sums(count > group ? queries * padded : 0);
    for (int64_t i = 0; i < count; ++i) {
      next[i] = static_cast<const T*>(places[i].at(begin));
    }
    for (int64_t row = begin; row < end; ++row) {
      std::swap(here, next);
      c10::SmallVector<Running<A>, 4> running(queries);
      for (int64_t low = 0; low < count; low += group) {
        const int64_t high = std::min(count, low + group);
        for (int64_t i = low; i < high; ++i) {
          next[i] = row + 1 < end ? static_cast<const T*>(places[i].at(row + 1)) : nullptr;
          for (int64_t m = 0; m < queries; ++m) {
            const A* with[] = {parameters.keyed(m)};
            A found[2];
            row_sums<T, 1>(here[i], m == 0 ? next[i] : nullptr, with, width, found);
            inverse[i] = A(1) / std::sqrt(found[0] / static_cast<A>(width) + eps);
            logits[m * count + i] = found[1] * inverse[i] * scale;
          }
        }
        for (int64_t m = 0; m < queries; ++m) {
          A* weights = logits.data() + m * count + low;
          const A earlier = running[m].add(weights, high - low);
          for (int64_t i = low; a.options.normalize && i < high; ++i) {
            weights[i - low] *= inverse[i];
          }
          T* to = high == count ? out + (m * rows + row) * width : nullptr;
          add_group<T>({here.data() + low, weights, high - low, low == 0, earlier, sums.get() + m * padded, to,
                        factor / running[m].total, a.options.normalize ? parameters.gain(m) : nullptr}, width);
        }
      }
    }
  });
  return result;
}

} // namespace
} // namespace attnres
