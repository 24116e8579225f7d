"""Files that anybody may have made: each bad one is one clear FileFormatError, in bounded memory and time.

What waits, or takes memory, is tried in a process of its own with a limit. docs/edges.md lists the attempts.
"""

import io
import json
import os
import resource
import struct
import subprocess
import sys
import textwrap
import time
import zipfile
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from salekit import data_files, untrusted_files
from salekit.block_mask import BlockMask
from salekit.data_files import iter_layers, load_qkv
from salekit.errors import ArgumentError, FileFormatError, SalekitError
from salekit.export import _earlier_files
from salekit.thresholds import load_thresholds, save_thresholds
from salekit.untrusted_files import Npz, open_plain, read_json

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20
EXTRA_MIB = 300  # beyond what Python, NumPy and the rest have already
SHAPE = (1, 4, 2, 64)
CONTROL = "\x1b[2J\x1b]0;title\x07\r\nsalekit: all is well\x9b1m"  # clears a screen, renames a window, forges a line


def tensor(shape=SHAPE, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float16)


def python(*code, limited=True, **environment):
    """(exit code, stdout, stderr, seconds) of some Python, with little more address space than its imports need."""
    start = """
        import resource, sys
        from salekit import data_files, thresholds, block_mask, untrusted_files
        from salekit.errors import FileFormatError
        have = 1024 * int(next(x for x in open("/proc/self/status") if x.startswith("VmSize")).split()[1])
        resource.setrlimit(resource.RLIMIT_AS, (have + %d * 2**20,) * 2)
    """ % EXTRA_MIB
    code = [start, *code] if limited else code
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(map(textwrap.dedent, code))], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", **environment},
    )
    return result.returncode, result.stdout, result.stderr, time.monotonic() - started


def refuses(call, path, match):
    """In this process and within a second: one printable line that begins with the path."""
    started = time.monotonic()
    with pytest.raises(FileFormatError, match=match) as error:
        call(path)
    text = str(error.value)
    assert time.monotonic() - started < 1 and text.startswith(str(path)) and text.isprintable() and len(text) < 2100
    return text


def refuses_within_limits(function, path, match):
    code, output, problems, seconds = python(f"""
        try:
            {function}({str(path)!r})
        except FileFormatError as error:
            print(error)
    """)
    assert code == 0 and match in output and output.count("\n") == 1, (output, problems)
    assert seconds < 20
    return output


def layers(path):
    return list(iter_layers(path))


# --- safetensors -------------------------------------------------------------------------------------------------
def entry(dtype, shape, first, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, end]}


NUM_BYTES = 2 * int(np.prod(SHAPE))
GOOD = {name: entry("F16", SHAPE, i * NUM_BYTES, (i + 1) * NUM_BYTES) for i, name in enumerate("qkv")}


