// The arguments of the operators as they come from the dispatcher, checked, and their rows and parameters made ready.
#pragma once

#include "rows.h"

#include <algorithm>
#include <new>

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

namespace attnres {
namespace {

using Tensors = c10::SmallVector<at::Tensor, 24>;

// Work of about this many elements is worth waking a thread.
constexpr int64_t kGrain = 32768;

// While one lives, results too small for a normal number become zero, on this thread. A sharp softmax makes many of them
// (weights of 1e-40), and a processor takes some hundred cycles for each; what is lost is below 2e-38.
class FlushTiny {
 public:
#if defined(__SSE2__)
  FlushTiny() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8000); }
  ~FlushTiny() { _mm_setcsr(before_); }

 private:
  unsigned int before_;
#else
  FlushTiny() {}
  ~FlushTiny() {}

 public:
#endif
  FlushTiny(const FlushTiny&) = delete;
  FlushTiny& operator=(const FlushTiny&) = delete;
};

template <typename A>
class Buffer {
 public:
  explicit Buffer(int64_t size, bool zero = false)
      : data_(static_cast<A*>(::operator new(sizeof(A) * std::max<int64_t>(size, 1), kAlign))) {
    if (zero) {
      std::fill(data_, data_ + size, A(0));
    }
  }
  ~Buffer() { ::operator delete(data_, kAlign); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  A* get() const { return data_; }

 private:
  static constexpr std::align_val_t kAlign{64};
  A* data_;
};

struct Options {
  double eps, logit_scale;
  bool normalize;
  double factor;

  Options(const c10::IValue* from, double factor)
      : eps(from[0].toDouble()), logit_scale(from[1].toDouble()), normalize(from[2].toBool()), factor(factor) {}
};

const at::Tensor* tensor_or_null(const c10::IValue& value) {
  return value.isNone() ? nullptr : &value.toTensor();
}

// The arguments common to all operators, unowned: the stack keeps them alive.
struct Arguments {
  c10::ArrayRef<c10::IValue> sources;
  const at::Tensor& query;
  const at::Tensor* gain;
  Options options;

  Arguments(const c10::IValue* from, const Options& options)
      : sources(from[0].toListRef()), query(from[1].toTensor()), gain(tensor_or_null(from[2])), options(options) {}
  Arguments(const c10::IValue* from, double factor) : Arguments(from, Options(from + 3, factor)) {}

  int64_t count() const { return static_cast<int64_t>(sources.size()); }
  const at::Tensor& first() const { return sources[0].toTensor(); }
  int64_t width() const { return first().size(-1); }
  int64_t rows() const { return first().numel() / width(); }
  int64_t queries() const { return query.dim() == 2 ? query.size(0) : 1; }
};

bool plain(const at::Tensor& tensor) {
  return tensor.defined() && tensor.device().is_cpu() && tensor.layout() == at::kStrided;
}

bool floating(at::ScalarType type) {
  return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf || type == at::kDouble;
}

// Whether the kernels below serve this call.
bool served(const Arguments& a) {
  if (a.sources.empty() || !(a.options.eps >= 0)) {
    return false;
  }
  const at::Tensor& first = a.first();
  if (!plain(first) || first.dim() == 0 || first.size(-1) == 0 || !floating(first.scalar_type())) {
    return false;
  }
  for (const c10::IValue& value : a.sources.slice(1)) {
    const at::Tensor& source = value.toTensor();
    if (!plain(source) || source.scalar_type() != first.scalar_type() || source.sizes() != first.sizes()) {
      return false;
    }
  }
  const auto parameter = [&](const at::Tensor& p) {
    return plain(p) && floating(p.scalar_type()) && (p.dim() == 1 || p.dim() == 2) && p.size(0) > 0 &&
        p.size(-1) == first.size(-1);
  };
  if (!parameter(a.query)) {
    return false;
  }
  return a.gain == nullptr || (parameter(*a.gain) && (a.gain->dim() == 1 || a.gain->sizes() == a.query.sizes()));
}

// Where the positions of a tensor [..., d] or [...] are. Leading dimensions that step evenly are one stride; others
// are walked.
class Rows {
 public:
  explicit Rows(const at::Tensor& tensor, bool scalars = false)
      : data_(static_cast<const char*>(tensor.const_data_ptr())) {
    const int64_t size = static_cast<int64_t>(tensor.element_size()), leading = tensor.dim() - (scalars ? 0 : 1);
    int64_t span = 1;
    for (int64_t dim = leading - 1; dim >= 0; --dim) {
      const int64_t length = tensor.size(dim), stride = tensor.stride(dim) * size;
      if (length == 1) {
        continue;
      }
      if (span == 1) {
        stride_ = stride;
      } else if (stride != stride_ * span) {
        even_ = false;
      }
      span *= length;
    }
    if (!even_) {
      for (int64_t dim = 0; dim < leading; ++dim) {
        sizes_.push_back(tensor.size(dim));
        strides_.push_back(tensor.stride(dim) * size);
      }
    }
  }

