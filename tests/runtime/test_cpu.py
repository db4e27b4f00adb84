"""The native CPU kernels: conformance, equality with the reference, determinism over threads, and how they are built."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.files_entered import files_entered
from torch import Tensor

from attnres_fx.conformance import CHECKS, HALF, ROUNDING, Check, Implementation
from attnres_fx.runtime.cpu import build, native
from attnres_fx.runtime.mix import MIX, MIX_BACKWARD, MIX_BACKWARD_REFERENCE, MIX_REFERENCE, mix

needs_compiler = pytest.mark.skipif(build.compiler() is None and not build.is_built(),
                                    reason="no C++ compiler here, and no library built before")
FAMILY = frozenset({"logit_scale", "normalize_values", "output_factor"})
NATIVE = Implementation("native", mix, options=FAMILY, dtypes=tuple(ROUNDING), queries=True)
REFERENCE = Implementation("reference", MIX_REFERENCE, options=FAMILY, dtypes=tuple(ROUNDING), queries=True)


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        yield


@needs_compiler
def test_the_kernels_are_native() -> None:
    assert native.ensure(), native.state().reason
    assert Path(native.state().library) == build.library_path()
    for name in ("attnres::mix", "attnres::mix_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")


@needs_compiler
@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_conformance(check: Check) -> None:
    assert native.ensure()
    check.run(NATIVE)


@pytest.mark.parametrize("check", [check for check in CHECKS if check.case.count < 10][::5], ids=str)
def test_conformance_of_the_reference(check: Check) -> None:
    check.run(REFERENCE)


def compare(sources: list[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any) -> None:
    """Native against reference: metadata exactly, numbers to rounding."""
    options = (*options, *(1e-6, 1.0, False, 1.0)[len(options):])
    got, want = MIX(sources, query, key_gain, *options), MIX_REFERENCE(sources, query, key_gain, *options)
    cotangent = torch.randn(want.shape).to(want.dtype)
    pairs = [(got, want), *zip(MIX_BACKWARD(cotangent, sources, query, key_gain, *options),
                               MIX_BACKWARD_REFERENCE(cotangent, sources, query, key_gain, *options), strict=True)]
    for a, b in pairs:
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        rtol = 2 * ROUNDING[a.dtype] if a.dtype in HALF else 1e-4 if a.dtype == torch.float32 else 1e-9
        scale = max(1.0, b.double().abs().max().item()) if b.numel() else 1.0
        torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=rtol * scale)


@needs_compiler
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_call_agrees_with_the_reference(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**20)))
    leading = data.draw(st.lists(st.integers(0, 4), max_size=3))
    width = data.draw(st.one_of(st.integers(2, 70), st.sampled_from([127, 513, 1000])))
    dtype = data.draw(st.sampled_from(list(ROUNDING)))
    queries, gain = data.draw(st.sampled_from([None, 1, 3])), data.draw(st.sampled_from([None, "one", "same"]))
    sources = []
    for _ in range(data.draw(st.integers(1, 20))):
        source = torch.randn(*leading, width).to(dtype)
        order = data.draw(st.permutations(range(len(leading))))
        inverse = sorted(range(len(leading)), key=order.__getitem__)
        sources.append(source.permute(*order, len(leading)).contiguous().permute(*inverse, len(leading)))
    query = torch.randn(*([] if queries is None else [queries]), width) / width**0.5
    key_gain = None if gain is None else torch.rand(query.shape if gain == "same" else (width,)) + 0.5
    compare(sources, query, key_gain, data.draw(st.sampled_from([1e-6, 1e-2])), data.draw(st.floats(-2, 2, width=16)),
            data.draw(st.booleans()), data.draw(st.floats(-2, 2, width=16)))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_on_any_number_of_threads(dtype: torch.dtype) -> None:
    """The pieces of the reduction depend on the input alone."""
    sources = [torch.randn(700, 64).to(dtype) for _ in range(5)]
    query, key_gain, cotangent = torch.randn(64), torch.rand(64), torch.randn(700, 64).to(dtype)
    options = (1e-6, 1.0, True, 1.0)
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append([MIX(sources, query, key_gain, *options),
                         *MIX_BACKWARD(cotangent, sources, query, key_gain, *options)])
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@needs_compiler
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)])
def test_what_the_kernels_do_not_take_runs_on_the_reference(dtypes: tuple[torch.dtype, ...]) -> None:
    assert native.ensure()
    mixed, query = [torch.randn(4, 24).to(dtype) for dtype in dtypes], torch.randn(24)
    assert torch.equal(mix(mixed, query), MIX_REFERENCE(mixed, query, None))
    with pytest.raises(ValueError, match=r"sources\[1\] has the shape"):
        mix([torch.ones(2, 24), torch.ones(3, 24)], query)
    with pytest.raises(ValueError, match="eps must not be negative"):
        mix(mixed, query, eps=-1.0)
    with pytest.raises(ValueError, match="grad has the shape"):
        MIX_BACKWARD(torch.ones(3), [torch.ones(2, 24)] * 2, query, None, 1e-6, 1.0, False, 1.0)


@needs_compiler
def test_logits_that_overflow_are_treated_as_softmax_does() -> None:
    big = torch.full((2, 16), 1e38)
    sources = [big, -big, torch.ones(2, 16)] * 9  # enough for several groups, the first of which weighs nothing
    for query in (torch.full((16,), 1e30), torch.full((16,), -1e30), torch.full((16,), float("inf"))):
        got, want = mix(sources, query), MIX_REFERENCE(sources, query, None)
        torch.testing.assert_close(got, want, equal_nan=True)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_sharp_softmax(dtype: torch.dtype) -> None:
    """Weights down to nothing, which the kernels flush to zero, and the caller's rounding mode as it was before."""
    compare([torch.randn(6, 1024).to(dtype) for _ in range(9)], torch.randn(1024), torch.rand(1024))
    assert (torch.tensor(1e-38) / 100).item() > 0


