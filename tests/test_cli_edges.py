"""The command line where things go wrong around it: outputs that cannot be written, closed streams, signals."""

import contextlib
import errno
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from salekit.cli import main as command
from salekit.cli import plots, roofline
from salekit.cli.main import cli

import salekit
from salekit import written_files
from salekit.fuzz import running

ROOT = Path(__file__).resolve().parent.parent
SALEKIT = [sys.executable, "-m", "salekit"]
ABOUT = {"estimator": "int8", "block": [128, 32], "query_stride": 1, "skipped": "drop"}
pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals, pipes, limits")


def run(*arguments, **options):
    """In a process of its own, as a user does."""
    environment = {**os.environ, **options.pop("environment", {})}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run(
        [*SALEKIT, *map(str, arguments)],
        text=True,
        timeout=120,
        cwd=ROOT,
        env=environment,
        encoding=environment.get("PYTHONIOENCODING"),
        **options,
    )


@pytest.fixture(scope="module")
def qkv(tmp_path_factory):
    """A file of 300 tokens."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("qkv") / "small.npz"
    heads = {"q": 2, "k": 1, "v": 1}
    arrays = {name: rng.standard_normal((1, 300, h, 64)).astype(np.float16) for name, h in heads.items()}
    np.savez(path, **arrays)
    return path


@pytest.fixture
def old(tmp_path):
    """An output that is there already."""
    path = tmp_path / "old"
    path.write_text("old")
    return path


def only(path: Path) -> bool:
    """Whether nothing else lies beside it."""
    return list(path.parent.iterdir()) == [path]


@contextlib.contextmanager
def pipe_to_nobody():
    """The end of a pipe that can be written to, without a reader."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        yield writer
    finally:
        os.close(writer)


# --- the writer ----------------------------------------------------------------------------------------------------
def test_a_file_is_replaced_whole_and_keeps_its_mode(old):
    old.chmod(0o640)
    with written_files.writing(old) as file:
        file.write(b"new")
        file.flush()
        assert old.read_text() == "old"
    assert old.read_text() == "new" and stat.S_IMODE(old.stat().st_mode) == 0o640 and only(old)
    before = os.umask(0o027)
    try:
        written_files.write(old.parent / "other", "grün")
    finally:
        os.umask(before)
    other = old.parent / "other"
    assert other.read_bytes() == "grün".encode() and stat.S_IMODE(other.stat().st_mode) == 0o640


@pytest.mark.parametrize("error", (KeyboardInterrupt(), MemoryError(), OSError(errno.ENOSPC, "full")))
def test_after_an_error_the_old_file_stays(old, error):
    with pytest.raises(type(error)) as found, written_files.writing(old) as file:
        file.write(b"half of the")
        raise error
    assert old.read_text() == "old" and only(old)
    if isinstance(error, OSError):
        assert found.value.filename == str(old) and found.value.errno == errno.ENOSPC


def test_an_error_about_another_file_is_about_that(old):
    with pytest.raises(FileNotFoundError) as found, written_files.writing(old):
        open(old.parent / "missing" / "font")
    assert "font" in found.value.filename and old.read_text() == "old" and only(old)


@pytest.mark.parametrize("number", (errno.EBUSY, errno.EXDEV))
def test_a_file_that_cannot_be_replaced_is_written(old, monkeypatch, number):
    """As one that is mounted by itself, in a container."""
    def replace(source, target):
        raise OSError(number, "no")

    monkeypatch.setattr(os, "replace", replace)
    written_files.write(old, "new")
    assert old.read_text() == "new" and only(old)
    with pytest.raises(OSError) as found:
        written_files.write(old.parent / "other", "new")
    assert found.value.errno == number and only(old)


def test_a_file_in_a_folder_where_none_can_be_made(old, monkeypatch):
    real = open

    def refuse(path, mode="r", *args, **more):
        if "x" in mode:
            raise PermissionError(errno.EACCES, "no", path)
        return real(path, mode, *args, **more)

    monkeypatch.setattr(written_files, "open", refuse, raising=False)
    monkeypatch.setattr(written_files.tempfile, "TemporaryFile", lambda dir: refuse(dir, "x"))
    assert written_files._why_not_written(str(old)) is None
    written_files.write(old, "new")
    assert old.read_text() == "new"
    assert "no" in written_files._why_not_written(str(old.parent / "other"))
    with pytest.raises(PermissionError, match="other"):
        written_files.write(old.parent / "other", "new")


