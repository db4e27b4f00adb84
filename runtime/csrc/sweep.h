// One position of a mix after another: every source row is read from memory once, all queries of a position share the sweep.
#pragma once

#include "arguments.h"

namespace attnres {
namespace {

// Sources are taken in groups, whose rows stay in a cache between the sums over them and their part of the weighted sum.
// Each group after the first reads and writes the sums so far: so if the first-level cache has room for only a few rows,
// that cache is the second level.
inline int64_t group_of(int64_t row_bytes) {
  constexpr int64_t first_level = 20 * 1024, second_level = 160 * 1024, few = 5;
  const int64_t rows = first_level / row_bytes;
  return rows >= few ? rows : std::max<int64_t>(1, second_level / row_bytes);
}

// The rows of one position, and those `Ahead` positions later to be fetched meanwhile; null after the last. A sweep finishes
// short rows before the next arrive if it fetches those only then; the backward of a mix, which writes rows, does not.
template <typename T, int64_t Ahead>
class Cursor {
 public:
  const T** here = nullptr;
  const T* const* next = nullptr;

  Cursor(const Places& places, int64_t begin, int64_t end)
      : places_(places), end_(end), ring_((Ahead + 1) * places.size()) {
    for (int64_t row = begin; row < begin + Ahead; ++row) {
      follow(row);
    }
  }
  void step(int64_t row) {
    here = at(row);
    next = follow(row + Ahead);
  }

 private:
  const Places& places_;
  int64_t end_;
  c10::SmallVector<const T*, 48> ring_;

  const T** at(int64_t row) { return ring_.data() + row % (Ahead + 1) * static_cast<int64_t>(places_.size()); }
  const T** follow(int64_t row) {
    const T** const to = at(row);
    for (size_t i = 0; i < places_.size(); ++i) {
      to[i] = row < end_ ? row_at<T>(places_[i], row) : nullptr;
    }
    return to;
  }
};

// What is added to the last source before it is read, and where the sums go, which are read in its place; or nothing. The
// sums may go where the last source is.
template <typename T>
struct Addition {
  const Rows* delta;
  T* out;
};

// What reads the positions from `begin` to before `end`, in order, and what it has found at the last one: `inverse`
// [count] the inverse root mean squares, `scores` [queries, count] before the logit scale.
template <typename T>
class Sweep {
 public:
  using A = Acc<T>;
  static constexpr int64_t kAhead = 2;
  Cursor<T, kAhead> rows;
  c10::SmallVector<A, 64> inverse, scores;

  // `keep`: the mixes may stay in `mixed`, and not only be rounded to a row.
  Sweep(const Arguments& a, const Parameters<T>& parameters, const Places& places, const KnownRows* known,
        const Addition<T>& addition, bool keep, int64_t begin, int64_t end)
      : rows(places, begin, end),
        inverse(a.count()),
        scores(parameters.queries * a.count()),
        options_(a.options),
        parameters_(parameters),
        known_(known),
        addition_(addition),
        end_(end),
        count_(a.count()),
        width_(a.width()),
        group_(group_of(width_ * static_cast<int64_t>(sizeof(T)))),
        weights_(count_),
        found_(1 + parameters.queries),
        running_(parameters.queries),
        keyed_(parameters.queries),
        sums_(keep || count_ > group_ ? parameters.queries * parameters.padded : 0) {
    for (int64_t m = 0; m < parameters.queries; ++m) {
      keyed_[m] = parameters.keyed(m);
    }
  }

  // The mix of each query m at position `row`: rounded to out[m], or left in mixed(m) if `out` is null.
  void read(int64_t row, T* const* out) {
    rows.step(row);
    const T* mixed = nullptr;
    A lse = 0;
    std::fill(running_.begin(), running_.end(), Running<A>());
    if (known_ != nullptr) {
      mixed = row_at<T>(known_->mixed, row);
      lse = *row_at<A>(known_->lse, row);
      running_[0] = Running<A>(lse);
      fetch_after(row, known_->mixed);
    }
    const A scale = static_cast<A>(options_.logit_scale), factor = static_cast<A>(options_.factor);
    for (int64_t low = 0; low < count_; low += group_) {
      const int64_t high = std::min(count_, low + group_);
      for (int64_t i = low; i < high; ++i) {
        if (addition_.delta != nullptr && i == count_ - 1) {
          complete(row);
        }
        look(i);
      }
      for (int64_t m = 0; m < parameters_.queries; ++m) {
        for (int64_t i = low; i < high; ++i) {
          weights_[i] = scores[m * count_ + i] * scale;
        }
        const A earlier = running_[m].add(weights_.data() + low, high - low);
        for (int64_t i = low; options_.normalize && i < high; ++i) {
          weights_[i] *= inverse[i];
        }
        const bool last = high == count_;
        add_group<T>({rows.here + low, weights_.data() + low, high - low, low == 0, earlier,
                      sums_.get() + m * parameters_.padded, last, out == nullptr ? nullptr : out[m],
                      factor / running_[m].total, options_.normalize ? parameters_.gain(m) : nullptr, mixed,
                      mixed != nullptr ? factor * running_[m].share(lse) : A(0)}, width_);
      }
    }
  }

  A* mixed(int64_t m) const { return sums_.get() + m * parameters_.padded; }
  A log_sum_exp(int64_t m) const { return running_[m].log_sum_exp(); }

 private:
  const Options& options_;
  const Parameters<T>& parameters_;
  const KnownRows* known_;
  const Addition<T> addition_;
  int64_t end_, count_, width_, group_;
  c10::SmallVector<A, 64> weights_, found_;
  c10::SmallVector<Running<A>, 16> running_;
  c10::SmallVector<const A*, 16> keyed_;
  Buffer<A> sums_;

  void fetch_after(int64_t row, const Rows& of) const {
    if (row + kAhead < end_) {
      fetch_row(row_at<T>(of, row + kAhead), width_);
    }
  }

  void complete(int64_t row) {
    const T*& last = rows.here[count_ - 1];
    T* const to = addition_.out + row * width_;
    fetch_after(row, *addition_.delta);
    added_row(last, row_at<T>(*addition_.delta, row), width_, to);
    last = to;
  }

  void look(int64_t i) {
    row_sums(rows.here[i], rows.next[i], keyed_.data(), parameters_.queries, width_, found_.data());
    inverse[i] = A(1) / std::sqrt(found_[0] / static_cast<A>(width_) + static_cast<A>(options_.eps));
    for (int64_t m = 0; m < parameters_.queries; ++m) {
      scores[m * count_ + i] = found_[1 + m] * inverse[i];
    }
  }
};

} // namespace
} // namespace attnres
