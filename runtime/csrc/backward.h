// The backward of the mix, of its two phases, and of addition, mix and norm as one: source rows and the gradient row are
// read from memory once, for the sums that the softmax needs; later reads find them in the cache.
#pragma once

#include "gradient.h"
#include "norm.h"
#include "parameter_sums.h"
#include "sweep.h"

#include <optional>

#include <unistd.h>

namespace attnres {
namespace {

// What phase 1 has read at one position: its logit, and the gradient of its weight; then the weight, and that of its logit.
template <typename A>
struct KnownHere {
  A lse, pull, weight, lse_grad;
};

// The coefficients of Gradient for one position, from the sums of its rows. `lse_grads` [queries] is null except in phase 1,
// `known` except in phase 2.
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

// Whether gradients of this many bytes are written past the caches: what would not stay cached until its use need not be
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

// What the backward of a norm is given on top: the gradient of the completed partial sum, the last source, or null.
struct NormBackward {
  NormArguments norm;
  const at::Tensor* partial_grad;
};

// Where a backward reads and writes. `lse_grads` is empty except in phase 1; `known` and its results are null except in
// phase 2, `norm`, `normed` and `partial_grads` except for a norm.
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
  const Norm<T>* norm;
  T* normed;
  const Rows* partial_grads;
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
                  pulled_, row_grad_.get(), partial.at(kKeyed, piece), partial.at(kGained, piece), pull_.get()},
        weight_sum_(partial.at(kWeight, piece)),
        bias_sum_(partial.at(kBias, piece)) {}

  void run(int64_t begin, int64_t end) {
    job_.norm != nullptr ? read_norm(begin, end) : read(begin, end);
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
  A *const weight_sum_, *const bias_sum_;

  // Where the gradient of a mix is given: all sums over a row in one read.
  void read(int64_t begin, int64_t end) {
    c10::SmallVector<A, 64> inverse(count_), scores(queries_ * count_);
    c10::SmallVector<A, 16> sums(1 + 2 * queries_);
    c10::SmallVector<const A*, 16> with(2 * queries_);
    for (int64_t m = 0; m < queries_; ++m) {
      with[2 * m] = job_.parameters.keyed(m);
      with[2 * m + 1] = pulled_ + m * padded_;
    }
    const A factor = static_cast<A>(job_.a.options.factor);
    Cursor<T, 1> rows(job_.places, begin, end);
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
      give(row, rows.here, inverse.data(), scores.data(), row + 1 < end);
    }
  }

  // Where that of its norm is given: the mix again, and its gradient, before it can be multiplied by the sources.
  void read_norm(int64_t begin, int64_t end) {
    Sweep<T> sweep(job_.a, job_.parameters, job_.places, job_.known, {}, true, begin, end);
    const A* const with[] = {pulled_};
    A sums[2];
    for (int64_t row = begin; row < end; ++row) {
      sweep.read(row, nullptr);
      A* const mixed = sweep.mixed(0);
      const A scale = job_.norm->standardize(mixed);
      job_.norm->backward(mixed, scale, row_at<T>(job_.grads[0], row), job_.normed + row * width_,
                          static_cast<A>(job_.a.options.factor), row_grad_.get(), weight_sum_, bias_sum_);
      weigh(0);
      for (int64_t i = 0; i < count_; ++i) {
        row_sums<T, 1>(sweep.rows.here[i], nullptr, with, width_, sums);
        pulls_[i] = sums[1];
      }
      give(row, sweep.rows.here, sweep.inverse.data(), sweep.scores.data(), false);
    }
  }

  void weigh(int64_t m) {
    const int64_t from = m * padded_;
    for (int64_t j = 0; gained_ && j < padded_; ++j) {
      pulled_[from + j] = row_grad_.get()[from + j] * job_.parameters.gain(m)[j];
    }
  }

