// The backward of the mix and of its two phases: source rows and the gradient row are read from memory once, for the sums that the softmax
// needs; the second reading, for the gradients, finds them in the cache.
#pragma once

#include "mix_arguments.h"
#include "mix_gradient.h"

#include <optional>

#include <unistd.h>

namespace attnres {
namespace {

// The gradients of the parameters are summed in pieces whose number depends on the input alone, then over the pieces in
// order: the same bits on any number of threads.
constexpr int64_t kPieces = 128;
constexpr int64_t kRowsPerPiece = 8;

// The sums over positions that one piece of the rows contributes, [queries, padded] each, and where they stand.
template <typename A>
struct Partial {
  int64_t pieces, per_piece, size;
  bool values;
  Buffer<A> keyed_sums, gain_sums;

  Partial(int64_t rows, int64_t size, bool values)
      : pieces(std::min<int64_t>(kPieces, (rows + kRowsPerPiece - 1) / kRowsPerPiece)),
        per_piece(pieces == 0 ? 0 : (rows + pieces - 1) / pieces),
        size(size),
        values(values),
        keyed_sums(std::max<int64_t>(pieces, 1) * size),
        gain_sums(values ? std::max<int64_t>(pieces, 1) * size : 0) {
    clear(0);
  }
  void clear(int64_t piece) const {
    std::fill(keyed(piece), keyed(piece) + size, A(0));
    if (values) {
      std::fill(gain(piece), gain(piece) + size, A(0));
    }
  }
  A* keyed(int64_t piece) const { return keyed_sums.get() + piece * size; }
  A* gain(int64_t piece) const { return values ? gain_sums.get() + piece * size : nullptr; }

  // Everything into piece 0, in the order of the pieces.
  void reduce() const {
    at::parallel_for(0, size, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t piece = 1; piece < pieces; ++piece) {
        for (int64_t at = begin; at < end; ++at) {
          keyed(0)[at] += keyed(piece)[at];
        }
        for (int64_t at = begin; values && at < end; ++at) {
          gain(0)[at] += gain(piece)[at];
        }
      }
    });
  }
};

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

// Where a backward reads and writes. `lse_grads` is empty but for phase 1; `known` and the last two are null but for phase 2.
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

