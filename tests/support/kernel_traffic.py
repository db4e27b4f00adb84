"""Count what Triton kernels load and store, in the interpreter, by tensor."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator, Mapping
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter


class Counter:
    """Bytes loaded and stored by name of tensor; what lies in none of them is named "other"."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.loaded: collections.Counter[str] = collections.Counter()
        self.stored: collections.Counter[str] = collections.Counter()
        self._ranges = []
        for name, tensor in tensors.items():
            start = tensor.untyped_storage().data_ptr()
            self._ranges.append((start, start + tensor.untyped_storage().nbytes(), name))

    def add(self, counter: collections.Counter[str], pointers: interpreter.TensorHandle, mask: np.ndarray) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = np.broadcast_to(pointers.data, mask.shape)[mask]
        if not addresses.size:
            return
        first = int(addresses.flat[0])
        name = next((name for start, stop, name in self._ranges if start <= first < stop), "other")
        counter[name] += addresses.size * size


@contextlib.contextmanager
def counting(tensors: Mapping[str, torch.Tensor]) -> Iterator[Counter]:
    """Count the loads and stores of every kernel that the interpreter runs inside the block."""
    counter = Counter(tensors)
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def counted_load(self, pointers, mask, *rest):  # type: ignore[no-untyped-def]
        counter.add(counter.loaded, pointers, mask.data)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):  # type: ignore[no-untyped-def]
        counter.add(counter.stored, pointers, mask.data)
        return store(self, pointers, value, mask, *rest)

    with mock.patch.multiple(builder, create_masked_load=counted_load, create_masked_store=counted_store):
        yield counter
