"""The list of mutations that measures the GPU tests, and what its runner makes of a run of pytest."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # bench/ is part of the checkout, not of the package

from bench import mutations
from bench.mutation_list import LEFT_OUT, MUTATIONS, Mutation

KERNELS = sorted(path.stem for path in (ROOT / "cuda_src" / "kernels").glob("*.cu"))
TESTS = """
import pytest
pytestmark = pytest.mark.gpu
def test_failed(): assert 1 == 2
def test_cuda(): raise RuntimeError("cudaErrorIllegalAddress: an illegal memory access was encountered")
def test_compile(): raise type("CompileError", (Exception,), {})("planted")
def test_passed(): pass
def test_skipped(): pytest.skip("no GPU")
def test_endless():
    while True: pass
def test_crash():
    import os
    os.abort()
"""


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.label)
def test_each_is_one_change(mutation):
    mutated = mutations.source(mutation)
    original = (ROOT / "cuda_src" / mutation.file).read_text()
    assert mutated != original and len(mutated) == len(original) - len(mutation.before) + len(mutation.after)
    assert (ROOT / "tests" / mutations.first_arguments(mutation.first)[0].removeprefix("tests/")).is_file()
    assert "\n" not in mutation.words and len(mutation.words) <= 80


def test_each_kernel_has_two():
    counts = Counter(mutation.kernel for mutation in MUTATIONS)
    assert set(counts) | set(LEFT_OUT) == set(KERNELS) and not set(counts) & set(LEFT_OUT)
    assert min(counts.values()) >= 2
    assert len({mutation.label for mutation in MUTATIONS}) == len(MUTATIONS)
    assert len({(mutation.file, mutation.before, mutation.after) for mutation in MUTATIONS}) == len(MUTATIONS)
    for mutation in MUTATIONS:  # a mutated header is one that the kernel includes
        kernel_file = f"kernels/{mutation.kernel}.cu"
        assert mutation.file in dict(mutations.jit._headers(kernel_file)), mutation.label


def test_each_has_tests_of_its_own():
    """What ``first`` selects, by pytest's rules for -k and with the markers of a run: a test or more of its file."""
    pytest.importorskip("cupy")
    wanted = {mutation.first: mutations.first_arguments(mutation.first) for mutation in MUTATIONS}
    files = sorted({file for file, *_ in wanted.values()})
    options = ["--collect-only", "-q", "-p", "no:cacheprovider", "-m", mutations.MARKERS]
    collected = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert collected.returncode == 0, collected.stdout
    names = [line for line in collected.stdout.lower().splitlines() if "::" in line]
    for first, (file, option, words) in wanted.items():
        assert option == "-k"
        chosen = [name for name in names if name.startswith(f"{file}::") and is_chosen(words, name.split("/")[1])]
        assert chosen, f"{first} selects nothing"


def is_chosen(words: str, name: str) -> bool:
    """Whether pytest's -k chooses a test of this name, in small letters."""
    def of_name(word):
        return word[0] if word[0] in ("and", "or", "not") else str(word[0].lower() in name)

    return eval(re.sub(r"[\w:+\-.\[\]]+", of_name, words))


@pytest.mark.parametrize("label", ("mask_from_scores:one-block-more", "store_floats:first-value"))
def test_some_change_the_machine_code(label):
    pytest.importorskip("cupy")
    (mutation,) = (mutation for mutation in MUTATIONS if mutation.label == label)
    assert mutation.kernel in mutations.check(mutation)


def test_what_changes_nothing_is_found():
    pytest.importorskip("cupy")
    same = Mutation("store_floats", "same", "kernels/store_floats.cu", "values.value[threadIdx.x]",
                    "values.value[threadIdx.x + 0]", "none", "nothing", "test_pipeline.py")
    with pytest.raises(ValueError, match="changes the machine code of none"):
        mutations.check(same)
    with pytest.raises(ValueError, match="occurs 0 times"):
        mutations.check(same._replace(before="value[0]"))


@pytest.mark.parametrize("test, outcome", (
    ("failed", "failed"), ("cuda", "CUDA error"), ("compile", "does not compile"), ("passed", "passed"),
    ("skipped", "nothing ran"), ("crash", "crash"), ("endless", "timeout"), ("nothing", "pytest error"),
))
def test_outcomes(test, outcome, tmp_path):
    (tmp_path / "test_planted.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu\n    alone\n")
    seconds = 5 if outcome == "timeout" else 60
    run = mutations.run_tests(tmp_path, ["test_planted.py", "-k", f"test_{test}"], tmp_path, seconds)
    assert run.outcome == outcome
    assert run.test == (f"test_planted::test_{test}" if test in ("failed", "cuda", "compile") else None)


def test_a_copy_has_the_mutation_and_is_removed(tmp_path):
    mutation = MUTATIONS[0]
    with mutations.copy_of_checkout(tmp_path, mutation) as copy:
        assert (copy / "cuda_src" / mutation.file).read_text() == mutations.source(mutation)
        assert (copy / "tests" / "conftest.py").is_file() and not list((copy / "bench" / "results").iterdir())
        different = [
            path for path in (ROOT / "cuda_src").rglob("*.cu*")
            if path.read_bytes() != (copy / path.relative_to(ROOT)).read_bytes()
        ]
        assert [path.name for path in different] == [Path(mutation.file).name]
    assert not copy.exists()