def test_a_link_stays_one(old):
    link, dangling = old.parent / "link", old.parent / "dangling"
    link.symlink_to("old")
    dangling.symlink_to("target")
    for path in (link, dangling):
        written_files.write(path, "new")
        assert path.is_symlink() and path.read_text() == "new"
    assert old.read_text() == "new" and not (old.parent / "target").is_symlink()


@pytest.fixture
def fifo(tmp_path):
    """(a pipe that has a name, a function that says what came out of it)"""
    path, found = tmp_path / "fifo", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: found.append(path.read_bytes()), daemon=True)
    reader.start()

    def came_out() -> bytes:
        reader.join(10)
        return b"".join(found)

    return path, came_out


def test_what_is_no_plain_file_is_written_to(fifo):
    path, came_out = fifo
    written_files.write(path, "new")
    assert came_out() == b"new" and stat.S_ISFIFO(path.stat().st_mode) and only(path)


def test_a_pipe_whose_reader_goes_is_a_failure(tmp_path):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: os.close(os.open(path, os.O_RDONLY)))
    reader.start()
    with pytest.raises(BrokenPipeError) as found, written_files.writing(path) as file:
        reader.join(10)
        file.write(b"new")
    assert found.value.filename == str(path)
    assert command._failed(found.value) == 1 and command._failed(BrokenPipeError(errno.EPIPE, "")) == 0


def test_calibrate_writes_through_links_and_pipes(qkv, tmp_path, fifo):
    path, came_out = fifo
    arguments = ["calibrate", str(qkv), "--backend", "numpy", "--density", "0.5", "--force", "-o"]
    assert CliRunner().invoke(cli, [*arguments, str(path)]).exit_code == 0
    assert stat.S_ISFIFO(path.stat().st_mode) and json.loads(came_out())["kind"] == "salekit-thresholds"
    (tmp_path / "link").symlink_to("target")
    assert CliRunner().invoke(cli, [*arguments, str(tmp_path / "link")]).exit_code == 0
    assert (tmp_path / "link").is_symlink() and len(salekit.load_thresholds(tmp_path / "target")) == 2


# --- outputs that cannot be written whole --------------------------------------------------------------------------
def limit_files():
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))


@pytest.mark.parametrize(
    "arguments",
    (
        *(["mask-dump", "QKV", "--force", "--format", form] for form in ("svg", "html", "npz", "csr")),
        ["bench", "--seqlen", "64", "--force"],
        ["validate", "--seqlen", "64", "--force"],
    ),
    ids=" ".join,
)
def test_half_a_file_is_not_left(arguments, qkv, old):
    arguments = [qkv if x == "QKV" else x for x in arguments]
    result = run(*arguments, "-o", old, preexec_fn=limit_files)
    assert result.returncode == 1 and str(old) in result.stderr and old.read_text() == "old" and only(old)
    if sys.version_info >= (3, 11):  # before, zipfile says something more when it is thrown away
        assert str(old) in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr


