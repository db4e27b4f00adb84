// The backward of the mix and of its two phases: source rows and the gradient row are read from memory once, for the sums
// that the softmax needs; the second reading, for the gradients, finds them in the cache.
#pragma once

#include "mix_gradient.h"
#include "mix_partial.h"
#include "mix_sweep.h"

#include <optional>

#include <unistd.h>

namespace attnres {
namespace {

// What phase 1 has read at one position: its logit, and the gradient of its weight; then the weight, and that of its logit.
template <typename A>
struct KnownHere {
  A lse, pull, weight, lse_grad;
};

// The coefficients of Gradient for one position, from the sums of its rows. `lse_grads` [queries] is null but for phase 1,
// `known` is null but for phase 2.
template <typename A>
void coefficients(
    const Options& options, int64_t count, int64_t queries, int64_t width, const A* inverse, const A* scores,
    const A* lse_grads, KnownHere<A>* known, A* pulls, A* value, A* key, A* shrink) {
  const A scale = static_cast<A>(options.logit_scale);
  std::fill(shrink, shrink + count, A(0));
  for (int64_t m = 0; m < queries; ++m) {
    const A* score = scores + m * count;
    A *pull = pulls + m * count, *weight = value + m * count, *to_key = key + m * count;
    Running<A> running = known != nullptr ? Running<A>(known->lse) : Running<A>();
    for (int64_t i = 0; i < count; ++i) {
      weight[i] = score[i] * scale;
    }
    running.add(weight, count);
    A mean = 0;
    if (known != nullptr) {
      known->weight = running.share(known->lse);
      mean = known->weight * known->pull;
    }
    for (int64_t i = 0; i < count; ++i) {
      weight[i] /= running.total;
      pull[i] *= options.normalize ? inverse[i] : A(1);
      mean += weight[i] * pull[i];
    }
    if (known != nullptr) {
      known->lse_grad = known->weight * (known->pull - mean);
    }
    const A lse_grad = lse_grads != nullptr ? lse_grads[m] : A(0);
    for (int64_t i = 0; i < count; ++i) {
      const A score_grad = scale * weight[i] * (pull[i] - mean + lse_grad);
      to_key[i] = score_grad * inverse[i];
      shrink[i] += score_grad * score[i] + (options.normalize ? weight[i] * pull[i] : A(0));
      weight[i] *= options.normalize ? inverse[i] : A(1);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    shrink[i] *= inverse[i] * inverse[i] / static_cast<A>(width);
  }
}

constexpr int64_t kLine = 64;

// Whether gradients of this many bytes are written past the caches: what is not there anyway when it is used need not be
// fetched before it is overwritten. The last-level cache belongs to others too.
bool streams(int64_t bytes) {
#if defined(_SC_LEVEL3_CACHE_SIZE)
  static const int64_t cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
#else
  constexpr int64_t cache = 0;
#endif
  constexpr int64_t usual = 32 << 20;
  return bytes > (cache > 0 ? cache : usual) / 8;
}

// Where a backward reads and writes. `lse_grads` is empty but for phase 1, `known` and the last two null but for phase 2.
template <typename T>
struct Job {
  const Arguments& a;
  const Parameters<T>& parameters;
  Places places, grads, lse_grads;
  const KnownRows* known;
  bool stream;
  c10::SmallVector<T*, 24> outs;
  T* mixed_out;
  Acc<T>* lse_out;
};

// The positions of one piece: their source gradients, and their share of the sums over positions.
template <typename T>
class Backward {
 public:
  using A = Acc<T>;

  Backward(const Job<T>& job, const Partial<A>& partial, int64_t piece)
      : job_(job),
        count_(job.a.count()),
        width_(job.a.width()),
        queries_(job.parameters.queries),
        padded_(job.parameters.padded),
        gained_(partial.at(kGained) != nullptr),
        row_grad_(queries_ * padded_, true),
        value_grad_(gained_ ? queries_ * padded_ : 0),
        pull_(gained_ ? padded_ : 0),
        pulled_(gained_ ? value_grad_.get() : row_grad_.get()),
        shrink_(count_),
        pulls_(queries_ * count_),
        value_(queries_ * count_),
        key_(queries_ * count_),
        gradient_{count_, queries_, width_, padded_, value_.data(), key_.data(), shrink_.data(), job.parameters.keyed(0),
                  pulled_, row_grad_.get(), partial.at(kKeyed, piece), partial.at(kGained, piece), pull_.get()} {}

  void run(int64_t begin, int64_t end) {
    c10::SmallVector<A, 64> inverse(count_), scores(queries_ * count_);
    c10::SmallVector<A, 16> sums(1 + 2 * queries_);
    c10::SmallVector<const A*, 16> with(2 * queries_);
    for (int64_t m = 0; m < queries_; ++m) {
      with[2 * m] = job_.parameters.keyed(m);
      with[2 * m + 1] = pulled_ + m * padded_;
    }
    const A factor = static_cast<A>(job_.a.options.factor);
    Cursor<T> rows(job_.places, begin, end);
    for (int64_t row = begin; row < end; ++row) {
      rows.step(row);
      for (int64_t m = 0; m < queries_; ++m) {
        widened_row(row_at<T>(job_.grads[m], row), factor, width_, row_grad_.get() + m * padded_);
        weigh(m);
      }
      for (int64_t i = 0; i < count_; ++i) {
        row_sums(rows.here[i], rows.next[i], with.data(), 2 * queries_, width_, sums.data());
        inverse[i] = A(1) / std::sqrt(sums[0] / static_cast<A>(width_) + static_cast<A>(job_.a.options.eps));
        for (int64_t m = 0; m < queries_; ++m) {
          scores[m * count_ + i] = sums[1 + 2 * m] * inverse[i];
          pulls_[m * count_ + i] = sums[2 + 2 * m];
        }
      }
      give(row, rows, inverse.data(), scores.data(), row + 1 < end);
    }
#if defined(__SSE2__)
    if (job_.stream) {
      _mm_sfence();  // or another thread might not see what went past the caches
    }
#endif
  }

 private:
  const Job<T>& job_;
  int64_t count_, width_, queries_, padded_;
  bool gained_;
  // [queries, padded] each: the gradient of the mix, and of the sum of the values, which are the same without a gain there.
  Buffer<A> row_grad_, value_grad_, pull_;
  A* const pulled_;
  c10::SmallVector<A, 64> shrink_, pulls_, value_, key_;
  const Gradient<T> gradient_;

  void weigh(int64_t m) {
    const int64_t from = m * padded_;
    for (int64_t j = 0; gained_ && j < padded_; ++j) {
      pulled_[from + j] = row_grad_.get()[from + j] * job_.parameters.gain(m)[j];
    }
  }

  // The gradients of the sources, and of what phase 1 has read, from the sums over their rows.
  void give(int64_t row, const Cursor<T>& rows, const A* inverse, const A* scores, bool more) {
    c10::SmallVector<A, 16> lse_grads(job_.lse_grads.size());
    for (size_t m = 0; m < lse_grads.size(); ++m) {
      lse_grads[m] = *row_at<A>(job_.lse_grads[m], row);
    }
    KnownHere<A> known;
    if (job_.known != nullptr) {
      const A* const one[] = {row_grad_.get()};
      A sums[2];
      row_sums<T, 1>(row_at<T>(job_.known->mixed, row), more ? row_at<T>(job_.known->mixed, row + 1) : nullptr, one, width_,
                     sums);
      known = {*row_at<A>(job_.known->lse, row), sums[1]};
    }
    coefficients(job_.a.options, count_, queries_, width_, inverse, scores, lse_grads.empty() ? nullptr : lse_grads.data(),
                 job_.known != nullptr ? &known : nullptr, pulls_.data(), value_.data(), key_.data(), shrink_.data());
    if (job_.known != nullptr) {
      rounded_row(row_grad_.get(), known.weight, width_, job_.mixed_out + row * width_);
      job_.lse_out[row] = known.lse_grad;
    }
    c10::SmallVector<T*, 32> to(job_.outs.begin(), job_.outs.end());
    for (T*& out : to) {
      out += row * width_;
    }
    job_.stream ? source_grads<T, true>(gradient_, rows.here.data(), to.data())
                : source_grads<T, false>(gradient_, rows.here.data(), to.data());
  }
};

// The gradients of all that a mix or one of its phases was given, in its order. `grads` and `lse_grads` have one tensor a
// query, the latter for phase 1 alone; `known` is what phase 2 was given first.
template <typename T>
Tensors backward(
    at::ArrayRef<at::Tensor> grads, at::ArrayRef<at::Tensor> lse_grads, const Known* given, const Arguments& a) {
  using A = Acc<T>;
  const int64_t count = a.count(), width = a.width(), rows = a.rows(), padded = padded_width<T>(width);
  const Parameters<T> parameters(a, padded);
  Tensors keep, outs;
  outs.reserve(count + 4);
  Job<T> job{a, parameters, rows_of(a, keep)};
  const int64_t row_bytes = width * static_cast<int64_t>(sizeof(T));
  job.stream = row_bytes % kLine == 0 && streams(count * rows * row_bytes);
  for (const at::Tensor& grad : grads) {
    job.grads.push_back(rows_of(grad, keep));
  }
  for (const at::Tensor& grad : lse_grads) {
    job.lse_grads.emplace_back(grad, true);
  }
  std::optional<KnownRows> known;
  if (given != nullptr) {
    job.known = &known.emplace(*given, keep);
    outs.push_back(at::detail::empty_cpu(given->mixed.sizes(), given->mixed.scalar_type()));
    outs.push_back(at::detail::empty_cpu(given->lse.sizes(), given->lse.scalar_type()));
    job.mixed_out = static_cast<T*>(outs[0].mutable_data_ptr());
    job.lse_out = static_cast<A*>(outs[1].mutable_data_ptr());
  }
  for (int64_t i = 0; i < count; ++i) {
    outs.push_back(at::detail::empty_cpu(a.first().sizes(), a.first().scalar_type()));
    job.outs.push_back(static_cast<T*>(outs.back().mutable_data_ptr()));
    job.stream = job.stream && reinterpret_cast<uintptr_t>(job.outs.back()) % kLine == 0;
  }
  const int64_t size = parameters.queries * padded;
  const Partial<A> partial(rows, size, {true, a.options.normalize && a.gain != nullptr});
  partial.run(count * width, [&](int64_t piece, int64_t begin, int64_t end) {
    Backward<T>(job, partial, piece).run(begin, end);
  });

  A *keyed = partial.at(kKeyed), *values = partial.at(kGained);
  if (a.gain == nullptr) {
    outs.push_back(rounded<T>(keyed, a.query, padded));
    return outs;
  }
  Buffer<A> gain(size, true);
  for (int64_t m = 0; m < parameters.queries; ++m) {
    A* to = gain.get() + (parameters.gain_per_query ? m * padded : 0);
    for (int64_t j = 0; j < padded; ++j) {
      const int64_t at = m * padded + j;
      to[j] += keyed[at] * parameters.query.get()[at] + (values == nullptr ? A(0) : values[at]);
      keyed[at] *= parameters.gain(m)[j];
    }
  }
  outs.push_back(rounded<T>(keyed, a.query, padded));
  outs.push_back(rounded<T>(gain.get(), *a.gain, padded));
  return outs;
}

} // namespace
} // namespace attnres
