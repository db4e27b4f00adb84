// What runs under the autograd key: a check for anything to record, and the kernels below.
#pragma once

#include "arguments.h"

#include <c10/core/GradMode.h>
#include <torch/library.h>

namespace attnres {
namespace {

// Whether autograd has work with a value on the stack: a gradient to record, or a tangent to carry.
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

// Autograd finds out by the version that a tensor it has saved was written.
void bump_version(const at::Tensor& tensor) {
  if (tensor.defined() && !tensor.is_inference()) {
    tensor.unsafeGetTensorImpl()->bump_version();
  }
}

// What writes into given tensors has no gradient: it is for graphs below autograd, and must not drop one silently.
template <int64_t Count, int64_t Outputs>
void below_autograd(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  TORCH_CHECK(!differentiates(*stack, Count), op.operator_name().name, " writes into the tensors it is given and has no "
              "gradient; where autograd records, use the operator without _into");
  for (const c10::IValue& value : torch::jit::last(*stack, Outputs)) {
    if (value.isTensor()) {
      bump_version(value.toTensor());
    } else if (value.isTensorList()) {
      for (const c10::IValue& item : value.toListRef()) {
        bump_version(item.toTensor());
      }
    }
  }
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

template <const char* Python, int64_t Count>
torch::CppFunction recording() {
  return torch::CppFunction::makeFromBoxedFunction<&through_autograd<Python, Count>>();
}

template <int64_t Count, int64_t Outputs>
torch::CppFunction refusing() {
  return torch::CppFunction::makeFromBoxedFunction<&below_autograd<Count, Outputs>>();
}

} // namespace
} // namespace attnres