@needs_compiler
def test_rows_beyond_the_cache_and_groups() -> None:
    compare([torch.randn(3, 8192) for _ in range(7)], torch.randn(8192) / 90, torch.rand(8192))
    compare([torch.randn(2, 5000) for _ in range(40)], torch.randn(3, 5000) / 70, torch.rand(5000), 1e-6, 1.0, True, 2.0)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [None, 2])
def test_gradients_that_go_past_the_caches(dtype: torch.dtype, queries: int | None) -> None:
    """A position has the same gradients in a call whose results no cache holds and in one of its own."""
    count, width = 16, 1024
    held = max(os.sysconf(194), 2**25) // 8  # _SC_LEVEL3_CACHE_SIZE of Linux, for which Python has no name
    rows = held // (count * width * dtype.itemsize) + 9
    sources = [torch.randn(1, width).to(dtype).expand(rows, width) for _ in range(count - 1)]
    sources.append(torch.randn(rows, width).to(dtype))
    query = torch.randn(width) / 32 if queries is None else torch.randn(queries, width) / 32
    cotangent = torch.randn(*query.shape[:-1], rows, width).to(dtype)
    options = (None, 1e-6, 1.0, False, 1.0)
    got = MIX_BACKWARD(cotangent, sources, query, *options)
    for part in (slice(0, 8), slice(rows // 2, rows // 2 + 8), slice(rows - 8, rows)):
        want = MIX_BACKWARD(cotangent[..., part, :], [source[part] for source in sources], query, *options)
        assert all(torch.equal(a[part], b) for a, b in zip(got[:count], want[:count], strict=True))


# Building


def run(code: str, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False,
                          env={**os.environ, "ATTNRES_CACHE_DIR": str(cache), **environment})


TWO_CALLS = ("import torch, attnres_fx\nfrom attnres_fx.runtime.cpu import native\n"
             "x, q = [torch.randn(2, 8) for _ in range(3)], torch.randn(8)\n"
             "attnres_fx.mix(x, q), attnres_fx.mix(x, q)\nprint(native.state().status)\n")


@pytest.mark.parametrize("compiler", ["", "false"])
def test_without_a_working_compiler_there_is_one_warning_and_the_reference(tmp_path: Path, compiler: str) -> None:
    environment = {"CXX": compiler} if compiler else {"CXX": "no-such-compiler"}
    done = run(TWO_CALLS, tmp_path, **environment)
    assert done.stdout.split() == ["unavailable"], done.stderr
    assert done.stderr.count("NativeKernelsWarning") == 1
    assert ("exit code 1" if compiler else "no C++ compiler was found (no-such-compiler)") in done.stderr


def test_a_cache_that_cannot_be_written_is_named_in_the_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run(TWO_CALLS, tmp_path / "file" / "below")
    assert done.stdout.split() == ["unavailable"], done.stderr
    assert "Not a directory" in done.stderr and "ATTNRES_CACHE_DIR" in done.stderr


@needs_compiler
@pytest.mark.slow
def test_two_processes_build_at_once(tmp_path: Path) -> None:
    environment = {**os.environ, "ATTNRES_CACHE_DIR": str(tmp_path)}
    both = [subprocess.Popen([sys.executable, "-c", TWO_CALLS], stdout=subprocess.PIPE, text=True, env=environment)
            for _ in range(2)]
    assert [process.communicate(timeout=300)[0].split() for process in both] == [["ready"], ["ready"]]
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".lock", ".sha256", ".so"]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("capability", ["AVX512", "AVX2", "NO AVX"])
def test_every_instruction_set_compiles(capability: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch has vectors of its own for each, in headers that depend on the order in which they are read."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setenv("ATTNRES_CACHE_DIR", str(tmp_path))
    assert build.build().exists()


@needs_compiler
def test_a_library_that_cannot_be_loaded_is_a_warning(tmp_path: Path) -> None:
    code = ("import attnres_fx, torch\nfrom attnres_fx.runtime.cpu import build\n"
            "build.library_path().write_bytes(b'not a library' * 1000)\n"
            "record = build._record_of(b'not a library' * 1000)\n"
            "build.library_path().with_suffix('.sha256').write_text(record)\n") + TWO_CALLS
    done = run(code, tmp_path)
    assert done.stdout.split() == ["unavailable"], done.stderr
    assert "cannot be loaded" in done.stderr and "invalid ELF header" in done.stderr


def test_the_name_of_the_library_tells_sources_and_flags_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {build.library_path()}
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "NO AVX")
    names.add(build.library_path())
    monkeypatch.setattr(torch, "__version__", "9.9")
    names.add(build.library_path())
    (tmp_path / "operators.cpp").write_text("// other")
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    names.add(build.library_path())
    monkeypatch.setenv("ATTNRES_CACHE_DIR", "/elsewhere")
    names.add(build.library_path())
    assert len(names) == 5


def test_a_library_in_place_needs_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNRES_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler"):
        build.build()
    place(build.library_path(), b"library")
    assert build.is_built() and build.build() == build.library_path()


def place(library: Path, content: bytes, record: bytes | None = None) -> None:
    """A library as a build leaves it; ``record`` is what the record is taken of, where that is something else."""
    library.write_bytes(content)
    library.with_suffix(".sha256").write_text(build._record_of(content if record is None else record))
    for path in (library, library.with_suffix(".sha256")):
        path.chmod(0o644)


SPOILT = {
    "cut short": lambda library: place(library, b"libr", b"library"),
    "changed": lambda library: place(library, b"lxbrary", b"library"),
    "without a record": lambda library: library.write_bytes(b"library"),
    "an empty record": lambda library: (place(library, b"library"), library.with_suffix(".sha256").write_text("")),
    "a record that is no text": lambda library: (place(library, b"library"),
                                                 library.with_suffix(".sha256").write_bytes(b"\xff\xfe")),
    "writable by all": lambda library: (place(library, b"library"), library.chmod(0o666)),
    "of another user": lambda library: (place(library, b"library"), os.chown(library, 12345, -1)),
}
ROOT = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")


@pytest.mark.parametrize("spoil", [pytest.param(spoil, id=name, marks=ROOT if "user" in name else ())
                                   for name, spoil in SPOILT.items()])
def test_a_library_that_is_not_as_it_was_written_is_built_again(
    spoil: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTNRES_CACHE_DIR", str(tmp_path))
    spoil(build.library_path())
    assert not build.is_built()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match=r"mix_cpu_.*, and no C\+\+ compiler"):
        build.build()
    monkeypatch.setenv("CXX", "true")

    def run(command: list[str]) -> None:
        if "-shared" in command:
            Path(command[command.index("-o") + 1]).write_bytes(b"new")

    monkeypatch.setattr(build, "_run", run)
    told: list[str] = []
    assert build.build(told.append).read_bytes() == b"new" and build.is_built()
    assert len(told) == 1 and "it is built again" in told[0]
    assert build.build(told.append).exists() and len(told) == 1


@needs_compiler
@pytest.mark.slow
def test_a_damaged_library_is_one_warning_and_a_new_library(tmp_path: Path) -> None:
    assert run(TWO_CALLS, tmp_path).stdout.split() == ["ready"]
    (library,) = tmp_path.glob("*.so")
    with library.open("r+b") as opened:
        opened.truncate(300_000)
    for compiler, status in (("no-such-compiler", "unavailable"), ("", "ready")):
        done = run(TWO_CALLS, tmp_path, **({"CXX": compiler} if compiler else {}))
        assert done.returncode == 0 and done.stdout.split() == [status], done.stderr
        assert done.stderr.count("NativeKernelsWarning") == 1 and "has other bytes" in done.stderr


@pytest.mark.parametrize("mode, told", [(0o777, "anyone can write"), (0o1777, None), (0o775, None), (0o700, None)])
def test_a_cache_that_anyone_can_write_to_is_not_used(
    mode: int, told: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTNRES_CACHE_DIR", str(tmp_path))
    place(build.library_path(), b"library")
    tmp_path.chmod(mode)
    if told is None:
        assert build.build() == build.library_path()
    else:
        with pytest.raises(build.BuildError, match=told):
            build.build()


@ROOT
def test_a_cache_of_another_user_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNRES_CACHE_DIR", str(tmp_path))
    place(build.library_path(), b"library")
    os.chown(tmp_path, 12345, -1)
    with pytest.raises(build.BuildError, match="belongs to another user"):
        build.build()


@needs_compiler
def test_a_call_with_nothing_to_record_runs_no_python() -> None:
    """Compiled graphs dispatch through the autograd key on every call; it is answered in C++, or a call costs twice."""
    assert native.ensure()
    sources, query = [torch.randn(2, 8, requires_grad=True) for _ in range(3)], torch.randn(8, requires_grad=True)
    cotangent = torch.randn(2, 8)
    with torch.no_grad():
        entered = files_entered(lambda: (MIX(sources, query, None),
                                         MIX_BACKWARD(cotangent, sources, query, None, 1e-6, 1.0, False, 1.0)))
    assert not {"mix.py", "operators.py", "reference.py"} & entered
