// attnres::mix, its two phases, attnres::mix_norm and their gradients for the CPU: every source row comes from memory once
// and stays in the cache for its further uses. What these kernels do not take (mixed dtypes, anything malformed) goes to the
// reference operators, which compute it or raise; so the two can differ only in rounding and speed. The forwards named
// _into are the same kernels, writing to the tensors at the end of their arguments.
#include "autograd.h"
#include "backward.h"
#include "forward.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <array>

namespace attnres {
namespace {

// The lengths of the argument lists; a backward has its gradients in front.
constexpr int64_t kMix = 7, kPhase1 = 6, kPhase2 = 9, kNorm = 14, kNormBackward = 15;
// Results to be written come last.
constexpr int64_t kMixInto = kMix + 1, kPhase1Into = kPhase1 + 2, kPhase2Into = kPhase2 + 1, kNormInto = kNorm + 2;

void to_reference(const char* name, torch::jit::Stack* stack) {
  const auto reference = c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
  reference.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
}

// `run` for the storage type of the sources, of which it is given a zero.
template <typename Run>
auto by_type(const Arguments& a, const Run& run) {
  switch (a.first().scalar_type()) {
    case at::kFloat:
      return run(float());
    case at::kDouble:
      return run(double());
    case at::kHalf:
      return run(at::Half());
    default:
      return run(at::BFloat16());
  }
}

at::Tensor empty_rows(const Arguments& a) {
  return at::detail::empty_cpu(a.first().sizes(), a.first().scalar_type());
}

// The results in place of the arguments.
void answer(torch::jit::Stack* stack, int64_t count, at::Tensor result) {
  torch::jit::drop(*stack, count);
  stack->emplace_back(std::move(result));
}

void answer(torch::jit::Stack* stack, int64_t count, Tensors results) {
  c10::List<at::Tensor> list;
  list.reserve(results.size());
  for (at::Tensor& tensor : results) {
    list.push_back(std::move(tensor));
  }
  torch::jit::drop(*stack, count);
  stack->emplace_back(std::move(list));
}

// Whether a tensor has the sources' dtype and, after `skip` dimensions, their shape.
bool like_sources(const at::Tensor& tensor, const Arguments& a, int64_t skip = 0) {
  const at::IntArrayRef shape = a.first().sizes();
  return plain(tensor) && tensor.scalar_type() == a.first().scalar_type() &&
      tensor.dim() == static_cast<int64_t>(shape.size()) + skip && tensor.sizes().slice(skip) == shape;
}

// Whether a tensor has the statistics' dtype and one element per position.
bool like_statistics(const at::Tensor& tensor, const Arguments& a) {
  const at::IntArrayRef shape = a.first().sizes();
  return plain(tensor) && tensor.sizes() == shape.slice(0, shape.size() - 1) &&
      tensor.scalar_type() == (a.first().scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

// Whether a tensor can be written as a result that is like the sources, or like their statistics.
bool takes_rows(const at::Tensor& out, const Arguments& a, int64_t skip = 0) {
  return like_sources(out, a, skip) && out.is_contiguous();
}

bool takes_statistics(const at::Tensor& out, const Arguments& a) {
  return like_statistics(out, a) && out.is_contiguous();
}

// Whether two tensors share no element; `in_place`: or all of them, in one and the same order.
bool apart(const at::Tensor& out, const at::Tensor& other, bool in_place = false) {
  switch (at::get_overlap_status(out, other)) {
    case at::MemOverlapStatus::No:
      return true;
    case at::MemOverlapStatus::Full:
      return in_place || out.numel() == 0;
    case at::MemOverlapStatus::Partial:
      return false;
    default: {  // a view with gaps: everything from its first to its last element counts as its own
      const char* begin = static_cast<const char*>(other.const_data_ptr());
      int64_t last = 0;
      for (int64_t dim = 0; dim < other.dim(); ++dim) {
        last += (other.size(dim) - 1) * other.stride(dim);
      }
      const char* from = static_cast<const char*>(out.const_data_ptr());
      return !out.is_alias_of(other) || begin + (last + 1) * other.element_size() <= from || from + out.nbytes() <= begin;
    }
  }
}

// Kernels write before they have read everything: what is written must not be read, nor written twice. Only a partial sum
// may be completed in the memory of its last source.
void check_apart(at::ArrayRef<at::Tensor> outputs, const Arguments& a, const Known* known = nullptr,
                 const at::Tensor* delta = nullptr, const at::Tensor* partial = nullptr) {
  for (size_t i = 0; i < outputs.size(); ++i) {
    const at::Tensor& out = outputs[i];
    bool right = delta == nullptr || apart(out, *delta);
    right = right && (known == nullptr || (apart(out, known->mixed) && apart(out, known->lse)));
    for (int64_t k = 0; k < a.count(); ++k) {
      right = right && apart(out, a.sources[k].toTensor(), k + 1 == a.count() && partial != nullptr && out.is_same(*partial));
    }
    for (size_t j = 0; j < i; ++j) {
      right = right && apart(out, outputs[j]);
    }
    TORCH_CHECK_VALUE(right, "attnres: an output overlaps a tensor that is read, or another output; only partial_out may, "
                      "where it is the last source, contiguous and whole");
  }
}

// One source that is not normalised is the mix, whatever the query is.
bool mix_served(const Arguments& a) {
  return served(a) && (a.count() > 1 || a.options.normalize);
}

bool phase2_served(const Known& known, const Arguments& a) {
  return served(a) && a.query.dim() == 1 && like_sources(known.mixed, a) && like_statistics(known.lse, a);
}

void mix(const c10::OperatorHandle&, torch::jit::Stack* stack) {
  const c10::IValue* from = stack->data() + stack->size() - kMix;
  const Arguments a(from, from[6].toDouble());
  if (!mix_served(a)) {
    return to_reference("attnres::mix_reference", stack);
  }
  const at::IntArrayRef shape = a.first().sizes();
  c10::SmallVector<int64_t, 6> sizes(shape.begin(), shape.end());
  if (a.query.dim() == 2) {
    sizes.insert(sizes.begin(), a.queries());
  }
  at::Tensor out = at::detail::empty_cpu(sizes, a.first().scalar_type());
  by_type(a, [&](auto zero) { mix_forward<decltype(zero)>(a, out); });
  answer(stack, kMix, std::move(out));
}

void mix_into(const c10::OperatorHandle&, torch::jit::Stack* stack) {
  const c10::IValue* from = stack->data() + stack->size() - kMixInto;
  const Arguments a(from, from[6].toDouble());
  const at::Tensor& out = from[kMix].toTensor();
  const bool several = a.query.dim() == 2;
  if (!mix_served(a) || !takes_rows(out, a, several) || (several && out.size(0) != a.queries())) {
    return to_reference("attnres::mix_into_reference", stack);
  }
  check_apart(out, a);
  by_type(a, [&](auto zero) { mix_forward<decltype(zero)>(a, out); });
  torch::jit::drop(*stack, kMixInto);
}

void mix_backward(const c10::OperatorHandle&, torch::jit::Stack* stack) {
  const c10::IValue* from = stack->data() + stack->size() - kMix - 1;
  const at::Tensor& grad = from[0].toTensor();
  const Arguments a(from + 1, from[7].toDouble());
  const bool several = a.query.dim() == 2;
  if (!mix_served(a) || !like_sources(grad, a, several) || (several && grad.size(0) != a.queries())) {
    return to_reference("attnres::mix_backward_reference", stack);
  }
  Tensors grads{grad};
  if (several) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto each = grad.unbind(0);
    grads.assign(each.begin(), each.end());
  }
  answer(stack, kMix + 1, by_type(a, [&](auto zero) { return backward<decltype(zero)>(grads, {}, nullptr, a); }));
}

void phase1(const c10::OperatorHandle&, torch::jit::Stack* stack) {
  const Arguments a(stack->data() + stack->size() - kPhase1, 1);
  if (!served(a) || a.query.dim() != 2) {
    return to_reference("attnres::mix_phase1_reference", stack);
  }
  const at::IntArrayRef shape = a.first().sizes();
  const at::ScalarType statistics = a.first().scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const int64_t count = a.queries();
  Tensors made;
  made.reserve(2 * count);
  for (int64_t m = 0; m < 2 * count; ++m) {
    made.push_back(m < count ? empty_rows(a) : at::detail::empty_cpu(shape.slice(0, shape.size() - 1), statistics));
  }
  const at::ArrayRef<at::Tensor> results(made);
  by_type(a, [&](auto zero) { phase1_forward<decltype(zero)>(a, results.slice(0, count), results.slice(count)); });
  answer(stack, kPhase1, std::move(made));
}

void phase1_into(const c10::OperatorHandle&, torch::jit::Stack* stack) {
  const c10::IValue* from = stack->data() + stack->size() - kPhase1Into;
  const Arguments a(from, 1);
  const std::vector<at::Tensor> mixed = from[kPhase1].toTensorVector(), lse = from[kPhase1 + 1].toTensorVector();
  const auto fit = [&] {
    const size_t count = a.queries();
    return mixed.size() == count && lse.size() == count &&
        std::all_of(mixed.begin(), mixed.end(), [&](const at::Tensor& out) { return takes_rows(out, a); }) &&
        std::all_of(lse.begin(), lse.end(), [&](const at::Tensor& out) { return takes_statistics(out, a); });
  };
  if (!served(a) || a.query.dim() != 2 || !fit()) {
    return to_reference("attnres::mix_phase1_into_reference", stack);
  }
  std::vector<at::Tensor> outputs(mixed);
  outputs.insert(outputs.end(), lse.begin(), lse.end());
  check_apart(outputs, a);
  by_type(a, [&](auto zero) { phase1_forward<decltype(zero)>(a, mixed, lse); });
  torch::jit::drop(*stack, kPhase1Into);
}

void phase1_backward(const c10::OperatorHandle&, torch::jit::Stack* stack) {
  const c10::IValue* from = stack->data() + stack->size() - kPhase1 - 1;
  const std::vector<at::Tensor> given = from[0].toTensorVector();
  const Arguments a(from + 1, 1);
  const size_t count = a.queries();
  const at::ArrayRef<at::Tensor> listed(given);
  const auto fit = [&] {
    return given.size() == 2 * count &&
        std::all_of(given.begin(), given.begin() + count, [&](const at::Tensor& grad) { return like_sources(grad, a); }) &&
        std::all_of(given.begin() + count, given.end(), [&](const at::Tensor& grad) { return like_statistics(grad, a); });
  };
  if (!served(a) || a.query.dim() != 2 || !fit()) {
    return to_reference("attnres::mix_phase1_backward_reference", stack);
  }
  answer(stack, kPhase1 + 1, by_type(a, [&](auto zero) {
    return backward<decltype(zero)>(listed.slice(0, count), listed.slice(count), nullptr, a);
  }));
}

void phase2(const c10::OperatorHandle&, torch::jit::Stack* stack) {
  const c10::IValue* from = stack->data() + stack->size() - kPhase2;
  const Known known(from);
  const Arguments a(from + 2, from[8].toDouble());
  if (!phase2_served(known, a)) {
    return to_reference("attnres::mix_phase2_reference", stack);
  }
  at::Tensor out = empty_rows(a);
  by_type(a, [&](auto zero) { phase2_forward<decltype(zero)>(known, a, out); });
  answer(stack, kPhase2, std::move(out));
}

void phase2_into(const c10::OperatorHandle&, torch::jit::Stack* stack) {
  const c10::IValue* from = stack->data() + stack->size() - kPhase2Into;
  const Known known(from);
  const Arguments a(from + 2, from[8].toDouble());
  const at::Tensor& out = from[kPhase2].toTensor();
  if (!phase2_served(known, a) || !takes_rows(out, a)) {
    return to_reference("attnres::mix_phase2_into_reference", stack);
  }
  check_apart(out, a, &known);
  by_type(a, [&](auto zero) { phase2_forward<decltype(zero)>(known, a, out); });
  torch::jit::drop(*stack, kPhase2Into);
}

void phase2_backward(const c10::OperatorHandle&, torch::jit::Stack* stack) {
  const c10::IValue* from = stack->data() + stack->size() - kPhase2 - 1;
  const at::Tensor& grad = from[0].toTensor();
  const Known known(from + 1);
  const Arguments a(from + 3, from[9].toDouble());
  if (!phase2_served(known, a) || !like_sources(grad, a)) {
    return to_reference("attnres::mix_phase2_backward_reference", stack);
  }
  answer(stack, kPhase2 + 1, by_type(a, [&](auto zero) { return backward<decltype(zero)>(grad, {}, &known, a); }));
}

std::optional<Known> known_or_none(const c10::IValue* from) {
  return from[0].isNone() ? std::nullopt : std::optional<Known>(from);
}

// Both mixed and lse are given, or neither.
bool norm_served(const Arguments& a, const c10::IValue* known, const NormArguments& norm) {
  const auto parameter = [&](const at::Tensor* p) {
    return p == nullptr || (plain(*p) && floating(p->scalar_type()) && p->dim() == 1 && p->size(0) == a.width());
  };
  const bool early = !known[0].isNone();
  if (early != !known[1].isNone()) {
    return false;
  }
  return (early ? phase2_served(Known(known), a) : mix_served(a) && a.query.dim() == 1) && parameter(norm.weight) &&
      parameter(norm.bias);
}

// The arguments of attnres::mix_norm.
struct NormCall {
  const c10::IValue* from;
  const Arguments a;
  const at::Tensor* delta;
  const NormArguments norm;

  explicit NormCall(const c10::IValue* from)
      : from(from),
        a(from, Options(from + 8, from[11].toDouble())),
        delta(tensor_or_null(from[3])),
        norm(from + 6, from + 12) {}

  bool served() const { return norm_served(a, from + 4, norm) && (delta == nullptr || like_sources(*delta, a)); }
  void write(const at::Tensor& normed, const at::Tensor* partial) const {
    const auto known = known_or_none(from + 4);
    by_type(a, [&](auto zero) {
      mix_norm_forward<decltype(zero)>(a, delta, known ? &*known : nullptr, norm, normed, partial);
    });
  }
};

void mix_norm(const c10::OperatorHandle&, torch::jit::Stack* stack) {
  const NormCall call(stack->data() + stack->size() - kNorm);
  if (!call.served()) {
    return to_reference("attnres::mix_norm_reference", stack);
  }
  Tensors made{empty_rows(call.a)};
  if (call.delta != nullptr) {
    made.push_back(empty_rows(call.a));
  }
  call.write(made[0], call.delta == nullptr ? nullptr : &made[1]);
  answer(stack, kNorm, std::move(made));
}

void mix_norm_into(const c10::OperatorHandle&, torch::jit::Stack* stack) {
  const c10::IValue* from = stack->data() + stack->size() - kNormInto;
  const NormCall call(from);
  const at::Tensor& normed = from[kNorm].toTensor();
  const at::Tensor* partial = tensor_or_null(from[kNorm + 1]);
  if (!call.served() || !takes_rows(normed, call.a) || (call.delta == nullptr) != (partial == nullptr) ||
      (partial != nullptr && !takes_rows(*partial, call.a))) {
    return to_reference("attnres::mix_norm_into_reference", stack);
  }
  const auto known = known_or_none(from + 4);
  std::array<at::Tensor, 2> outputs{normed, partial == nullptr ? at::Tensor() : *partial};
  check_apart(at::ArrayRef<at::Tensor>(outputs.data(), partial == nullptr ? 1 : 2), call.a, known ? &*known : nullptr,
              call.delta, partial);
  call.write(normed, partial);
  torch::jit::drop(*stack, kNormInto);
}

void mix_norm_backward(const c10::OperatorHandle&, torch::jit::Stack* stack) {
  const c10::IValue* from = stack->data() + stack->size() - kNormBackward;
  const Arguments a(from + 2, Options(from + 9, from[12].toDouble()));
  const at::Tensor& grad = from[0].toTensor();
  const NormBackward above{NormArguments(from + 7, from + 13), tensor_or_null(from[1])};
  const auto fits = [&](const at::Tensor* given) { return given == nullptr || like_sources(*given, a); };
  if (!norm_served(a, from + 5, above.norm) || !fits(&grad) || !fits(above.partial_grad)) {
    return to_reference("attnres::mix_norm_backward_reference", stack);
  }
  const auto known = known_or_none(from + 5);
  answer(stack, kNormBackward, by_type(a, [&](auto zero) {
    return backward<decltype(zero)>(grad, {}, known ? &*known : nullptr, a, &above);
  }));
}

// torch's own products, written to a given matrix. `out=` would give a tensor of another shape that of the product.
void check_product(const at::Tensor& left, const at::Tensor& right, const at::Tensor& product_out) {
  const std::array<int64_t, 2> shape{left.size(0), right.size(1)};
  TORCH_CHECK_VALUE(product_out.sizes() == at::IntArrayRef(shape) && product_out.scalar_type() == left.scalar_type(),
                    "attnres: product_out has the shape ", product_out.sizes(), " and the dtype ", product_out.scalar_type(),
                    ", expected ", at::IntArrayRef(shape), " and ", left.scalar_type());
}

void mm_into(const at::Tensor& left, const at::Tensor& right, at::Tensor product_out) {
  check_product(left, right, product_out);
  at::mm_out(product_out, left, right);
}

void addmm_into(const at::Tensor& bias, const at::Tensor& left, const at::Tensor& right, const at::Scalar& beta,
                const at::Scalar& alpha, at::Tensor product_out) {
  check_product(left, right, product_out);
  at::addmm_out(product_out, bias, left, right, beta, alpha);
}

constexpr char kMixAutograd[] = "attnres::mix_autograd";
constexpr char kMixBackwardAutograd[] = "attnres::mix_backward_autograd";
constexpr char kPhase1Autograd[] = "attnres::mix_phase1_autograd";
constexpr char kPhase1BackwardAutograd[] = "attnres::mix_phase1_backward_autograd";
constexpr char kPhase2Autograd[] = "attnres::mix_phase2_autograd";
constexpr char kPhase2BackwardAutograd[] = "attnres::mix_phase2_backward_autograd";
constexpr char kNormAutograd[] = "attnres::mix_norm_autograd";
constexpr char kNormBackwardAutograd[] = "attnres::mix_norm_backward_autograd";

} // namespace
} // namespace attnres

TORCH_LIBRARY_IMPL(attnres, AutogradCPU, m) {
  using namespace attnres;
  m.impl("mix", recording<kMixAutograd, kMix>());
  m.impl("mix_backward", recording<kMixBackwardAutograd, kMix + 1>());
  m.impl("mix_phase1", recording<kPhase1Autograd, kPhase1>());
  m.impl("mix_phase1_backward", recording<kPhase1BackwardAutograd, kPhase1 + 1>());
  m.impl("mix_phase2", recording<kPhase2Autograd, kPhase2>());
  m.impl("mix_phase2_backward", recording<kPhase2BackwardAutograd, kPhase2 + 1>());
  m.impl("mix_norm", recording<kNormAutograd, kNorm>());
  m.impl("mix_norm_backward", recording<kNormBackwardAutograd, kNormBackward>());
  m.impl("mix_into", refusing<kMixInto, 1>());
  m.impl("mix_phase1_into", refusing<kPhase1Into, 2>());
  m.impl("mix_phase2_into", refusing<kPhase2Into, 1>());
  m.impl("mix_norm_into", refusing<kNormInto, 2>());
  m.impl("mm_into", refusing<3, 1>());
  m.impl("addmm_into", refusing<6, 1>());
}

TORCH_LIBRARY_IMPL(attnres, CPU, m) {
  m.impl("mix", torch::CppFunction::makeFromBoxedFunction<&attnres::mix>());
  m.impl("mix_backward", torch::CppFunction::makeFromBoxedFunction<&attnres::mix_backward>());
  m.impl("mix_phase1", torch::CppFunction::makeFromBoxedFunction<&attnres::phase1>());
  m.impl("mix_phase1_backward", torch::CppFunction::makeFromBoxedFunction<&attnres::phase1_backward>());
  m.impl("mix_phase2", torch::CppFunction::makeFromBoxedFunction<&attnres::phase2>());
  m.impl("mix_phase2_backward", torch::CppFunction::makeFromBoxedFunction<&attnres::phase2_backward>());
  m.impl("mix_norm", torch::CppFunction::makeFromBoxedFunction<&attnres::mix_norm>());
  m.impl("mix_norm_backward", torch::CppFunction::makeFromBoxedFunction<&attnres::mix_norm_backward>());
  m.impl("mix_into", torch::CppFunction::makeFromBoxedFunction<&attnres::mix_into>());
  m.impl("mix_phase1_into", torch::CppFunction::makeFromBoxedFunction<&attnres::phase1_into>());
  m.impl("mix_phase2_into", torch::CppFunction::makeFromBoxedFunction<&attnres::phase2_into>());
  m.impl("mix_norm_into", torch::CppFunction::makeFromBoxedFunction<&attnres::mix_norm_into>());
  m.impl("mm_into", &attnres::mm_into);
  m.impl("addmm_into", &attnres::addmm_into);
}