  const void* at(int64_t row) const {
    if (even_) {
      return data_ + row * stride_;
    }
    const char* place = data_;
    for (int64_t dim = static_cast<int64_t>(sizes_.size()) - 1; dim >= 0; --dim) {
      const int64_t rest = row / sizes_[dim];
      place += (row - rest * sizes_[dim]) * strides_[dim];
      row = rest;
    }
    return place;
  }

 private:
  const char* data_;
  bool even_ = true;
  int64_t stride_ = 0;
  c10::SmallVector<int64_t, 4> sizes_, strides_;
};

// The rows of a tensor. One whose last dimension is not dense is copied first; `keep` owns the copy.
Rows rows_of(const at::Tensor& tensor, Tensors& keep) {
  if (tensor.stride(-1) == 1 || tensor.size(-1) == 1) {
    return Rows(tensor);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  keep.push_back(tensor.contiguous());
  return Rows(keep.back());
}

template <typename T>
const T* row_at(const Rows& rows, int64_t row) {
  return static_cast<const T*>(rows.at(row));
}

using Places = c10::SmallVector<Rows, 16>;

Places rows_of(const Arguments& a, Tensors& keep) {
  Places places;
  places.reserve(a.count());
  for (const c10::IValue& value : a.sources) {
    places.push_back(rows_of(value.toTensor(), keep));
  }
  return places;
}

// What phase 1 has read, one more source for phase 2: its value is known already, and its logit is the log-sum-exp.
struct Known {
  const at::Tensor& mixed;
  const at::Tensor& lse;

  explicit Known(const c10::IValue* from) : mixed(from[0].toTensor()), lse(from[1].toTensor()) {}
};

struct KnownRows {
  Rows mixed, lse;

  KnownRows(const Known& known, Tensors& keep) : mixed(rows_of(known.mixed, keep)), lse(known.lse, true) {}
};

template <typename A, typename P>
void widen_as(const at::Tensor& from, A* to, int64_t padded) {
  const int64_t count = from.dim() == 2 ? from.size(0) : 1, width = from.size(-1), step = from.stride(-1);
  for (int64_t m = 0; m < count; ++m) {
    const P* row = from.const_data_ptr<P>() + (from.dim() == 2 ? m * from.stride(0) : 0);
    if (step == 1) {
      std::copy(row, row + width, to + m * padded);
    } else {
      for (int64_t j = 0; j < width; ++j) {
        to[m * padded + j] = static_cast<A>(row[j * step]);
      }
    }
    std::fill(to + m * padded + width, to + (m + 1) * padded, A(0));
  }
}

// A parameter [d] or [M, d] in the statistics' type, rows padded with zeros and arranged for rows of T.
template <typename T>
void widen(const at::Tensor& from, Acc<T>* to, int64_t padded) {
  switch (from.scalar_type()) {
    case at::kFloat:
      widen_as<Acc<T>, float>(from, to, padded);
      break;
    case at::kDouble:
      widen_as<Acc<T>, double>(from, to, padded);
      break;
    case at::kHalf:
      widen_as<Acc<T>, at::Half>(from, to, padded);
      break;
    default:
      widen_as<Acc<T>, at::BFloat16>(from, to, padded);
  }
  for (int64_t m = 0; m < from.numel() / from.size(-1); ++m) {
    arrange<T>(to + m * padded, padded);
  }
}

// Query, gain and their product, one padded row per query.
template <typename T>
struct Parameters {
  using A = Acc<T>;
  int64_t queries, padded;
  Buffer<A> query, gain_rows, product;
  bool has_gain, gain_per_query;

  Parameters(const Arguments& a, int64_t padded)
      : queries(a.queries()),
        padded(padded),
        query(queries * padded),
        gain_rows(a.gain == nullptr ? 0 : queries * padded),
        product(a.gain == nullptr ? 0 : queries * padded),
        has_gain(a.gain != nullptr),
        gain_per_query(has_gain && a.gain->dim() == 2) {
    widen<T>(a.query, query.get(), padded);
    if (has_gain) {
      widen<T>(*a.gain, gain_rows.get(), padded);
      for (int64_t m = 0; m < queries; ++m) {
        A* to = product.get() + m * padded;
        for (int64_t j = 0; j < padded; ++j) {
          to[j] = query.get()[m * padded + j] * gain(m)[j];
        }
      }
    }
  }
  const A* keyed(int64_t m) const { return (has_gain ? product : query).get() + m * padded; }
  const A* gain(int64_t m) const { return has_gain ? gain_rows.get() + (gain_per_query ? m * padded : 0) : nullptr; }
};

} // namespace
} // namespace attnres