@pytest.fixture
def no_replacing(monkeypatch):
    def replace(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(written_files.os, "replace", replace)


def test_every_writer_is_the_shared_one(no_replacing, old, monkeypatch):
    from salekit import catalog, jit

    info = jit.KernelInfo(32, 16, 0, 0, 0, 0, (), 0.0)
    spec = jit.KernelSpec("a")
    monkeypatch.setattr(jit, "nvrtc_version", lambda: (12, 9))
    monkeypatch.setattr(jit, "check_nvrtc", lambda arch: None)
    monkeypatch.setattr(jit, "compile_kernel", lambda *_: jit.Compiled(old, "a", info, b""))
    monkeypatch.setattr(catalog, "all_specs", lambda arch: [("stage", spec)])
    result = CliRunner().invoke(cli, ["kernels", "--arch", "sm_80", "--force", "-o", str(old)])
    assert isinstance(result.exception, OSError) and old.read_text() == "old" and only(old)
    scene = roofline.Scene(10, 10)
    methods = {"int8": {"points": [{"mean": {"density": 0.5, "recall": 0.5, "relative_error": 0.5}}]}}
    comparison = {"methods": methods, "block": [128, 32], "source": "x", "heads": [0], "seqlen_k": 64}
    for suffix in (".svg", ".png"):
        path = old.rename(old.with_suffix(suffix))
        for save in (lambda: roofline.save(scene, path, "x"), lambda: plots.save(str(path), comparison)):
            if suffix == ".png" or save.__code__.co_names[0] == "plots":
                pytest.importorskip("matplotlib")
            with pytest.raises(OSError, match="full"):
                save()
            assert path.read_text() == "old" and only(path)
        old = path
    with pytest.raises(OSError, match="full"):
        salekit.save_thresholds(old, {"0": {64: [0.5]}}, ABOUT)
    assert old.read_text() == "old" and only(old)


def test_profile_writes_its_trace_by_it(no_replacing, old, monkeypatch):
    from salekit.cli import profile

    monkeypatch.setattr(profile, "run_profile", lambda **_: ({}, {"traceEvents": []}))
    result = CliRunner().invoke(cli, ["profile", "--force", "--trace", str(old), "--json"])
    assert isinstance(result.exception, OSError) and old.read_text() == "old" and only(old)


@pytest.fixture
def uncompiled(monkeypatch):
    from salekit import jit

    def compile_kernel(spec, arch, cache=True):
        info = jit.KernelInfo(32, 16, 0, 0, 0, 0, (), 0.0)
        return jit.Compiled(Path(f"{abs(hash(spec))}.fake"), spec.expression, info, spec.expression.encode())

    monkeypatch.setattr(jit, "compile_kernel", compile_kernel)
    monkeypatch.setattr(jit, "nvrtc_version", lambda: (12, 9))


def test_a_failed_export_leaves_nothing(uncompiled, tmp_path, monkeypatch):
    from salekit import export

    def exported(*more):
        arguments = ["export", "--arch", "sm_80", "--block", "64x32", "-o", str(tmp_path / "a" / "b"), *more]
        return CliRunner().invoke(cli, arguments)

    def fail_late(path, content):
        if path.suffix == ".json":
            raise OSError(errno.ENOSPC, "full")
        written_files.write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(export, "write", fail_late)
        assert isinstance(exported("--estimator", "int8").exception, OSError) and not list(tmp_path.iterdir())
    assert exported("--estimator", "int8").exit_code == 0
    first = set(tmp_path.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(export, "write", fail_late)
        assert isinstance(exported("--estimator", "int4", "--dtype", "fp16", "--force").exception, OSError)
    assert set(tmp_path.rglob("*")) == first
    assert exported("--estimator", "int4", "--force").exit_code == 0
    assert not [path for path in tmp_path.rglob("*int8*")] and "int4" in str(list(tmp_path.rglob("*")))


# --- outputs that are refused --------------------------------------------------------------------------------------
WRITERS = (
    ["bench", "--seqlen", "64", "--input", "QKV", "--force", "-o"],
    ["validate", "--seqlen", "64", "--input", "QKV", "--force", "-o"],
    ["calibrate", "QKV", "--force", "-o"],
    ["mask-dump", "QKV", "--force", "--format", "svg", "-o"],
    ["compare", "QKV", "--force", "--plot"],
    ["profile", "--gpu", "h100", "--force", "--roofline"],
    ["profile", "--force", "--trace"],
    ["kernels", "--arch", "sm_80", "--force", "-o"],
)


@pytest.fixture
def no_work(monkeypatch):
    """Whoever reads an input or compiles has not looked at the output first."""
    from salekit import data_files, jit

    def work(*_, **__):
        raise AssertionError("this is work")

    for module, name in ((data_files, "load_qkv"), (data_files, "iter_layers"), (jit, "nvrtc_version")):
        monkeypatch.setattr(module, name, work)


def refused(arguments, qkv, output):
    result = CliRunner().invoke(cli, [str(qkv) if x == "QKV" else x for x in (*arguments, str(output))])
    assert result.exit_code == 2, (result.output, result.exception)
    return result.output.strip().splitlines()[-1]


@pytest.mark.parametrize("arguments", WRITERS, ids=" ".join)
def test_a_bad_output_is_said_before_the_work(arguments, qkv, tmp_path, no_work):
    option = arguments[-1]
    assert refused(arguments, qkv, "") == f"Error: {option}: got an empty name; wants a file"
    missing = refused(arguments, qkv, tmp_path / "no" / "x.svg")
    assert missing.startswith(f"Error: {option}: got ") and "No such file" in missing
    (tmp_path / "file").touch()
    assert "Not a directory" in refused(arguments, qkv, tmp_path / "file" / "x.svg")
    (tmp_path / "loop.svg").symlink_to("loop.svg")
    assert "symbolic links" in refused(arguments, qkv, tmp_path / "loop.svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop.svg"]


@pytest.mark.parametrize("arguments", WRITERS, ids=" ".join)
def test_what_exists_is_kept_without_force(arguments, qkv, tmp_path, no_work):
    output = tmp_path / "x.svg"
    output.write_text("old")
    said = refused([x for x in arguments if x != "--force"], qkv, output)
    assert said == f"Error: {output} exists; --force overwrites it" and output.read_text() == "old"


@pytest.mark.parametrize(
    "arguments", (*WRITERS, ["export", "--arch", "sm_80", "-o"], ["fuzz", "--cases", "1", "-o"]), ids=" ".join
)
def test_a_dash_is_no_name(arguments, qkv, no_work):
    assert refused(arguments, qkv, "-").startswith(f"Error: {arguments[-1]}: got -, which is not stdout here")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_rights_is_refused(qkv, tmp_path, no_work):
    tmp_path.chmod(0o500)
    assert "Permission denied" in refused(WRITERS[0], qkv, tmp_path / "x.json")


@pytest.mark.parametrize("arguments", [of for of in WRITERS if "QKV" in of], ids=" ".join)
def test_an_output_is_no_input(arguments, qkv, tmp_path, no_work):
    before = qkv.read_bytes()
    (tmp_path / "link.svg").symlink_to(qkv)
    for output in (qkv, tmp_path / "link.svg"):
        assert "another file of this command" in refused(arguments, qkv, output)
    assert qkv.read_bytes() == before


def test_two_outputs_are_two_files(qkv, tmp_path, no_work):
    output = tmp_path / "x.svg"
    assert "another file" in refused(["profile", "--roofline", str(output), "--trace"], qkv, output)


@pytest.mark.parametrize("arguments", (["export", "--arch", "sm_80", "-o"], ["fuzz", "--cases", "1", "-o"]))
def test_a_bad_folder_is_said_before_the_work(arguments, qkv, tmp_path, no_work, monkeypatch):
    monkeypatch.setattr(running, "run_case", None)
    assert refused(arguments, qkv, "") == "Error: -o: got an empty name; wants a folder"
    (tmp_path / "file").touch()
    assert "Not a directory" in refused(arguments, qkv, tmp_path / "file" / "a" / "b")


# --- streams -------------------------------------------------------------------------------------------------------
def test_a_reader_that_goes_is_no_failure():
    for arguments in (["doctor"], ["doctor", "--json"], ["--help"], ["doctor", "--help"]):
        with pipe_to_nobody() as nobody:
            result = run(*arguments, stdout=nobody)
        assert (result.returncode, result.stderr) == (0, ""), arguments


@pytest.mark.parametrize("more", ([], ["--json"]))
def test_without_a_reader_the_exit_code_is_the_command_s(more):
    code = (
        "from salekit.cli import main, render, validate\n"
        "validate.run_validate = lambda **_: {'passed': False, 'much': 'x' * 100_000}\n"
        "validate._print_tables = lambda report: [render.text(report['much']) for _ in range(9)]\n"
        f"main.main(['validate', *{more}])"
    )
    with pipe_to_nobody() as nobody:
        result = subprocess.run(
            [sys.executable, "-c", code], stdout=nobody, stderr=subprocess.PIPE, text=True, timeout=60, cwd=ROOT
        )
    assert (result.returncode, result.stderr) == (5, "")


def test_notes_that_nobody_reads_stop_nothing():
    with pipe_to_nobody() as nobody:
        result = run("bench", "--seqlen", "64", "--json", stderr=nobody)
        assert result.returncode == 0 and json.loads(result.stdout)["results"]
        assert run("mask-dump", "missing.npz", stderr=nobody).returncode == 2
        assert run("mask-dump", ROOT / "README.md", stderr=nobody).returncode == 1


@pytest.mark.parametrize("closed", ("1", "2", "1 2", "0 1 2"))
@pytest.mark.parametrize("arguments", ("bench --seqlen 64 --json", "validate --seqlen 64", "mask-dump --sample"))
def test_closed_streams_stop_nothing(arguments, closed, tmp_path):
    closing = " ".join(f"{number}>&-" for number in closed.split())
    output = "--format npz -o" if arguments.startswith("mask-dump") else "-o"
    result = subprocess.run(
        ["sh", "-c", f'"{sys.executable}" -m salekit {arguments} {output} "$1" {closing}', "sh", tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert result.returncode == 0 and (tmp_path / "out").stat().st_size > 500, result.stderr
    assert "Traceback" not in result.stderr
    if closed == "2" and "json" in arguments:
        assert json.loads(result.stdout)["results"]


@pytest.mark.parametrize(
    "encoding, spread, nothing", (("ascii", "+-", "`"), ("latin-1", "±", "·"), ("utf-8", "±", "·"))
)
def test_any_encoding_will_do(encoding, spread, nothing, qkv):
    environment = {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    bench = run("bench", "--seqlen", "64", environment=environment)
    assert bench.returncode == 0 and f"median {spread} spread" in bench.stdout, bench.stderr
    for colour in ({}, {"FORCE_COLOR": "1", "TERM": "xterm-256color"}):
        drawn = run("mask-dump", qkv, "--tau", "1000", "--block", "64x32", environment={**environment, **colour})
        assert drawn.returncode == 0 and "head 1" in drawn.stdout, drawn.stderr
        assert ("▀" if colour and encoding == "utf-8" else nothing) in drawn.stdout


def test_the_c_locale_will_do(qkv):
    environment = {"PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "LC_ALL": "C"}
    name = qkv.with_name("größe.npz")
    name.write_bytes(qkv.read_bytes())
    bench = run("bench", "--seqlen", "64", "--input", name, environment=environment)
    assert bench.returncode == 0 and "median +- spread" in bench.stdout, bench.stderr
    drawn = run("compare", name, "--methods", "int8", "--densities", "0.5", environment=environment)
    assert drawn.returncode == 0 and "e.npz" in drawn.stdout, drawn.stderr


# --- signals -------------------------------------------------------------------------------------------------------
def test_an_interrupted_import_of_the_command_exits_130():
    code = (
        "import runpy, sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'salekit.cli.main':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "runpy.run_module('salekit', run_name='__main__')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (result.returncode, result.stderr) == (130, "")


@pytest.mark.parametrize("delay", (0.0, 1.5))
@pytest.mark.parametrize("kill", (os.killpg, os.kill), ids=("Ctrl-C", "SIGTERM"))
def test_workers_end_quietly(kill, delay, tmp_path):
    """Ctrl-C goes to all processes of a terminal, SIGTERM to the first alone; at the start, and in the cases."""
    process = subprocess.Popen(
        [*SALEKIT, *"fuzz --cases 5000 --workers 2 --seed 1 --backend numpy -o".split(), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        assert process.stderr.readline().startswith("fuzz: seed 1")
        time.sleep(0.2 + delay)
        kill(process.pid, signal.SIGINT if kill is os.killpg else signal.SIGTERM)
        _, errors = process.communicate(timeout=60)  # which waits for all that could write there
    finally:
        process.kill()
    assert process.returncode == 130 and errors.strip() in ("", "all cases until it was interrupted ok"), errors


def test_no_more_workers_than_cases(monkeypatch):
    started = []
    monkeypatch.setattr(running, "_in_processes", lambda *arguments: started.append(arguments[-1]) or iter(()))

    class Results:  # what closing() closes
        def __init__(self, *arguments):
            started.append(arguments[-1])

        def __iter__(self):
            return iter(())

        def close(self):
            pass

    monkeypatch.setattr(running, "_in_processes", Results)
    running.run_many(1, on_gpu=False, cases=2, workers=64)
    running.run_many(1, on_gpu=False, minutes=1, workers=3)
    assert started == [2, 3]
    result = CliRunner().invoke(cli, ["fuzz", "--cases", "2", "--workers", "64", "--backend", "numpy"])
    assert started[-1] == 2 and "2 workers" in result.output


@pytest.mark.parametrize("minutes", ("nan", "inf", "-inf", "0"))
def test_a_soak_of_no_length_is_refused(minutes):
    result = CliRunner().invoke(cli, ["fuzz", "--minutes", minutes, "--backend", "numpy"])
    assert result.exit_code == 2 and "--minutes" in result.output


@pytest.mark.parametrize("workers", (1, 2))
def test_the_shortest_soak_makes_a_case(workers):
    assert running.run_many(1, on_gpu=False, minutes=1e-9, workers=workers).cases >= 1


# --- doctor --------------------------------------------------------------------------------------------------------
def findings(**environment):
    result = CliRunner().invoke(cli, ["doctor", "--json"], env=environment)
    assert result.exit_code == 0, result.exception
    return json.loads(result.stdout)


def test_doctor_says_why_a_cache_is_not_used(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for folder in ("file", "file/below"):
        said = findings(SALEKIT_CACHE_DIR=str(tmp_path / folder))["cache"]
        assert said.endswith(": CANNOT BE READ: Not a directory")
    assert findings(SALEKIT_CACHE_DIR=str(tmp_path / "new" / "one"))["cache"].endswith("(empty)")
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(written_files, "why_not_writable", lambda folder: f"{folder}: Read-only file system")
    for folder, held in ((tmp_path, "1 files, 0.0 MiB"), (tmp_path / "new" / "one", "empty")):
        said = findings(SALEKIT_CACHE_DIR=str(folder))["cache"]
        assert said == f"{folder} ({held}): CANNOT BE WRITTEN: {tmp_path}: Read-only file system"


def test_doctor_says_what_is_wrong_with_the_cache_s_bound():
    wrong = [line for line in findings(SALEKIT_CACHE_MAX_BYTES="abc")["advice"] if "SALEKIT_CACHE_MAX_BYTES" in line]
    assert len(wrong) == 1 and "got 'abc'" in wrong[0]
    assert not [line for line in findings()["advice"] if "SALEKIT_CACHE_MAX_BYTES" in line]


NO_DRIVER = "cudaErrorInsufficientDriver: CUDA driver version is insufficient"
NO_DEVICE = "cudaErrorNoDevice: no CUDA-capable device is detected"


@pytest.fixture
def cupy_without(monkeypatch):
    """A function that makes CuPy one that finds no GPU, with this message."""
    from salekit import jit

    def make(message):
        def refuse():
            raise RuntimeError(message)

        cupy = SimpleNamespace(__version__="14.2.0", cuda=SimpleNamespace(runtime=SimpleNamespace(getDevice=refuse)))
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        monkeypatch.setattr(jit, "nvrtc_version", lambda: (12, 9))

    return make


def test_what_is_missing_is_what_to_install(cupy_without, monkeypatch):
    """CuPy without CuPy, the driver without one, and nothing that is there already."""
    from salekit import jit

    for message, hint in ((NO_DRIVER, f"; {jit.DRIVER_HINT}"), (NO_DEVICE, "")):
        cupy_without(message)
        with pytest.raises(salekit.GpuError) as found:
            jit.device_arch()
        assert str(found.value) == f"no usable GPU (RuntimeError: {message}){hint}"
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(salekit.GpuError) as found:
        jit.device_arch()
    assert str(found.value).endswith(f"; {jit.INSTALL_HINT}") and "NVIDIA" not in str(found.value)


@pytest.mark.parametrize("driver", (None, "CUDA 11.4"))
def test_doctor_names_a_missing_driver_once(driver, cupy_without, monkeypatch):
    import ctypes

    from salekit.cli import doctor

    if driver is None:
        def no_library(name):
            raise OSError(name)

        monkeypatch.setattr(ctypes, "CDLL", no_library)
    else:
        monkeypatch.setattr(doctor, "_driver", lambda advice: driver)
    cupy_without(NO_DRIVER)
    advice = doctor.examine()["advice"]
    assert len([line for line in advice if "install NVIDIA's driver, 525 or newer" in line]) == 1
    assert not [line for line in advice if "pip install" in line]
    assert any(line.startswith("no usable GPU" if driver else "No NVIDIA driver was found") for line in advice)
