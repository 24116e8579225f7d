"""The cache of compiled kernels at the edges: races, kills, full disks, damage, and folders that others can write.

Needs NVRTC, no GPU. What happens in another process happens in a real one; what needs another user needs root to become
one. docs/edges.md lists the attempts.
"""

import errno
import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("cupy")

from salekit import jit, private_files  # noqa: E402
from salekit.errors import ArgumentError, CacheWarning, CompileError, GpuError  # noqa: E402
from salekit.jit import KernelSpec  # noqa: E402

SPEC = KernelSpec("coarsen_mask", ("2",))
OTHER = KernelSpec("coarsen_mask", ("4",))
ARCH = "sm_90a"
ROOT = Path(__file__).resolve().parent.parent
NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become or stand for another user")
COMPILE = """
    import hashlib
    from salekit import jit
    compiled = jit.compile_kernel(jit.KernelSpec("coarsen_mask", ("2",)), "sm_90a")
    print(hashlib.sha256(compiled.cubin).hexdigest(), compiled.path)
"""
# What NVRTC needs of its own files, before a user comes who may not be allowed to read them.
LOAD_NVRTC = """n = jit._nvrtc(); n.compileProgram(n.createProgram("__global__ void f() {}", "f.cu", [], []), ())"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of the test's own, and a process that has neither warned nor kept a kernel itself."""
    monkeypatch.setenv("SALEKIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(jit, "_unwritten", {})
    jit._warn.cache_clear()
    return tmp_path / "cache"


@pytest.fixture
def open_folder():
    """A new folder that every user can reach, as a test's own cannot be."""
    folder = Path(tempfile.mkdtemp(prefix="salekit-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def count_compiles(monkeypatch):
    calls = []
    real = jit._compile
    monkeypatch.setattr(jit, "_compile", lambda *args: calls.append(args) or real(*args))
    return calls


def start(*code, **environment):
    """A process that runs some Python, pieces that are each indented as they like."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-c", "\n".join(map(textwrap.dedent, code))],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": paths, **{name: str(value) for name, value in environment.items()}},
    )


def run(*code, **environment):
    process = start(*code, **environment)
    output, problems = process.communicate(timeout=120)
    return process.returncode, output, problems


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(scope="module")
def digest(tmp_path_factory):
    """Of the right cubin."""
    return hashlib.sha256(jit._compile(SPEC, ARCH)[0]).hexdigest()


# --- many processes, and killed ones -----------------------------------------------------------------------------
def test_sixteen_processes_start_cold_at_once(cache, digest):
    """They are forks of one, so that all compile at the same moment."""
    code, output, problems = run(
        """
        import hashlib, os, sys, threading
        import cupy
        from salekit import jit
        spec = jit.KernelSpec("coarsen_mask", ("2",))
        ready, go = os.pipe(), os.pipe()
        children = []
        for _ in range(16):
            child = os.fork()
            if child == 0:
                os.close(go[1])
                os.read(go[0], 1)  # until the parent closes it
                compiled = jit.compile_kernel(spec, "sm_90a")
                good = hashlib.sha256(compiled.cubin).hexdigest() == sys.argv[-1] and compiled.path.exists()
                os._exit(0 if good else 1)
            children.append(child)
        os.close(go[1])
        print(*[os.waitpid(child, 0)[1] for child in children])
        """.replace("sys.argv[-1]", repr(digest)),
        SALEKIT_CACHE_DIR=cache,
    )
    assert code == 0 and output.split() == ["0"] * 16, problems
    assert sorted(path.suffix for path in cache.iterdir()) == [".cubin", ".json"]  # one entry, and nothing unfinished


def test_killed_while_it_compiles(cache, digest):
    process = start(
        """
        import sys
        from salekit import jit
        nvrtc = jit._nvrtc()
        real = nvrtc.compileProgram
        class Told:
            def __getattr__(self, name):
                return getattr(nvrtc, name)
            def compileProgram(self, *args):
                print("compiling", flush=True)
                while True:  # over and over, so that the signal comes in the middle
                    real(*args)
        jit._nvrtc = Told
        jit.compile_kernel(jit.KernelSpec("coarsen_mask", ("2",)), "sm_90a")
        """,
        SALEKIT_CACHE_DIR=cache,
    )
    assert process.stdout.readline() == "compiling\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    code, output, problems = run(COMPILE, SALEKIT_CACHE_DIR=cache)
    assert code == 0 and output.split()[0] == digest, problems


def test_killed_while_it_writes(cache, monkeypatch, digest):
    """Between a file's bytes and its name. What is left is removed an hour later."""
    kill = "import os, signal\nos.replace = lambda *args: os.kill(os.getpid(), signal.SIGKILL)"
    code, _, _ = run(kill, COMPILE, SALEKIT_CACHE_DIR=cache)
    (left,) = cache.iterdir()
    assert code == -signal.SIGKILL and left.name.startswith(".new-")
    assert hashlib.sha256(jit.compile_kernel(SPEC, ARCH).cubin).hexdigest() == digest
    assert left.exists()  # its process might still be there
    os.utime(left, (time.time() - 2 * 3600,) * 2)
    jit.compile_kernel(OTHER, ARCH)
    assert not left.exists() and len(list(cache.iterdir())) == 4


# --- full and read-only ------------------------------------------------------------------------------------------
def full_disk(monkeypatch, *folders):
    """No more bytes can be written in these folders."""
    real = tempfile.mkstemp

    def mkstemp(*args, dir=None, **options):
        if Path(dir) in folders or not folders:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, dir=dir, **options)

    monkeypatch.setattr(tempfile, "mkstemp", mkstemp)


def test_a_full_disk(cache, monkeypatch, digest):
    """This process keeps its kernels itself, and says so once."""
    cache.mkdir(mode=0o700)
    full_disk(monkeypatch, cache)
    calls = count_compiles(monkeypatch)
    with pytest.warns(CacheWarning, match=f"{cache} cannot be written .No space left") as said:
        compiled = [jit.compile_kernel(spec, ARCH) for spec in (SPEC, OTHER, SPEC)]
    assert len(said) == 1 and len(calls) == 2 and not list(cache.iterdir())
    assert hashlib.sha256(compiled[0].cubin).hexdigest() == digest and compiled[0].path is None
    assert compiled[2] is compiled[0]


@pytest.mark.parametrize("limit", [0, 1000])
def test_files_may_not_grow(tmp_path, limit, digest):
    """A real limit, of the operating system's: half of the first file is written. No half file is left."""
    code, output, problems = run(
        f"""
        import resource
        from salekit import jit
        jit.nvrtc_version()
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        """,
        COMPILE,
        SALEKIT_CACHE_DIR=tmp_path / "cache",
    )
    assert code == 0 and output.split() == [digest, "None"] and "File too large" in problems, problems
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@needs_root
def test_a_disk_of_sixteen_kilobytes(tmp_path, cache, digest):
    cache.mkdir(mode=0o700)
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k,mode=0700", "none", cache]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        (cache / "filler").write_bytes(bytes(12 * 1024))
        code, output, problems = run(COMPILE, SALEKIT_CACHE_DIR=cache)
        assert code == 0 and output.split()[0] == digest and "No space left" in problems
        assert [path.name for path in cache.iterdir()] == ["filler"]
    finally:
        subprocess.run(["umount", cache], check=True)


@needs_root
@pytest.mark.parametrize("is_filled", [False, True])
def test_a_read_only_cache(open_folder, is_filled, digest):
    """As another user: root may write anywhere. A cache that root has filled, as in an image, is used."""
    folder = open_folder / "cache"
    folder.mkdir(mode=0o755)
    if is_filled:
        assert run(COMPILE, SALEKIT_CACHE_DIR=folder)[0] == 0
        for path in folder.iterdir():
            path.chmod(0o644)
    code, output, problems = run(
        f"""
        import os
        import cupy  # while its files can be read
        from salekit import jit
        jit._headers("kernels/coarsen_mask.cu"), jit._headers("tile/shared_bytes.cuh"), jit.nvrtc_version()
        {LOAD_NVRTC}
        os.setgroups([]), os.setgid({NOBODY}), os.setuid({NOBODY})
        real, calls = jit._compile, []
        jit._compile = lambda *args: calls.append(args) or real(*args)
        """,
        COMPILE, "print(len(calls))",
        SALEKIT_CACHE_DIR=folder, TMPDIR="/tmp",
    )
    assert code == 0, problems
    found, path, compiles = output.split()
    assert found == digest and int(compiles) == (not is_filled)
    assert path == "None" or (Path(path).parent == folder and is_filled)
    assert ("cannot be written (Permission denied)" in problems) != is_filled


@needs_root
def test_a_home_that_cannot_be_written(open_folder, digest):
    code, output, problems = run(
        f"""
        import os
        import cupy
        from salekit import jit
        jit._headers("kernels/coarsen_mask.cu"), jit._headers("tile/shared_bytes.cuh"), jit.nvrtc_version()
        {LOAD_NVRTC}
        os.setgroups([]), os.setgid({NOBODY}), os.setuid({NOBODY})
        """,
        COMPILE,
        SALEKIT_CACHE_DIR="", XDG_CACHE_HOME="", HOME=open_folder, TMPDIR="/tmp",
    )
    assert code == 0 and output.split()[0] == digest, problems
    assert problems.count("CacheWarning") == 1 and f"{open_folder}/.cache/salekit cannot be written" in problems


# --- damaged and foreign entries ---------------------------------------------------------------------------------
def entry_of(folder, spec=SPEC):
    compiled = jit.compile_kernel(spec, ARCH)
    return compiled, folder / f"{jit.cache_key(spec, ARCH)}.json", compiled.path


DAMAGES = {
    "cubin truncated": lambda record, cubin: cubin.write_bytes(cubin.read_bytes()[:100]),
    "cubin empty": lambda record, cubin: cubin.write_bytes(b""),
    "cubin longer": lambda record, cubin: cubin.write_bytes(cubin.read_bytes() + b"\0"),
    "cubin missing": lambda record, cubin: cubin.unlink(),
    "cubin a folder": lambda record, cubin: (cubin.unlink(), cubin.mkdir()),
    "cubin a link to itself": lambda record, cubin: (cubin.rename(cubin.with_suffix(".x")),
                                                     cubin.symlink_to(cubin.with_suffix(".x"))),
    "cubin a link to nothing": lambda record, cubin: (cubin.unlink(), cubin.symlink_to("/nonexistent/x")),
    "cubin a pipe": lambda record, cubin: (cubin.unlink(), os.mkfifo(cubin)),
    "record empty": lambda record, cubin: record.write_bytes(b""),
    "record cut": lambda record, cubin: record.write_bytes(record.read_bytes()[:-1]),
    "record not JSON": lambda record, cubin: record.write_text("{"),
    "record not UTF-8": lambda record, cubin: record.write_bytes(b"\xff\xfe\x00"),
    "record a list": lambda record, cubin: record.write_text("[]"),
    "record deep": lambda record, cubin: record.write_text("[" * 100_000),
    "record missing": lambda record, cubin: record.unlink(),
    "record a pipe": lambda record, cubin: (record.unlink(), os.mkfifo(record)),
    "record without its hash": lambda record, cubin: record.write_text(
        json.dumps({k: v for k, v in json.loads(record.read_text()).items() if k != "record_sha256"})
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_rebuilt(cache, monkeypatch, damage):
    first, record, cubin = entry_of(cache)
    DAMAGES[damage](record, cubin)
    calls = count_compiles(monkeypatch)
    if damage == "cubin a folder":  # cannot be replaced: this process keeps it
        with pytest.warns(CacheWarning):
            again = jit.compile_kernel(SPEC, ARCH)
        assert again.path is None and jit.compile_kernel(SPEC, ARCH) is again
    else:
        again = jit.compile_kernel(SPEC, ARCH)
        assert jit.compile_kernel(SPEC, ARCH).path == again.path == first.path  # and it is a hit again
        assert first.cubin == again.path.read_bytes() and not again.path.is_symlink()
    assert len(calls) == 1 and again.cubin == first.cubin and again.info.registers > 0


def test_flipped_bits_are_never_believed(cache, monkeypatch):
    """Of the record every byte, of the cubin some hundreds: the entry is as it was, or it is not taken."""
    first, record, cubin = entry_of(cache)
    key = jit.cache_key(SPEC, ARCH)
    rng = np.random.default_rng(0)
    for path in (record, cubin):
        data = path.read_bytes()
        where = range(len(data)) if path is record else rng.integers(len(data), size=300)
        for index in where:
            damaged = bytearray(data)
            damaged[index] ^= 1 << int(rng.integers(8))
            path.write_bytes(damaged)
            assert jit._load_entry(cache, key) in (None, first)
        path.write_bytes(data)
    assert jit._load_entry(cache, key) == first


@pytest.mark.parametrize("arch, spec", [("sm_80", SPEC), (ARCH, OTHER)])
def test_a_whole_entry_in_another_s_place(cache, monkeypatch, arch, spec):
    """A cubin of another architecture, or of another kernel, under this entry's names: all of its hashes are right."""
    first, record, _ = entry_of(cache)
    other = jit.compile_kernel(spec, arch)
    theirs = cache / f"{jit.cache_key(spec, arch)}.json"
    shutil.copy(theirs, record)
    shutil.copy(other.path, cache / f"{record.stem[:16]}-{hashlib.sha256(other.cubin).hexdigest()}.cubin")
    calls = count_compiles(monkeypatch)
    again = jit.compile_kernel(SPEC, ARCH)
    assert len(calls) == 1 and (again.cubin, again.lowered_name) == (first.cubin, first.lowered_name)


@pytest.mark.parametrize("change", ["version", "flags", "nvrtc", "source"])
def test_entries_of_another_version_are_not_looked_at(cache, monkeypatch, change):
    first, *_ = entry_of(cache)
    if change == "version":
        monkeypatch.setattr(jit, "CACHE_VERSION", jit.CACHE_VERSION + 1)
    elif change == "flags":
        monkeypatch.setattr(jit, "FLAGS", (*jit.FLAGS, "-lineinfo"))
    elif change == "nvrtc":
        monkeypatch.setattr(jit, "nvrtc_version", lambda: (99, 9))
    else:
        headers = jit._headers
        monkeypatch.setattr(jit, "_headers", lambda name: headers(name) + (("more.cuh", "// more\n"),))
    jit.cache_key.cache_clear()
    try:
        calls = count_compiles(monkeypatch)
        jit.compile_kernel(SPEC, ARCH)
        assert len(calls) == 1 and len(list(cache.glob("*.json"))) == 2 and first.path.exists()
    finally:
        monkeypatch.undo()
        jit.cache_key.cache_clear()


# --- bounds ------------------------------------------------------------------------------------------------------
def test_the_cache_is_bounded_and_leaves_other_files_alone(cache, monkeypatch):
    cache.mkdir(mode=0o700)
    names = ("letter.txt", "thesis.json", "a.cubin", "ceilings-0123456789abcdef01234567.json", "models")
    for name in names[:-1]:
        (cache / name).write_bytes(bytes(30000))
        os.utime(cache / name, (0, 0))
    (cache / "models").mkdir()
    monkeypatch.setenv("SALEKIT_CACHE_MAX_BYTES", "20000")
    for factor in ("2", "4"):
        jit.compile_kernel(KernelSpec("coarsen_mask", (factor,)), ARCH)
        jit.compile_kernel(KernelSpec("row_limits", ("true" if factor == "2" else "false",)), ARCH)
    own = [path for path in cache.iterdir() if path.name not in names]
    assert 0 < sum(path.stat().st_size for path in own) <= 20000 and all((cache / name).exists() for name in names)


def test_a_bound_that_nothing_fits(cache, monkeypatch):
    """What was written last stays; what another process removes has been read."""
    import cupy

    monkeypatch.setenv("SALEKIT_CACHE_MAX_BYTES", "0")
    first = jit.compile_kernel(SPEC, ARCH)
    assert first.path.exists()
    other = jit.compile_kernel(OTHER, ARCH)
    assert other.path.exists() and not first.path.exists()
    loaded = []
    module = SimpleNamespace(load=loaded.append, get_function=lambda name: SimpleNamespace(ptr=7))
    monkeypatch.setattr(cupy.cuda.function, "Module", lambda: module)
    assert jit.Kernel(first).handle == 7 and loaded == [first.cubin]


@pytest.mark.parametrize("value", ["", "many", "-1", "1e9", "9" * 40])
def test_a_bound_that_is_none(cache, monkeypatch, value):
    monkeypatch.setenv("SALEKIT_CACHE_MAX_BYTES", value)
    for _ in range(2):
        with pytest.raises(ArgumentError, match="SALEKIT_CACHE_MAX_BYTES: got"):
            jit.compile_kernel(SPEC, ARCH)
        assert not cache.exists()


# --- where it lies -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("chosen, base, home, want", [
    ("/a/b", "/x", "/h", "/a/b"),
    ("~/b", "/x", "/h", "/h/b"),
    ("b/../c", "/x", "/h", "HERE/c"),
    ("", "/x", "/h", "/x/salekit"),
    ("", "~/x", "/h", "/h/x/salekit"),
    ("", "", "/h", "/h/.cache/salekit"),
    ("", "", None, None),
    ("~/b", "/x", None, None),
    ("/a/b", "", None, "/a/b"),
])
def test_where_the_cache_lies(tmp_path, monkeypatch, chosen, base, home, want):
    """home None: HOME is not set, and the user is in no list of users."""
    import pwd

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setenv("SALEKIT_CACHE_DIR", chosen)
    monkeypatch.setenv("XDG_CACHE_HOME", base)
    monkeypatch.setenv("HOME", home) if home else monkeypatch.delenv("HOME")
    assert jit.cache_dir() == (want and Path(want.replace("HERE", str(tmp_path))))


def test_a_user_without_a_home(tmp_path, digest):
    """Kernels stay in memory, which is said once; no folder called ~ appears."""
    homeless = """
        import os, pwd
        def unknown(uid):
            raise KeyError(uid)
        pwd.getpwuid = unknown
        del os.environ["HOME"]
    """
    where = dict(SALEKIT_CACHE_DIR="", XDG_CACHE_HOME="", CUPY_CACHE_DIR=tmp_path / "of-cupy")  # which makes a ~, too
    move = f"import os; os.chdir({str(tmp_path)!r})"
    code, output, problems = run(move, homeless, COMPILE, COMPILE, **where)
    assert code == 0 and output.split() == [digest, "None"] * 2 and not (tmp_path / "~").exists(), problems
    assert problems.count("CacheWarning") == 1 and "no kernel cache, for this user has no home folder" in problems
    doctor = "from salekit.cli.main import main; main(['doctor', '--json'])"
    code, output, problems = run(move, homeless, doctor, **where)
    assert code == 0 and json.loads(output)["cache"].startswith("there is no kernel cache"), problems


# --- who can write it --------------------------------------------------------------------------------------------
def test_folders_and_entries_are_private(tmp_path, monkeypatch):
    monkeypatch.setenv("SALEKIT_CACHE_DIR", str(tmp_path / "a" / "b"))
    umask = os.umask(0)
    try:
        compiled = jit.compile_kernel(SPEC, ARCH)
    finally:
        os.umask(umask)
    assert compiled.path.parent == tmp_path / "a" / "b"
    assert mode_of(tmp_path / "a") == mode_of(tmp_path / "a" / "b") == 0o700
    assert {mode_of(path) for path in compiled.path.parent.iterdir()} == {0o600}


def refused(cache, monkeypatch, match):
    """The cache is neither read nor written, which is said once, and the kernel is right."""
    names = sorted(path.name for path in cache.iterdir()) if cache.is_dir() else []
    calls = count_compiles(monkeypatch)
    with pytest.warns(CacheWarning, match=match) as said:
        compiled = [jit.compile_kernel(SPEC, ARCH) for _ in range(2)]
    assert len(said) == 1 and len(calls) == 1 and compiled[0] is compiled[1] and compiled[0].path is None
    assert names == (sorted(path.name for path in cache.iterdir()) if cache.is_dir() else [])
    return str(said[0].message)


@pytest.mark.parametrize("mode, who", [(0o777, "every user"), (0o1777, "every user"), (0o702, "every user"),
                                       (0o770, "its group")])
def test_a_folder_that_others_can_write_is_refused(cache, monkeypatch, mode, who):
    jit.compile_kernel(SPEC, ARCH)
    cache.chmod(mode)
    monkeypatch.setattr(private_files, "_is_own_group", lambda gid: False)
    message = refused(cache, monkeypatch, f"{cache} can be written by {who}")
    assert "can run code" in message and "SALEKIT_CACHE_DIR" in message and "\n" not in message
    cache.chmod(0o700)
    assert jit.compile_kernel(SPEC, ARCH).path.parent == cache  # private again, used again


@pytest.mark.parametrize("mode, is_refused", [(0o777, True), (0o1777, False), (0o775, True), (0o755, False)])
def test_so_is_one_in_a_folder_that_others_can_write(tmp_path, monkeypatch, cache, mode, is_refused):
    """Whoever can rename the folder can put another there. In /tmp, with its sticky bit, nobody else can."""
    parent = tmp_path / "parent"
    parent.mkdir()
    parent.chmod(mode)
    cache = parent / "cache"
    cache.mkdir(mode=0o700)
    monkeypatch.setenv("SALEKIT_CACHE_DIR", str(cache))
    monkeypatch.setattr(private_files, "_is_own_group", lambda gid: False)
    if is_refused:
        refused(cache, monkeypatch, f"{parent} can be written by")
    else:
        assert jit.compile_kernel(SPEC, ARCH).path.parent == cache


def test_a_group_of_the_user_alone_is_the_user(tmp_path):
    """As on systems whose umask is 002."""
    grp, pwd = pytest.importorskip("grp"), pytest.importorskip("pwd")
    user = pwd.getpwuid(os.geteuid())
    group = grp.getgrgid(user.pw_gid)
    is_alone = group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}
    assert private_files._is_own_group(user.pw_gid) == is_alone and not private_files._is_own_group(54321)
    tmp_path.chmod(0o770)
    assert (private_files.why_not_private(tmp_path) is None) == (is_alone and tmp_path.stat().st_gid == user.pw_gid)


@needs_root
@pytest.mark.parametrize("whose", ["folder", "parent"])
def test_a_folder_of_another_user_is_refused(tmp_path, monkeypatch, cache, whose):
    cache = tmp_path / "parent" / "cache"
    monkeypatch.setenv("SALEKIT_CACHE_DIR", str(cache))
    jit.compile_kernel(SPEC, ARCH)
    os.chown(cache if whose == "folder" else cache.parent, NOBODY, NOBODY)
    refused(cache, monkeypatch, "belongs to another user .uid 65534")


@needs_root
@pytest.mark.parametrize("which", ["json", "cubin"])
@pytest.mark.parametrize("how", ["owner", "writable"])
def test_an_entry_that_another_user_may_have_written_is_rebuilt(cache, monkeypatch, which, how):
    first, record, cubin = entry_of(cache)
    path = record if which == "json" else cubin
    os.chown(path, NOBODY, NOBODY) if how == "owner" else path.chmod(0o606)
    calls = count_compiles(monkeypatch)
    again = jit.compile_kernel(SPEC, ARCH)
    assert len(calls) == 1 and again.cubin == first.cubin
    assert path.stat().st_uid == os.geteuid() and mode_of(path) == 0o600


def test_links_on_the_way(tmp_path, monkeypatch, cache):
    """A link to a private folder is fine, as where ~/.cache lies on another disk; what it leads through counts."""
    real, shared = tmp_path / "real", tmp_path / "shared"
    real.mkdir(mode=0o700)
    shared.mkdir()
    (tmp_path / "link").symlink_to("shared/../real")
    monkeypatch.setenv("SALEKIT_CACHE_DIR", str(tmp_path / "link" / "cache"))
    assert jit.compile_kernel(SPEC, ARCH).path.resolve().parent == real / "cache"
    shared.chmod(0o777)
    refused(tmp_path / "link" / "cache", monkeypatch, f"{shared} can be written by every user")
    jit._warn.cache_clear()
    monkeypatch.setattr(jit, "_unwritten", {})
    (shared / "inner").symlink_to(real)
    (tmp_path / "second").symlink_to(shared / "inner")  # anybody can turn the inner one to a folder of theirs
    monkeypatch.setenv("SALEKIT_CACHE_DIR", str(tmp_path / "second" / "cache"))
    refused(tmp_path / "second" / "cache", monkeypatch, f"{shared} can be written by every user")


@needs_root
def test_a_link_of_another_user(open_folder, monkeypatch, cache):
    (open_folder / "real").mkdir(mode=0o700)
    (open_folder / "link").symlink_to(open_folder / "real")
    os.lchown(open_folder / "link", NOBODY, NOBODY)
    monkeypatch.setenv("SALEKIT_CACHE_DIR", str(open_folder / "link"))
    refused(open_folder / "real", monkeypatch, "link is a link of another user")


def test_links_in_a_circle(tmp_path, monkeypatch, cache):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    monkeypatch.setenv("SALEKIT_CACHE_DIR", str(tmp_path / "a"))
    refused(tmp_path / "c", monkeypatch, "one of too many")


def test_where_root_is_not_known(cache, monkeypatch):
    """In a user namespace / and /tmp are nobody's: no cache can be trusted."""
    real, looked = private_files._problem, []

    def problem(folder, is_last):
        looked.append(folder)
        return real(folder, is_last) if folder != Path("/") else f"{folder} belongs to another user (uid 65534)"

    monkeypatch.setattr(private_files, "_problem", problem)
    message = refused(cache, monkeypatch, "/ belongs to another user .uid 65534")
    assert Path("/") in looked and str(cache) in message


@pytest.mark.parametrize("state", ["shared", "full"])
def test_the_command_line_says_it_in_one_line(tmp_path, state):
    """And goes on: the warning on stderr, the result on stdout."""
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    if state == "shared":
        cache.chmod(0o777)
    else:
        (cache / "file").write_text("in the way")
        cache /= "file"
    code, _, problems = run("from salekit.cli import main; main._show_warnings()", COMPILE, SALEKIT_CACHE_DIR=cache)
    assert code == 0 and problems.startswith("salekit: warning: the kernel cache") and problems.count("\n") == 1
    code, output, _ = run("from salekit.cli.main import main; main(['doctor'])", SALEKIT_CACHE_DIR=cache)
    assert code == 0 and ("NOT USED" in output) == (state == "shared")


# --- NVRTC -------------------------------------------------------------------------------------------------------
class OtherNvrtc:
    """NVRTC with another version."""

    def __init__(self, version, archs):
        self.version, self.archs = version, archs

    def getVersion(self):
        return self.version

    def getSupportedArchs(self):
        return self.archs


@pytest.mark.parametrize("version, archs, arch, match", [
    ((12, 0), (50, 80, 86, 89, 90), "sm_80", "NVRTC 12.0 is too old for salekit's kernels"),
    ((12, 4), (50, 80, 86, 89, 90), "sm_100a", r"NVRTC 12.4 does not know sm_100a .it knows sm_50 to sm_90"),
    ((12, 8), (50, 80, 86, 89, 90, 100, 120), "sm_103a", "NVRTC 12.8 does not know sm_103a"),
])
def test_nvrtc_is_too_old(cache, monkeypatch, version, archs, arch, match):
    monkeypatch.setattr(jit, "_nvrtc", lambda: OtherNvrtc(version, archs))
    monkeypatch.setattr(jit, "nvrtc_version", lambda: version)
    jit.cache_key.cache_clear()
    try:
        with pytest.raises(CompileError, match=match + ".*; install a newer one: pip install") as error:
            jit.compile_kernel(SPEC, arch)
    finally:
        jit.cache_key.cache_clear()
    assert "\n" not in str(error.value)


def test_an_old_nvrtc_is_one_error_of_the_command_line(cache, tmp_path):
    code, output, problems = run(
        """
        from salekit import jit
        real = jit._nvrtc()
        class Old:
            def __getattr__(self, name):
                return getattr(real, name)
            def getVersion(self):
                return (12, 0)
        jit._nvrtc = Old
        from salekit.cli.main import main
        main(["kernels", "--arch", "sm_80"])
        """,
        SALEKIT_CACHE_DIR=cache,
    )
    assert (code, output) == (4, "") and problems.startswith("salekit: error: NVRTC 12.0 is too old"), problems
    assert problems.count("\n") == 1


def test_every_architecture_is_known_to_today_s_nvrtc():
    from salekit.plans import SUPPORTED_ARCHS

    if jit.nvrtc_version() < (12, 9):
        pytest.skip("sm_103a needs NVRTC 12.9")
    for arch in SUPPORTED_ARCHS:
        jit.check_nvrtc(arch)


@pytest.mark.parametrize("how", ["no CuPy", "no NVRTC"])
def test_without_a_compiler(tmp_path, how):
    """A real process that cannot import or load it: exit code 3 and what to install."""
    block = "sys.modules['cupy'] = None" if how == "no CuPy" else """
        import cupy
        class Missing:
            def getVersion(self):
                raise RuntimeError('CuPy failed to load libnvrtc.so.12: OSError: no such file\\nand more')
        cupy.cuda.nvrtc = Missing()
    """
    code, output, problems = run(
        "import sys", block, "from salekit.cli.main import main; main(['kernels', '--arch', 'sm_80'])",
        SALEKIT_CACHE_DIR=tmp_path / "cache",
    )
    assert code == 3 and output == "" and problems.count("\n") == 1
    assert "NVRTC cannot be used" in problems and 'pip install "salekit[cuda12]"' in problems


@pytest.mark.parametrize("command, code", [("['kernels', '--arch', 'sm_80']", 3), ("['doctor', '--json']", 0)])
def test_an_nvrtc_without_its_builtins(tmp_path, command, code):
    """A library of NVRTC's own that it loads when it compiles: one error, not one a kernel."""
    found, output, problems = run(
        f"""
        from salekit import jit
        real = jit._nvrtc()
        class Partial:
            def __getattr__(self, name):
                return getattr(real, name)
            def compileProgram(self, *_):
                raise real.NVRTCError(7)
            def getProgramLog(self, _):
                return "nvrtc: error: failed to open libnvrtc-builtins.so.12.9.\\n  Make sure that it is installed.\\n"
        jit._nvrtc = Partial
        from salekit.cli.main import main
        main({command})
        """,
        SALEKIT_CACHE_DIR=tmp_path / "cache",
    )
    said = output if code == 0 else problems
    assert found == code and said.count("NVRTC is installed in part") == 1 and "--force-reinstall" in said, problems
    assert code == 0 or (output == "" and problems.count("\n") == 1)
    assert code or json.loads(output)["nvrtc"] is None


# --- loading -----------------------------------------------------------------------------------------------------
def test_a_driver_that_does_not_load_a_cubin(cache, monkeypatch):
    """As one that is older than NVRTC's major version."""
    import cupy

    class Refused(cupy.cuda.driver.CUDADriverError):
        def __init__(self):
            RuntimeError.__init__(self, "CUDA_ERROR_INVALID_IMAGE: device kernel image is invalid")

        def __str__(self):
            return "CUDA_ERROR_INVALID_IMAGE: device kernel image is invalid"

    def refuse():
        raise Refused()

    monkeypatch.setattr(cupy.cuda.function, "Module", refuse)
    monkeypatch.setattr(cupy.cuda.runtime, "driverGetVersion", lambda: 12020)
    with pytest.raises(GpuError, match=r"driver .CUDA 12.2. does not load .*INVALID_IMAGE.*; update the driver"):
        jit.Kernel(jit.compile_kernel(SPEC, ARCH))


def test_warnings_are_python_s(cache, monkeypatch):
    """They can be turned into errors or silenced like any other."""
    cache.mkdir()
    cache.chmod(0o777)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheWarning)
        with pytest.raises(CacheWarning, match="not used"):
            jit.compile_kernel(SPEC, ARCH)