def safetensors(path, header=GOOD, data=3 * NUM_BYTES, length=None):
    """A file with this header (an object, a text or bytes), whose length field may lie."""
    header = json.dumps(header) if isinstance(header, dict) else header
    header = header.encode() if isinstance(header, str) else header
    body = tensor((data // 2 + 1,)).tobytes()[:data]
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + body)
    return path


def changed(**changes):
    return {**GOOD, **changes}


def test_the_good_one(tmp_path):
    q, k, v, _ = load_qkv(safetensors(tmp_path / "x.safetensors"))
    assert q.shape == SHAPE and np.concatenate([q, k, v]).tobytes() == tensor((3 * NUM_BYTES // 2 + 1,))[:-1].tobytes()


SAFETENSORS = {
    "empty": (dict(header=b"", length=0, data=0), "its header is not a JSON object"),
    "a header beyond the end": (dict(length=10**6), "a header of 1000000"),
    "a header of 2**64 - 1": (dict(length=2**64 - 1), "a header of 18446744073709551615"),
    "a header cut short": (dict(length=30), "is not JSON"),
    "not JSON": (dict(header="{,"), "is not JSON"),
    "spaces before it": (dict(header=" " + json.dumps(GOOD)), "not a JSON object"),
    "a list": (dict(header="[1]"), "not a JSON object"),
    "UTF-16": (dict(header=json.dumps(GOOD).encode("utf-16")), "not UTF-8|not a JSON object"),
    "not UTF-8": (dict(header=b'{"\xff": 1}'), "not UTF-8"),
    "deep": (dict(header='{"q":' + "[" * 200_000), "is not JSON"),
    "NaN": (dict(header=json.dumps(changed(q={**GOOD["q"], "shape": [float("nan")]}))), "q: got shape .nan"),
    "a number of 5,000 digits": (dict(header='{"q": ' + "1" * 5000 + "}"), "is not JSON"),
    "no dtype": (dict(header=changed(q={"shape": [1], "data_offsets": [0, 2]})), "q: wants a dtype"),
    "more than the three": (dict(header=changed(q={**GOOD["q"], "x": 1})), "q: wants a dtype"),
    "an entry that is a number": (dict(header=changed(q=1)), "q: wants a dtype"),
    "no such dtype": (dict(header=changed(q=entry("F17", SHAPE, 0, NUM_BYTES))), "q: got dtype 'F17'"),
    "a dtype that is a list": (dict(header=changed(q=entry(["F16"], SHAPE, 0, NUM_BYTES))), "q: got dtype"),
    "a wider dtype": (dict(header=changed(q=entry("F32", SHAPE, 0, NUM_BYTES))), "bytes for F32 of shape"),
    "a negative offset": (dict(header=changed(q=entry("F16", SHAPE, -NUM_BYTES, 0))), "q: got shape"),
    "offsets the wrong way round": (dict(header=changed(q=entry("F16", SHAPE, NUM_BYTES, 0))), "q: got shape"),
    "one offset": (dict(header=changed(q={**GOOD["q"], "data_offsets": [0]})), "q: got shape"),
    "offsets beyond the end": (dict(data=2 * NUM_BYTES), "its tensors have"),
    "one byte too few": (dict(data=3 * NUM_BYTES - 1), "its tensors have"),
    "one byte too many": (dict(data=3 * NUM_BYTES + 1), "its tensors have"),
    "two of the same bytes": (dict(header=changed(v=GOOD["k"]), data=2 * NUM_BYTES), "starts at byte"),
    "two that overlap": (
        dict(header=changed(k=entry("F16", SHAPE, 2, NUM_BYTES + 2),
                            v=entry("F16", SHAPE, NUM_BYTES + 2, 2 * NUM_BYTES + 2)), data=2 * NUM_BYTES + 2),
        "starts at byte 2; the tensor before it ends at",
    ),
    "a gap": (dict(header=changed(q=entry("F16", (1, 3, 2, 64), 0, NUM_BYTES * 3 // 4))), "k: starts at byte"),
    "a negative size": (dict(header=changed(q=entry("F16", [-1, -4, 2, 64], 0, NUM_BYTES))), "q: got shape"),
    "a size that is true": (dict(header=changed(q=entry("F16", [True, 4, 2, 64], 0, NUM_BYTES))), "q: got shape"),
    "a size that is 4.0": (dict(header=changed(q=entry("F16", [1, 4.0, 2, 64], 0, NUM_BYTES))), "q: got shape"),
    "sizes whose product wraps": (
        dict(header=changed(q=entry("F16", [2**32, 2**32, 2, 64], 0, 0), k=entry("F16", SHAPE, 0, NUM_BYTES),
                            v=entry("F16", SHAPE, NUM_BYTES, 2 * NUM_BYTES)), data=2 * NUM_BYTES),
        "q: got 0 bytes for F16",
    ),
    "nothing, of a huge shape": (
        dict(header=changed(q=entry("F16", [0, 2**62, 2**62, 64], 0, 0), k=entry("F16", SHAPE, 0, NUM_BYTES),
                            v=entry("F16", SHAPE, NUM_BYTES, 2 * NUM_BYTES)), data=2 * NUM_BYTES),
        "q: got shape",
    ),
    "65 axes": (dict(header=changed(q=entry("F16", [1] * 62 + [4, 2, 64], 0, NUM_BYTES))), "q: has 65 axes; wants at"),
    "100,000 axes": (dict(header=changed(q=entry("F16", [2**62] * 100_000, 0, NUM_BYTES))), "q: has 100000 axes"),
    "a name twice": (
        dict(header=json.dumps(GOOD)[:-1] + ', "q": ' + json.dumps(entry("F16", SHAPE, 0, 10**9)) + "}"), "'q' twice"
    ),
    "a field twice": (
        dict(header=json.dumps(GOOD).replace('{"dtype": "F16"', '{"dtype": "F16", "dtype": "BF16"', 1)), "'dtype' twice"
    ),
    "metadata of numbers": (dict(header=changed(__metadata__={"layout": 1})), "metadata are not texts"),
    "metadata that are a list": (dict(header=changed(__metadata__=["bshd"])), "metadata are not texts"),
    "a layout that is none": (dict(header=changed(__metadata__={"layout": CONTROL})), "got layout"),
    "an endless layout": (dict(header=changed(__metadata__={"layout": "x" * 10**6})), "got layout"),
    "a name that moves the cursor": (dict(header={CONTROL: entry("F17", [1], 0, 2)}, data=2), r"\\x1b\[2J"),
    "three axes": (dict(header=changed(q=entry("F16", [4, 2, 64], 0, NUM_BYTES))), "q: got 3 axes"),
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_malformed_safetensors(tmp_path, case):
    options, match = SAFETENSORS[case]
    path = safetensors(tmp_path / "x.safetensors", **options)
    for call in (load_qkv, layers):
        refuses(call, path, match if call is load_qkv else ".")


@pytest.mark.parametrize("size", range(17))
def test_safetensors_of_a_few_bytes(tmp_path, size):
    (tmp_path / "x.safetensors").write_bytes(bytes(size))
    refuses(load_qkv, tmp_path / "x.safetensors", "is not a whole safetensors file")


def test_what_is_taken_is_what_the_format_s_own_library_takes(tmp_path):
    """Byte by byte through the header: ours takes no file that the library refuses, and reads the same from it."""
    from safetensors import safe_open

    path = safetensors(tmp_path / "x.safetensors", changed(__metadata__={"layout": "bshd"}))
    data, taken, both = path.read_bytes(), 0, 0
    rng = np.random.default_rng(2)
    for turn in range(1500):
        damaged = bytearray(data)
        for _ in range(int(rng.integers(1, 3))):
            damaged[int(rng.integers(8, len(data) - 3 * NUM_BYTES))] = int(rng.choice(list(b'019,:"[]{} qkvFB-.eU\\')))
        path.write_bytes(damaged)
        try:
            entries, _ = data_files._map_safetensors(path)
        except FileFormatError:
            continue
        taken += 1
        with safe_open(path, "numpy") as theirs:
            assert set(theirs.keys()) == set(entries)
            for key in entries:
                assert list(theirs.get_slice(key).get_shape()) == entries[key]["shape"]
                if entries[key]["dtype"] == "F16":
                    assert theirs.get_tensor(key).tobytes() == entries[key]["data"].tobytes()
                    both += 1
    assert taken >= 50 and both >= 100  # names, dtypes of the same width, metadata


def test_a_header_of_a_gigabyte(tmp_path):
    """The file is as large as it says, and sparse: it takes neither disk nor memory."""
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 2**30) + b"{")
        file.truncate(2**30 + 8)
    refuses_within_limits("data_files.load_qkv", path, f"its header has {2**30} bytes; wants at most 8388608")


def test_a_header_of_as_many_names_as_it_may_have(tmp_path):
    """8 MiB of tensors of nothing are read within the limit, and are no q, k and v."""
    one = ',"%06d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    header = ("{" + "".join(one % i for i in range(8 * MIB // 62))[1:] + "}").encode()
    assert 7 * MIB < len(header) <= 8 * MIB
    path = safetensors(tmp_path / "x.safetensors", header, 0)
    assert len(refuses_within_limits("data_files.load_qkv", path, "has no tensor 'q'")) < 2100


def test_data_are_not_read_before_they_are_used(tmp_path):
    """Of a file of 4 GiB, sparse."""
    rows = 2**31 // (2 * 64)
    header = {
        "layers.0.q": entry("F16", [1, rows, 1, 64], 0, 2**31),
        "layers.0.k": entry("F16", [1, 1, 1, 64], 2**31, 2**31 + 128),
        "layers.0.v": entry("F16", [1, 1, 1, 64], 2**31 + 128, 2**31 + 256),
    }
    path = safetensors(tmp_path / "x.safetensors", header, 0)
    os.truncate(path, path.stat().st_size + 2**31 + 256)
    started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ((_, (q, *_)),) = iter_layers(path)
    assert q.shape == (1, rows, 1, 64) and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - started < 100 * 1024


# --- npz ---------------------------------------------------------------------------------------------------------
def npy(array=None, descr="<f2", shape=SHAPE, data=None, header=None, version=1):
    """An .npy member: of an array, or with any header."""
    if array is not None:
        file = io.BytesIO()
        np.save(file, array)
        return file.getvalue()
    header = repr({"descr": descr, "fortran_order": False, "shape": shape}) if header is None else header
    header = header.encode() if isinstance(header, str) else header
    width = "<H" if version == 1 else "<I"
    data = bytes(NUM_BYTES) if data is None else data
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack(width, len(header)) + header + data


def npz(path, members=(), method=zipfile.ZIP_DEFLATED, without=""):
    """An archive of q, k and v, of which ``members`` replaces or adds some; names as given, with .npy if one letter."""
    content = {f"{name}.npy": npy(tensor()) for name in "qkv" if name not in without}
    content.update((f"{name}.npy" if len(name) == 1 else name, data) for name, data in dict(members).items())
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


class Evil:
    """A pickle of it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def pickled(path):
    array = np.empty(1, object)
    array[0] = Evil(path)
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


NPZ = {
    "a header that is code": (npy(header="__import__('os').system('touch /tmp/x')"), "q"),
    "a header that is a call": (npy(header="{'descr': print(1), 'fortran_order': False, 'shape': ()}"), "q"),
    "a header that computes": (npy(header="{'descr': '<f2', 'fortran_order': False, 'shape': (9**9**9,)}"), "q"),
    "a header of brackets": (npy(header="(" * 4000), "q"),
    "a header too long": (npy(header=" " * 5000), "its header has more than 4096 bytes"),
    "a header that goes on": (npy(header=b"")[:8] + b"\xff\xff", "its header has more than"),
    "a header of 4 GiB": (npy(header=b"", version=2)[:8] + b"\xff\xff\xff\xff", "its header has more than"),
    "no header": (b"\x93NUMPY\x01\x00", "q"),
    "version 9": (b"\x93NUMPY\x09\x00" + npy()[8:], "no .npy array of a version"),
    "a shape that is huge": (npy(shape=(2**60,)), "declares .* bytes"),
    "a shape whose bytes wrap": (npy(shape=(2**63, 2**63)), "declares .* bytes"),
    "a negative shape": (npy(shape=(-1, -512)), "its shape is"),
    "a shape of other things": (npy(shape=("1", 2)), "q"),
    "nothing, of a huge shape": (npy(shape=(0, 2**62, 2**62), data=b""), "q"),
    "a hundred axes": (npy(shape=(1,) * 99 + (512,)), "q"),
    "fewer bytes than declared": (npy(data=bytes(NUM_BYTES - 2)), "declares 1024 bytes, it has 1022"),
    "more bytes than declared": (npy(data=bytes(NUM_BYTES + 2)), "declares 1024 bytes, it has 1026"),
    "an element of 2 GiB": (npy(descr="|V2147483647", shape=(1,)), "declares"),
    "an element of nothing": (npy(descr="|V0", data=b""), "q"),
    "objects": (npy(descr="|O", shape=(128,)), "Python objects, which are never unpickled"),
    "objects in a record": (npy(descr=[("a", "|O")], shape=(128,)), "Python objects"),
    "no such dtype": (npy(descr="<z9"), "q"),
    "a text for an array": (b"0.1, 0.2", "no .npy array"),
    "an archive in an archive": (b"PK\x05\x06" + bytes(18), "no .npy array"),
    "float32": (npy(tensor().astype(np.float32)), "q: got dtype float32"),
    "the other byte order": (npy(tensor().astype(">f2")), "q: got dtype >f2"),
    "a record": (npy(np.zeros(SHAPE[:3], "<f2,<f2")), "q: got"),
    "a record of a float16": (npy(tensor().view([("a", "<f2")])), "q: got"),
    "a record of two bytes": (npy(tensor().view("u1,u1")), "q: got"),
    "texts": (npy(np.full(SHAPE, "a")), "q: got dtype"),
}


@pytest.mark.parametrize("case", NPZ)
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_malformed_arrays_in_an_archive(tmp_path, case, method):
    data, match = NPZ[case]
    path = npz(tmp_path / "x.npz", {"q": data}, method)
    for call in (load_qkv, layers, BlockMask.load_npz):
        refuses(call, path, match if call is load_qkv else ".")


@pytest.mark.parametrize("call", [load_qkv, layers, BlockMask.load_npz])
def test_nothing_is_unpickled(tmp_path, call):
    made = tmp_path / "made"
    path = npz(tmp_path / "x.npz", {"q": pickled(made)})
    with np.load(path, allow_pickle=True) as archive:  # it is a working one
        archive["q"]
    assert made.exists()
    made.unlink()
    refuses(call, path, "never unpickled")
    path.write_bytes(pickled(made))
    refuses(call, path, "is a single array, not an npz archive")
    import pickle

    path.write_bytes(pickle.dumps(Evil(made)))
    refuses(call, path, "is not an npz archive")
    assert not made.exists()


def test_archives_that_lie_or_are_cut(tmp_path):
    path = tmp_path / "x.npz"
    for name, match in (("q.npy", "'q' twice"), ("q", "'q' twice")):
        with pytest.warns(UserWarning) if name == "q.npy" else open(os.devnull):
            with zipfile.ZipFile(npz(path), "a") as archive:
                archive.writestr(name, npy(tensor()))
        refuses(load_qkv, path, match)
    data = npz(path).read_bytes()
    for end in range(0, len(data), 29):
        path.write_bytes(data[:end])
        refuses(load_qkv, path, "x.npz: is not")
    path.write_bytes(data.replace(b"PK\x01\x02", b"PK\x01\x03"))
    refuses(load_qkv, path, "is not")
    first = data.index(b"PK\x01\x02")
    for offset, value, match in (
        (8, b"\x01\x00", "encrypted|password"),  # a flag
        (10, b"\x0c\x00", "packed in a way"),  # bzip2
        (10, b"\x0e\x00", "packed in a way"),  # LZMA, whose dictionary may be 4 GiB
        (16, b"\x00\x00\x00\x00", "Bad CRC-32"),
        (42, b"\xff\xff\xff\x7f", "q"),  # where the member is
        (24, b"\xff\xff\xff\x00", "declares 1024 bytes"),  # its size, unpacked
        (24, b"\x10\x00\x00\x00", "q"),
        (20, b"\x10\x00\x00\x00", "q"),  # packed
    ):
        damaged = bytearray(data)
        damaged[first + offset : first + offset + len(value)] = value
        path.write_bytes(damaged)
        refuses(load_qkv, path, match)


def test_names_are_only_names(tmp_path):
    """Paths among them lead nowhere, and control characters in them are written out."""
    names = ["../../q.npy", "/etc/q.npy", "C:\\q.npy", "q.npy/", "..", CONTROL + ".npy"]
    before = sorted(tmp_path.rglob("*"))
    path = npz(tmp_path / "x.npz", {name: b"" for name in names})
    assert [x.tobytes() for x in load_qkv(path)[:3]] == [tensor().tobytes()] * 3
    assert sorted(tmp_path.rglob("*")) == [*before, path]
    text = refuses(load_qkv, npz(tmp_path / "y.npz", {name: b"" for name in names}, without="v"), "has no tensor 'v'")
    assert "\\x1b[2J" in text
    mask = np.zeros((2, 1), np.uint8)
    np.savez(tmp_path / "m.npz", **{CONTROL: mask, "../h1": mask})
    assert BlockMask.load_npz(tmp_path / "m.npz").words.shape == (1, 2, 2, 1)
    code, output, _, _ = python(
        f"from salekit.cli.main import main; main(['mask-dump', {str(tmp_path / 'm.npz')!r}])", limited=False
    )
    assert code == 0 and "\x1b" not in output and "\x07" not in output and "\\x1b[2J" in output


@pytest.mark.parametrize("meta, match", [
    ("{", "__meta__: is not JSON"),
    ("[1]", "wants a JSON object|not a JSON object"),
    ('{"layout": "bshd", "layout": "bhsd"}', "'layout' twice"),
    ("[" * 100_000, "is not JSON"),
    ('{"block_q": 1' + "0" * 5000 + "}", "is not JSON"),
])
def test_metadata_of_an_archive(tmp_path, meta, match):
    np.savez(tmp_path / "x.npz", q=tensor(), k=tensor(), v=tensor(), __meta__=np.array(meta))
    if "block_q" not in meta:
        refuses(load_qkv, tmp_path / "x.npz", match)
    np.savez(tmp_path / "m.npz", h0=np.zeros((1, 1), np.uint8), __meta__=np.array(meta))
    if "layout" not in meta or "twice" in match:
        refuses(BlockMask.load_npz, tmp_path / "m.npz", match)


def test_metadata_that_are_no_text(tmp_path):
    for number, data in enumerate([
        npy(np.zeros(3)), npy(np.array([b"{}"])), npy(descr="<U1", shape=(), data=b"\xff\xff\xff\xff"),
        pickled(tmp_path / "made"), npy(np.array("x" * (untrusted_files.MAX_META_BYTES // 4 + 1))),
    ]):
        path = npz(tmp_path / f"{number}.npz", {"__meta__.npy": data})
        refuses(load_qkv, path, "__meta__")
    assert not (tmp_path / "made").exists()


# --- archives that expand ----------------------------------------------------------------------------------------
def bomb(path, num_bytes, members=("q",), shape=None, descr="<f2", others=None):
    """Deflated zeros, a thousand to one, written without ever having them all."""
    rows = num_bytes // (2 * 64)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in members:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                file.write(npy(descr=descr, shape=shape or (1, rows, 1, 64), data=b""))
                for _ in range(num_bytes // MIB):
                    file.write(bytes(MIB))
        for name, data in (others or {name: npy(tensor()) for name in {"q", "k", "v"} - set(members)}).items():
            archive.writestr(f"{name}.npy", data)
    return path


def test_a_bomb(tmp_path):
    """A gigabyte in a megabyte, whole and well-formed: said before any of it is unpacked."""
    path = bomb(tmp_path / "x.npz", 1024 * MIB)
    assert path.stat().st_size < 2 * MIB
    for function in ("data_files.load_qkv", "data_files.load_layers", "block_mask.BlockMask.load_npz"):
        output = refuses_within_limits(function, path, "would expand to 10737")
        assert f"wants at most {untrusted_files.FREE_EXPANSION}" in output and "numpy.savez" in output


def test_a_bomb_of_many_members(tmp_path):
    """Each is small enough; read together they are not."""
    path = bomb(tmp_path / "x.npz", 128 * MIB, "qkv")
    refuses_within_limits("data_files.load_qkv", path, "would expand to")


def test_members_that_share_their_bytes(tmp_path):
    """Thousands of entries of one member: its list is long, its bytes are few."""
    path = tmp_path / "x.npz"
    data = zlib.compress(npy(shape=(2**20,), descr="|u1", data=bytes(2**20)), 9)[2:-4]
    size = len(npy(shape=(2**20,), descr="|u1", data=b"")) + 2**20
    crc = zlib.crc32(npy(shape=(2**20,), descr="|u1", data=bytes(2**20)))
    local = struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, 0, 8, 0, 0, crc, len(data), size, 1, 0) + b"a" + data
    entries = b"".join(
        struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 20, 20, 0, 8, 0, 0, crc, len(data), size, 6, 0, 0, 0, 0, 0, 0)
        + b"%06d" % i for i in range(20_000)
    )
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 20_000, 20_000, len(entries), len(local), 0)
    path.write_bytes(local + entries + end)
    refuses_within_limits("block_mask.BlockMask.load_npz", path, "would expand to 2")


def test_a_list_of_a_million_members(tmp_path):
    path = tmp_path / "x.npz"
    entry = struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 20, 20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    count = 10**6
    with open(path, "wb") as file:
        file.write(entry * count)
        file.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 65535, 65535, len(entry) * count, 0, 0))
    for function in ("data_files.load_qkv", "block_mask.BlockMask.load_npz"):
        refuses_within_limits(function, path, "list of members has more than 4194304 bytes")


def test_a_mask_takes_twice_its_bytes(tmp_path):
    """Of 1M tokens and two heads, 128x32: 64 MiB of bits, which was 8 and more times that."""
    np.savez(tmp_path / "m.npz", h0=np.full((8192, 4096), 0x5A, np.uint8), h1=np.zeros((8192, 4096), np.uint8),
             __meta__=np.array(json.dumps({"block_q": 128, "block_k": 32, "seqlen_q": 2**20, "seqlen_k": 2**20})))
    code, output, problems, _ = python(f"""
        mask = block_mask.BlockMask.load_npz({str(tmp_path / "m.npz")!r})
        print(mask.words.shape, hex(mask.words[0, 0, 5, 7]), mask.words[0, 1].any())
    """)
    assert code == 0 and output == "(1, 2, 8192, 1024) 0x5a5a5a5a False\n", problems


@pytest.mark.parametrize("mib, match", [(80, "would expand to 335544320; wants at most"), (64, "do not fit in memory")])
def test_a_mask_of_rows_of_a_byte(tmp_path, mib, match):
    """In words of 32 bits they take four times that."""
    path = tmp_path / "m.npz"
    meta = {"batch": 1, "num_heads": mib, "block_q": 1, "block_k": 1, "seqlen_q": MIB, "seqlen_k": 8, "causal": False}
    bomb(path, MIB, [f"h{i}" for i in range(mib)], (MIB, 1), "|u1", {"__meta__": npy(np.array(json.dumps(meta)))})
    refuses_within_limits("block_mask.BlockMask.load_npz", path, match)


# --- masks -------------------------------------------------------------------------------------------------------
MASKS = {
    "block 0": ({"block_q": 0}, "block_q is 0"),
    "a block that is true": ({"block_k": True}, "block_k is True"),
    "a block that is a text": ({"block_k": "32"}, "block_k is '32'"),
    "a length that is inf": ({"seqlen_q": float("inf")}, "seqlen_q is inf"),
    "a length that is NaN": ({"seqlen_k": float("nan")}, "seqlen_k is nan"),
    "a length of 400 digits": ({"seqlen_q": 10**400}, "seqlen_q is 1000"),
    "a negative length": ({"seqlen_q": -64}, "seqlen_q is -64"),
    "another length": ({"seqlen_q": 1000}, "do not fit"),
    "batch 0": ({"batch": 0}, "batch is 0"),
    "three batches of two heads": ({"batch": 3}, "do not fit"),
    "a window of one": ({"window": [1]}, "do not fit"),
    "a window of texts": ({"window": ["1", "2"]}, "window is"),
    "a window that is a number": ({"window": 5}, "window is 5"),
    "causal by a number": ({"causal": 1}, "causal is 1"),
    "more heads than arrays": ({"num_heads": 8}, "has 2 arrays; wants 1x8, one a head"),
    "fewer heads than arrays": ({"num_heads": 1}, "has 2 arrays; wants 1x1, one a head"),
    "no heads": ({"num_heads": 0}, "has 2 arrays; wants 1x0, one a head"),
    "heads that are true": ({"num_heads": True}, "num_heads is True"),
    "a schema to come": ({"schema": 99}, "got schema 99 of a mask; wants 1"),
    "a schema that is true": ({"schema": True}, "got schema True of a mask"),
    "a schema that is a list": ({"schema": [1]}, "got schema .1. of a mask"),
}


@pytest.mark.parametrize("case", MASKS)
def test_malformed_masks(tmp_path, case):
    meta, match = MASKS[case]
    meta = {"block_q": 64, "block_k": 32, "seqlen_q": 128, "seqlen_k": 128, **meta}
    head = np.zeros((2, 1), np.uint8)
    np.savez(tmp_path / "m.npz", h0=head, h1=head, __meta__=np.array(json.dumps(meta)))
    refuses(BlockMask.load_npz, tmp_path / "m.npz", match)


@pytest.mark.parametrize("heads", [[], [np.zeros((2, 1), bool)], [np.zeros(2, np.uint8)],
                                   [np.zeros((2, 1), np.uint8), np.zeros((2, 2), np.uint8)]])
def test_arrays_that_are_no_masks(tmp_path, heads):
    np.savez(tmp_path / "m.npz", **{f"h{i}": head for i, head in enumerate(heads)})
    refuses(BlockMask.load_npz, tmp_path / "m.npz", "wants one uint8")


@pytest.mark.parametrize("seqlen_q, seqlen_k", [(500, 500), (300, 1301), (64, 1024), (1, 1), (0, 40), (40, 0)])
@pytest.mark.parametrize("batch", [1, 2])
def test_masks_come_back(tmp_path, seqlen_q, seqlen_k, batch):
    rng = np.random.default_rng(seqlen_k)
    shape = (batch, 3, -(-seqlen_q // 64), -(-seqlen_k // 32))
    bits = rng.random(shape) < 0.4
    mask = BlockMask.from_dense(bits, 64, 32, seqlen_q, seqlen_k, True, 9, -1)
    bits = mask.to_dense()
    mask.save_npz(tmp_path / "m.npz")
    again = BlockMask.load_npz(tmp_path / "m.npz")
    assert again.words.shape == mask.words.shape and again.words.dtype == np.uint32
    assert (again.words == mask.words).all() and (again.to_dense() == bits).all()
    assert (again.window_left, again.window_right, again.causal) == (9, -1, True)
    with np.load(tmp_path / "m.npz") as archive:  # the format did not change
        name = "h2" if batch == 1 else "b1_h2"
        assert (archive[name] == np.packbits(bits[-1, 2], axis=-1, bitorder="little")).all()


def test_bits_past_the_last_block_are_cleared(tmp_path):
    np.savez(tmp_path / "m.npz", h0=np.full((2, 1), 255, np.uint8),
             __meta__=np.array(json.dumps({"seqlen_q": 128, "seqlen_k": 80})))
    assert BlockMask.load_npz(tmp_path / "m.npz").words.ravel().tolist() == [7, 7]


# --- JSON --------------------------------------------------------------------------------------------------------
CALIBRATED = {
    "schema": 3, "estimator": "int8", "block": [128, 32], "query_stride": 1, "skipped": "drop",
    "layers": {"3": {"1024": [0.1, 0.2], "2048": [0.2, 0.3]}},
    "fits": {"3": {"slope": [0.1, None], "intercept": [-3.0, None], "residual": [0.0, None]}},
}


def with_layers(of):
    return {**CALIBRATED, "layers": {"3": of}}


def with_fit(**changes):
    return {**CALIBRATED, "fits": {"3": {**CALIBRATED["fits"]["3"], **changes}}}


JSON = {
    "a key twice": ('{"schema": 1, "schema": 1, "thresholds": [1]}', "'schema' twice"),
    "deep": ("[" * 10**6, "is not JSON"),
    "a number of 5,000 digits": ("[1" + "0" * 5000 + "]", "is not JSON"),
    "a number of 400 digits": ("[1" + "0" * 400 + "]", "too large"),
    "NaN": ("[NaN]", "got nan for head 0"),
    "-Infinity": ("[-Infinity]", "got -inf for head 0"),
    "a schema that is a list": ({"schema": [1]}, "got schema"),
    "a schema without end": ({"schema": "x" * 10**6}, "got schema"),
    "a schema that moves the cursor": ({"schema": CONTROL}, r"\\x1b"),
    "a list of lists": ([[0.1]] * 5, "got .0.1. for head 0"),
    "no layers": ({"schema": 3, "layers": {}}, "holds no layers"),
    "layers that are a list": ({"schema": 3, "layers": [1]}, "holds no layers"),
    "a length with an underscore": (with_layers({"1_024": [0.1, 0.2], "2048": [1, 2]}), "are not lengths"),
    "a length with a space": (with_layers({" 1024": [0.1, 0.2], "2048": [1, 2]}), "are not lengths"),
    "a length in other digits": (with_layers({"\u0661": [0.1, 0.2], "2048": [1, 2]}), "are not lengths"),
    "a length of 0": (with_layers({"0": [0.1, 0.2], "2048": [1, 2]}), "are not lengths"),
    "a length of 30 digits": (with_layers({"9" * 30: [0.1, 0.2], "2048": [1, 2]}), "are not lengths"),
    "a length of 5,000 digits": (with_layers({"9" * 5000: [0.1, 0.2], "2048": [1, 2]}), "are not lengths"),
    "heads that differ": (with_layers({"1024": [0.1], "2048": [1, 2]}), "differ in their heads"),
    "heads that are no list": (with_layers({"1024": 1, "2048": [1, 2]}), "wants a list"),
    "a fit of NaN": (with_fit(slope=[float("nan"), None]), "wants slope and intercept"),
    "a fit of 400 digits": (with_fit(slope=[10**400, None]), "wants slope and intercept"),
    "a fit of inf": (with_fit(intercept=[float("inf"), None]), "wants slope and intercept"),
    "a fit of 1e308": (with_fit(slope=[1e308, None]), "wants slope and intercept"),
    "a fit of texts": (with_fit(slope=["1", None]), "wants slope and intercept"),
    "a fit of another number of heads": (with_fit(slope=[1.0]), "wants slope and intercept"),
}


@pytest.mark.parametrize("case", JSON)
def test_malformed_thresholds(tmp_path, case):
    content, match = JSON[case]
    path = tmp_path / "t.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    refuses(lambda path: load_thresholds(path, seqlen=1500), path, match)


def test_the_good_thresholds(tmp_path):
    (tmp_path / "t.json").write_text(json.dumps(CALIBRATED))
    assert load_thresholds(tmp_path / "t.json", seqlen=1500).shape == (2,)
    save_thresholds(tmp_path / "s.json", {"3": {1024: [0.1, 0.2]}}, {})
    assert load_thresholds(tmp_path / "s.json", seqlen=1500).shape == (2,)


def test_what_a_file_holds_is_quoted_in_short_and_written_out(tmp_path):
    """In the errors that are about arguments, too."""
    path = tmp_path / "t.json"
    names = {CONTROL: {"1024": [0.1]}, **{f"layer {i}": {"1024": [0.1]} for i in range(10_000)}}
    path.write_text(json.dumps({**CALIBRATED, "layers": names, "estimator": CONTROL * 1000}))
    for options in ({}, {"layer": 7}, {"estimator": "int8"}):
        with pytest.raises(ArgumentError) as error:
            load_thresholds(path, **options)
        assert str(error.value).isprintable() and len(str(error.value)) < 2500


def test_json_of_any_size(tmp_path):
    path = tmp_path / "t.json"
    with open(path, "wb") as file:
        file.write(b"[")
        file.truncate(2**33)
    refuses_within_limits("thresholds.load_thresholds", path, f"has {2**33} bytes; wants at most")
    path.write_text("[" + "[]," * (MIB * 8) + "[]]")  # 24 MiB of text, a gigabyte of lists
    refuses_within_limits("thresholds.load_thresholds", path, "does not fit in memory")


# --- what is no plain file ---------------------------------------------------------------------------------------
READERS = {
    "x.safetensors": ("data_files.load_qkv", load_qkv),
    "y.safetensors": ("data_files.load_layers", layers),
    "x.npz": ("data_files.load_qkv", load_qkv),
    "y.npz": ("data_files.load_layers", layers),
    "m.npz": ("block_mask.BlockMask.load_npz", BlockMask.load_npz),
    "t.json": ("thresholds.load_thresholds", load_thresholds),
}


@pytest.mark.parametrize("name", READERS)
def test_folders_pipes_devices_and_links(tmp_path, name):
    """A pipe without a writer would be waited for, /dev/zero read for ever."""
    path, (_, call) = tmp_path / name, READERS[name]
    path.mkdir()
    refuses(call, path, "is not a plain file|cannot be read: Is a directory")
    path.rmdir()
    os.mkfifo(path)
    refuses(call, path, "is not a plain file")
    for target in ("/dev/zero", "/dev/null", "/dev/full"):
        path.unlink()
        path.symlink_to(target)
        refuses(call, path, "is not a plain file")
    path.unlink()
    path.symlink_to(path)
    refuses(call, path, "cannot be read: Too many levels of symbolic links")
    path.unlink()
    refuses(call, path, "cannot be read: No such file")
    with pytest.raises(FileFormatError, match="cannot be read"):
        call(str(tmp_path / ("a\0b." + name)))
    with pytest.raises(FileFormatError, match="cannot be read: File name too long"):
        call(tmp_path / ("n" * 300 + name))


def test_the_list_of_an_earlier_export(tmp_path):
    def listed(text):
        (tmp_path / "salekit_x.json").write_text(text)
        return lambda path: _earlier_files(path.parent)

    path = tmp_path / "salekit_x.json"
    kind = '{"kind": "salekit-export", "files": %s}'
    for text, match in (
        ("[" * 10**5, "is not JSON"), ("[]", "not the list of an export"), (kind % "5", "not the list of an export"),
        (kind % '["../a"]', "outside"), (kind % '["/etc/passwd"]', "outside"), (kind % '[".."]', "outside"),
        (kind % '["cubins/.."]', "outside"), (kind % '["."]', "outside"), (kind % '["cubins/a/../../b"]', "outside"),
        (kind % "[1]", "outside"), (kind % '["a\\nb"]', "outside"), (kind % '"ab/c"', "outside"),
    ):
        refuses(listed(text), path, match)
    path.unlink()
    os.mkfifo(path)
    refuses(lambda path: _earlier_files(path.parent), path, "is not a plain file")


# --- the command line --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arguments", [
    ["validate", "--backend", "numpy", "--input", "{pipe}.npz"],
    ["validate", "--backend", "numpy", "--input", "{bad}.safetensors"],
    ["calibrate", "{pipe}.npz", "-o", "{new}"],
    ["calibrate", "{bad}.npz", "-o", "{new}"],
    ["compare", "{bad}.npz"],
    ["mask-dump", "{pipe}.npz"],
    ["mask-dump", "{bad}.npz"],
    ["mask-dump", "{bad}.safetensors"],
    ["bench", "--seqlen", "64", "--masks", "{bad}.npz"],
    ["bench", "--seqlen", "64", "--thresholds", "{bad}.json"],
])
def test_exit_codes(tmp_path, arguments):
    """1, one line on stderr without control characters, nothing on stdout, no file left."""
    names = {"{pipe}": tmp_path / "pipe", "{bad}": tmp_path / f"bad{CONTROL[:5]}", "{new}": tmp_path / "new"}
    os.mkfifo(tmp_path / "pipe.npz")
    header = {**GOOD, CONTROL: entry("F17", [1], 0, 2)}
    safetensors(Path(f"{names['{bad}']}.safetensors"), header)
    npz(Path(f"{names['{bad}']}.npz"), {CONTROL: b"", "q": npy(shape=(2**60,))})
    Path(f"{names['{bad}']}.json").write_text(json.dumps({"schema": CONTROL}))
    for name, value in names.items():
        arguments = [argument.replace(name, str(value)) for argument in arguments]
    code, output, problems, _ = python(f"from salekit.cli.main import main; main({arguments!r})", limited=False)
    *notes, last = problems.splitlines()
    assert code == 1 and output == "" and last.startswith("salekit: error: "), problems
    assert problems.replace("\n", "").isprintable() and not (tmp_path / "new").exists()
    assert not any("error" in line for line in notes)


# --- mutations ---------------------------------------------------------------------------------------------------
def seeds(folder):
    """(reader, suffix, bytes) of valid files."""
    tensors = {name: tensor((1, 3, 1, 64), i).astype(ml_dtypes.bfloat16) for i, name in enumerate("qkv")}
    mask = BlockMask.from_dense(np.random.default_rng(0).random((1, 2, 5, 11)) < 0.5, 64, 32, 300, 340, True)
    paths = []
    for save, name in ((np.savez, "stored.npz"), (np.savez_compressed, "packed.npz")):
        save(folder / name, **tensors, __meta__=np.array('{"layout": "bshd"}'))
        paths += [(load_qkv, folder / name), (layers, folder / name)]
    one = {name: entry("F16", [1, 3, 1, 64], i * 384, i * 384 + 384) for i, name in enumerate("qkv")}
    one["__metadata__"] = {"layout": "bshd"}
    paths.append((load_qkv, safetensors(folder / "x.safetensors", one, 3 * 384)))
    many = {f"layers.{n}.{name}": entry("BF16", [1, 3, 1, 64], i * 384, i * 384 + 384)
            for i, (n, name) in enumerate((n, name) for n in (3, 12) for name in "qkv")}
    paths.append((layers, safetensors(folder / "y.safetensors", many, 6 * 384)))
    mask.save_npz(folder / "m.npz")
    paths.append((BlockMask.load_npz, folder / "m.npz"))
    (folder / "t.json").write_text(json.dumps(CALIBRATED))
    paths.append((lambda path: load_thresholds(path, seqlen=1500), folder / "t.json"))
    (folder / "u.json").write_text(json.dumps({"schema": 1, "thresholds": [0.008, 0, 1e9]}))
    paths.append((load_thresholds, folder / "u.json"))
    return [(call, path.suffix, path.read_bytes()) for call, path in paths]


def mutated(rng, data, others):
    """Flips, cuts, repeats, and pieces of other files or of what parsers stumble over."""
    data = bytearray(data)
    pieces = (b"\0" * 8, b"\xff" * 8, b"PK\x05\x06", b"PK\x01\x02", b"\x93NUMPY\x01\x00", b"[" * 300, b"1e999", b"NaN",
              b"-1", b'"', b"9" * 30, b"{", b"null", b"\x1b[2J", b"\xed\xa0\x80")
    for _ in range(int(rng.integers(1, 4))):
        kind, at = int(rng.integers(6)), int(rng.integers(len(data) + 1))
        length = int(rng.integers(1, 40))
        if kind <= 1 and at < len(data):
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            del data[at : len(data) if rng.random() < 0.3 else at + length]
        elif kind == 3:
            data[at:at] = data[at : at + length]
        elif kind == 4:
            other = others[int(rng.integers(len(others)))]
            start = int(rng.integers(len(other)))
            data[at : at + length] = other[start : start + length]
        else:
            data[at : at + (0 if rng.random() < 0.5 else length)] = pieces[int(rng.integers(len(pieces)))]
    return bytes(data)


def test_mutations_give_salekit_s_errors_alone(tmp_path):
    """4,000 files, from a fixed seed: each is read or refused by a SalekitError in one printable line."""
    files = seeds(tmp_path)
    for call, suffix, data in files:
        (tmp_path / f"f{suffix}").write_bytes(data)
        call(tmp_path / f"f{suffix}")
    rng, refused, started = np.random.default_rng(20250524), 0, time.monotonic()
    for turn in range(4000):
        call, suffix, data = files[turn % len(files)]
        path = tmp_path / f"f{suffix}"
        path.write_bytes(mutated(rng, data, [other for _, _, other in files]))
        try:
            call(path)
        except SalekitError as error:
            refused += 1
            assert str(error).isprintable() and len(str(error)) < 2500, (turn, error)
        except BaseException as error:
            raise AssertionError(f"turn {turn}: {type(error).__name__}: {error}") from error
    assert refused > 2000 and time.monotonic() - started < 60


def test_helpers_of_readers(tmp_path):
    (tmp_path / "x.json").write_text('{"a": [1, null, Infinity]}')
    assert read_json(tmp_path / "x.json") == {"a": [1, None, float("inf")]}
    with open_plain(tmp_path / "x.json") as file:
        assert file.read(1) == b"{"
    np.savez(tmp_path / "x.npz", a=np.arange(6).reshape(2, 3), f=np.asfortranarray(np.arange(6.0).reshape(2, 3)),
             e=np.zeros((0, 3)), s=np.array(5))
    with Npz(tmp_path / "x.npz") as archive:
        assert archive.names == ["a", "f", "e", "s"] and archive.metadata() == {}
        for name, got in archive.arrays(archive.names).items():
            with np.load(tmp_path / "x.npz") as theirs:
                want = theirs[name]
                assert got.dtype == want.dtype and got.shape == want.shape and (got == want).all()