  // The gradients of the sources, and of what phase 1 has read, from the sums over their rows.
  void give(int64_t row, const T* const* rows, const A* inverse, const A* scores, bool fetch) {
    c10::SmallVector<A, 16> lse_grads(job_.lse_grads.size());
    for (size_t m = 0; m < lse_grads.size(); ++m) {
      lse_grads[m] = *row_at<A>(job_.lse_grads[m], row);
    }
    KnownHere<A> known;
    if (job_.known != nullptr) {
      const A* const one[] = {row_grad_.get()};
      A sums[2];
      row_sums<T, 1>(row_at<T>(job_.known->mixed, row), fetch ? row_at<T>(job_.known->mixed, row + 1) : nullptr, one, width_,
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
    const Position<T> here{rows, to.data(),
                           job_.partial_grads == nullptr ? nullptr : row_at<T>(*job_.partial_grads, row)};
    job_.stream ? source_grads<T, true>(gradient_, here) : source_grads<T, false>(gradient_, here);
  }
};

// The gradients of the query, and of the gain if there is one, from the sums over positions.
template <typename T>
void parameter_grads(const Arguments& a, const Parameters<T>& parameters, const Partial<Acc<T>>& partial, Tensors& outs) {
  using A = Acc<T>;
  const int64_t padded = parameters.padded;
  A *keyed = partial.at(kKeyed), *values = partial.at(kGained);
  if (a.gain == nullptr) {
    outs.push_back(rounded<T>(keyed, a.query, padded));
    return;
  }
  Buffer<A> gain(parameters.queries * padded, true);
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
}

// The gradients of all that a mix, one of its phases or its norm was given, in its order; the norm again before them.
// `grads` and `lse_grads` have one tensor per query, the latter only for phase 1; `given` is what phase 1 has read.
template <typename T>
Tensors backward(at::ArrayRef<at::Tensor> grads, at::ArrayRef<at::Tensor> lse_grads, const Known* given, const Arguments& a,
                 const NormBackward* above = nullptr) {
  const int64_t count = a.count(), width = a.width(), rows = a.rows(), padded = padded_width<T>(width);
  const Parameters<T> parameters(a, padded);
  Tensors keep, outs;
  outs.reserve(count + 7);
  const auto give = [&](const at::Tensor& like) {
    outs.push_back(at::detail::empty_cpu(like.sizes(), like.scalar_type()));
    return outs.back().mutable_data_ptr();
  };
  Job<T> job{a, parameters, rows_of(a, keep)};
  const int64_t row_bytes = width * static_cast<int64_t>(sizeof(T));
  job.stream = row_bytes % kLine == 0 && streams(count * rows * row_bytes);
  for (const at::Tensor& grad : grads) {
    job.grads.push_back(rows_of(grad, keep));
  }
  for (const at::Tensor& grad : lse_grads) {
    job.lse_grads.emplace_back(grad, true);
  }
  std::optional<Norm<T>> norm;
  std::optional<Rows> partial_grads;
  if (above != nullptr) {
    job.norm = &norm.emplace(above->norm, width);
    job.normed = static_cast<T*>(give(a.first()));
    if (above->partial_grad != nullptr) {
      job.partial_grads = &partial_grads.emplace(rows_of(*above->partial_grad, keep));
    }
  }
  std::optional<KnownRows> known;
  if (given != nullptr) {
    job.known = &known.emplace(*given, keep);
    job.mixed_out = static_cast<T*>(give(given->mixed));
    job.lse_out = static_cast<Acc<T>*>(give(given->lse));
  }
  for (int64_t i = 0; i < count; ++i) {
    job.outs.push_back(static_cast<T*>(give(a.first())));
    job.stream = job.stream && reinterpret_cast<uintptr_t>(job.outs.back()) % kLine == 0;
  }
  const at::Tensor* const weight = above == nullptr ? nullptr : above->norm.weight;
  const at::Tensor* const bias = above == nullptr ? nullptr : above->norm.bias;
  const Partial<Acc<T>> partial(rows, parameters.queries * padded,
                                {true, a.options.normalize && a.gain != nullptr, weight != nullptr, bias != nullptr});
  partial.run(count * width, [&](int64_t piece, int64_t begin, int64_t end) {
    Backward<T>(job, partial, piece).run(begin, end);
  });
  parameter_grads<T>(a, parameters, partial, outs);
  if (weight != nullptr) {
    outs.push_back(rounded<T>(partial.at(kWeight), *weight, padded));
  }
  if (bias != nullptr) {
    outs.push_back(rounded<T>(partial.at(kBias), *bias, padded));
  }
  return outs;
}

} // namespace
} // namespace attnres
