// The gradients of the parameters: sums over all positions, the same bits on any number of threads.
#pragma once

#include "arguments.h"

#include <array>

namespace attnres {
namespace {

// They are summed in pieces whose number depends on the input alone, then over the pieces in order.
constexpr int64_t kPieces = 128;
constexpr int64_t kRowsPerPiece = 8;

// What is summed over positions: the gradient of the folded query, what the values contribute to that of the gain, and the
// gradients of a norm's weight and bias.
enum Sum : int64_t { kKeyed, kGained, kWeight, kBias, kSums };

// The sums that each piece of the rows contributes, `size` elements each.
template <typename A>
class Partial {
 public:
  Partial(int64_t rows, int64_t size, const std::array<bool, kSums>& wanted)
      : pieces_(std::min<int64_t>(kPieces, (rows + kRowsPerPiece - 1) / kRowsPerPiece)),
        per_piece_(pieces_ == 0 ? 0 : (rows + pieces_ - 1) / pieces_),
        rows_(rows),
        size_(size),
        whole_(size * std::count(wanted.begin(), wanted.end(), true)),
        sums_(std::max<int64_t>(pieces_, 1) * whole_) {
    int64_t place = 0;
    for (int64_t sum = 0; sum < kSums; ++sum) {
      places_[sum] = wanted[sum] ? size * place++ : -1;
    }
    clear(0);
  }

  // A sum of one piece, or null if it is not wanted; of piece 0, after `run`, that over all positions.
  A* at(Sum sum, int64_t piece = 0) const {
    return places_[sum] < 0 ? nullptr : sums_.get() + piece * whole_ + places_[sum];
  }

  // Calls `add(piece, begin, end)` for the positions of every piece, then sums everything up. `work` is that of a position.
  template <typename Add>
  void run(int64_t work, const Add& add) const {
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, per_piece_ * work));
    at::parallel_for(0, pieces_, grain, [&](int64_t first, int64_t last) {
      const FlushTiny flush;
      for (int64_t piece = first; piece < last; ++piece) {
        const int64_t begin = piece * per_piece_, end = std::min(rows_, begin + per_piece_);
        clear(piece);
        if (begin < end) {
          add(piece, begin, end);
        }
      }
    });
    at::parallel_for(0, whole_, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t piece = 1; piece < pieces_; ++piece) {
        const A* more = sums_.get() + piece * whole_;
        for (int64_t at = begin; at < end; ++at) {
          sums_.get()[at] += more[at];
        }
      }
    });
  }

 private:
  int64_t pieces_, per_piece_, rows_, size_, whole_;
  std::array<int64_t, kSums> places_;
  Buffer<A> sums_;

  void clear(int64_t piece) const { std::fill(sums_.get() + piece * whole_, sums_.get() + (piece + 1) * whole_, A(0)); }
};

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

} // namespace
} // namespace attnres