// The rows of one piece: their source gradients, and their share of the sums over positions.
template <typename T>
void backward_rows(const Job<T>& job, Acc<T>* keyed_sum, Acc<T>* gain_sum, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const Arguments& a = job.a;
  const Parameters<T>& parameters = job.parameters;
  const int64_t count = a.count(), width = a.width();
  const int64_t queries = parameters.queries, padded = parameters.padded, pairs = queries * count;
  const bool gained = gain_sum != nullptr;
  Buffer<A> row_grad(queries * padded, true), value_grad(gained ? queries * padded : 0), pull(gained ? padded : 0);
  A* const pulled = gained ? value_grad.get() : row_grad.get();
  c10::SmallVector<A, 64> inverse(count), shrink(count), scores(pairs), pulls(pairs), value(pairs), key(pairs);
  c10::SmallVector<A, 16> lse_grads(job.lse_grads.size()), sums(1 + 2 * queries);
  c10::SmallVector<const A*, 16> with(2 * queries);
  c10::SmallVector<const T*, 32> here(count), next(count);
  c10::SmallVector<T*, 32> to(count);
  const Gradient<T> gradient{count, queries, width, padded, value.data(), key.data(), shrink.data(), parameters.keyed(0),
                             pulled, row_grad.get(), keyed_sum, gain_sum, pull.get()};
  const A eps = static_cast<A>(a.options.eps), factor = static_cast<A>(a.options.factor);
  for (int64_t m = 0; m < queries; ++m) {
    with[2 * m] = parameters.keyed(m);
    with[2 * m + 1] = pulled + m * padded;
  }
  for (int64_t i = 0; i < count; ++i) {
    next[i] = static_cast<const T*>(job.places[i].at(begin));
  }
  for (int64_t row = begin; row < end; ++row) {
    std::swap(here, next);
    for (int64_t m = 0; m < queries; ++m) {
      widened_row(static_cast<const T*>(job.grads[m].at(row)), factor, width, row_grad.get() + m * padded);
      for (int64_t j = 0; gained && j < padded; ++j) {
        pulled[m * padded + j] = row_grad.get()[m * padded + j] * parameters.gain(m)[j];
      }
    }
    for (size_t m = 0; m < lse_grads.size(); ++m) {
      lse_grads[m] = *static_cast<const A*>(job.lse_grads[m].at(row));
    }
    for (int64_t i = 0; i < count; ++i) {
      next[i] = row + 1 < end ? static_cast<const T*>(job.places[i].at(row + 1)) : nullptr;
      to[i] = job.outs[i] + row * width;
      row_sums(here[i], next[i], with.data(), 2 * queries, width, sums.data());
      inverse[i] = A(1) / std::sqrt(sums[0] / static_cast<A>(width) + eps);
      for (int64_t m = 0; m < queries; ++m) {
        scores[m * count + i] = sums[1 + 2 * m] * inverse[i];
        pulls[m * count + i] = sums[2 + 2 * m];
      }
    }
    KnownHere<A> known;
    if (job.known != nullptr) {
      const A* const one[] = {row_grad.get()};
      const T* following = row + 1 < end ? static_cast<const T*>(job.known->mixed.at(row + 1)) : nullptr;
      row_sums<T, 1>(static_cast<const T*>(job.known->mixed.at(row)), following, one, width, sums.data());
      known = {*static_cast<const A*>(job.known->lse.at(row)), sums[1]};
    }
    coefficients(a.options, count, queries, width, inverse.data(), scores.data(),
                 lse_grads.empty() ? nullptr : lse_grads.data(), job.known != nullptr ? &known : nullptr, pulls.data(),
                 value.data(), key.data(), shrink.data());
    if (job.known != nullptr) {
      rounded_row(row_grad.get(), known.weight, width, job.mixed_out + row * width);
      job.lse_out[row] = known.lse_grad;
    }
    job.stream ? source_grads<T, true>(gradient, here.data(), to.data())
               : source_grads<T, false>(gradient, here.data(), to.data());
  }
#if defined(__SSE2__)
  if (job.stream) {
    _mm_sfence();  // or another thread might not see what went past the caches
  }
#endif
}

template <typename A, typename P>
void round_as(const A* from, const at::Tensor& to, int64_t padded) {
  const int64_t width = to.size(-1);
  P* out = static_cast<P*>(to.mutable_data_ptr());
  for (int64_t m = 0; m < to.numel() / width; ++m) {
    for (int64_t j = 0; j < width; ++j) {
      out[m * width + j] = static_cast<P>(from[m * padded + j]);
    }
  }
}

// A gradient of the shape and dtype of `like`, rounded from padded rows that are arranged for T; they are restored.
template <typename T>
at::Tensor rounded(Acc<T>* from, const at::Tensor& like, int64_t padded) {
  using A = Acc<T>;
  for (int64_t m = 0; m < like.numel() / like.size(-1); ++m) {
    restore<T>(from + m * padded, padded);
  }
  at::Tensor result = at::detail::empty_cpu(like.sizes(), like.scalar_type());
  switch (like.scalar_type()) {
    case at::kFloat:
      round_as<A, float>(from, result, padded);
      break;
    case at::kDouble:
      round_as<A, double>(from, result, padded);
      break;
    case at::kHalf:
      round_as<A, at::Half>(from, result, padded);
      break;
    default:
      round_as<A, at::BFloat16>(from, result, padded);
  }
  return result;
}

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
  const Partial<A> partial(rows, size, a.options.normalize && a.gain != nullptr);
  const int64_t grain = kGrain / std::max<int64_t>(1, partial.per_piece * count * width);
  at::parallel_for(0, partial.pieces, std::max<int64_t>(1, grain), [&](int64_t first, int64_t last) {
    const FlushTiny flush;
    for (int64_t piece = first; piece < last; ++piece) {
      const int64_t begin = piece * partial.per_piece, end = std::min(rows, begin + partial.per_piece);
      partial.clear(piece);
      if (begin < end) {
        backward_rows<T>(job, partial.keyed(piece), partial.gain(piece), begin, end);
      }
    }
  });
  partial.reduce();

  A *keyed = partial.keyed(0), *values = partial.gain(0);
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
