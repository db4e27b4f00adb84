// attnres::mix and attnres::mix_backward for the CPU: every source row comes from memory once and stays in the cache for
// its second use. What these kernels do not take (mixed dtypes, one source, anything malformed) goes to the reference
// operators, which compute it or raise; so the two can differ in nothing but rounding and speed.
#include "mix_backward.h"
#include "mix_forward.h"

#include <c10/core/GradMode.h>
#include <torch/library.h>

namespace attnres {
namespace {

constexpr int64_t kMixArguments = 7;

void to_reference(const char* name, torch::jit::Stack* stack) {
  const auto reference = c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
  reference.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
}

void mix(const c10::OperatorHandle&, torch::jit::Stack* stack) {
  const Arguments arguments(stack->data() + stack->size() - kMixArguments);
  if (!served(arguments)) {
    return to_reference("attnres::mix_reference", stack);
  }
  at::Tensor result;
  switch (arguments.first().scalar_type()) {
    case at::kFloat:
      result = forward<float>(arguments);
      break;
    case at::kDouble:
      result = forward<double>(arguments);
      break;
    case at::kHalf:
      result = forward<at::Half>(arguments);
      break;
    default:
      result = forward<at::BFloat16>(arguments);
  }
  torch::jit::drop(*stack, kMixArguments);
  stack->emplace_back(std::move(result));
}

bool fits(const at::Tensor& grad, const Arguments& a) {
  const bool several = a.query.dim() == 2;
  const at::IntArrayRef shape = a.first().sizes();
  return plain(grad) && grad.scalar_type() == a.first().scalar_type() &&
      grad.dim() == static_cast<int64_t>(shape.size()) + several && grad.sizes().slice(several) == shape &&
      (!several || grad.size(0) == a.queries());
}

void mix_backward(const c10::OperatorHandle&, torch::jit::Stack* stack) {
  const c10::IValue* from = stack->data() + stack->size() - kMixArguments - 1;
  const at::Tensor& grad = from[0].toTensor();
  const Arguments arguments(from + 1);
  if (!served(arguments) || !fits(grad, arguments)) {
    return to_reference("attnres::mix_backward_reference", stack);
  }
  Tensors grads;
  switch (arguments.first().scalar_type()) {
    case at::kFloat:
      grads = backward<float>(grad, arguments);
      break;
    case at::kDouble:
      grads = backward<double>(grad, arguments);
      break;
    case at::kHalf:
      grads = backward<at::Half>(grad, arguments);
      break;
    default:
      grads = backward<at::BFloat16>(grad, arguments);
  }
  c10::List<at::Tensor> list;
  list.reserve(grads.size());
  for (at::Tensor& tensor : grads) {
    list.push_back(std::move(tensor));
  }
  torch::jit::drop(*stack, kMixArguments + 1);
  stack->emplace_back(std::move(list));
}

// Whether autograd has anything to do with a value on the stack: a gradient to record, or a tangent to carry.
bool differentiates(const at::Tensor& tensor, bool grad_mode) {
  return tensor.defined() && ((grad_mode && tensor.requires_grad()) || tensor._fw_grad(0).defined());
}

bool differentiates(const torch::jit::Stack& stack, int64_t count) {
  const bool grad_mode = c10::GradMode::is_enabled();
  for (const c10::IValue& value : torch::jit::last(stack, count)) {
    if (value.isTensor()) {
      if (differentiates(value.toTensor(), grad_mode)) {
        return true;
      }
    } else if (value.isTensorList()) {
      for (const c10::IValue& item : value.toListRef()) {
        if (differentiates(item.toTensor(), grad_mode)) {
          return true;
        }
      }
    }
  }
  return false;
}

// Compiled graphs dispatch through autograd on every call, mostly to find nothing to do. Whatever there is to do is done
// by the operator `Python`, which is written in Python.
template <const char* Python, int64_t Count>
void through_autograd(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  if (differentiates(*stack, Count)) {
    c10::Dispatcher::singleton().findSchemaOrThrow(Python, "").callBoxed(stack);
  } else {
    op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
  }
}

constexpr char kMixAutograd[] = "attnres::mix_autograd";
constexpr char kMixBackwardAutograd[] = "attnres::mix_backward_autograd";

} // namespace
} // namespace attnres

TORCH_LIBRARY_IMPL(attnres, AutogradCPU, m) {
  using namespace attnres;
  m.impl("mix", torch::CppFunction::makeFromBoxedFunction<&through_autograd<kMixAutograd, kMixArguments>>());
  m.impl("mix_backward",
         torch::CppFunction::makeFromBoxedFunction<&through_autograd<kMixBackwardAutograd, kMixArguments + 1>>());
}

TORCH_LIBRARY_IMPL(attnres, CPU, m) {
  m.impl("mix", torch::CppFunction::makeFromBoxedFunction<&attnres::mix>());
  m.impl("mix_backward", torch::CppFunction::makeFromBoxedFunction<&attnres::mix_backward>());
}
