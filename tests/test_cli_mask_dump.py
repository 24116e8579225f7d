"""salekit mask-dump: overlays, differences, sheets, pages and lists."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import subprocess
import tracemalloc
import xml.etree.ElementTree as ElementTree
import zlib

import numpy as np
import pytest
from click.testing import CliRunner
from salekit.cli.main import cli
from test_cli import decode_png, salekit
from test_host_mask_lists import random_mask

from salekit import mask_lists
from salekit.block_mask import BlockMask

BLOCKS = (128, 32, 1000, 1300, True)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two masks of the same shape, and q, k and v."""
    folder = tmp_path_factory.mktemp("masks")
    one = random_mask(BLOCKS)
    bits = one.to_dense()
    bits[1, 2, 5, 7] ^= True
    bits[0, 1, 3] = False
    two = BlockMask.from_dense(bits & one.visible(), *BLOCKS)
    one.save_npz(folder / "one.npz")
    two.save_npz(folder / "two.npz")
    rng = np.random.default_rng(0)
    shapes = {name: (1, 700, heads, 64) for name, heads in zip("qkv", (2, 1, 1))}
    tensors = {name: rng.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()}
    np.savez(folder / "qkv.npz", **tensors)
    return folder, one, two


def dump(*args, ok=True):
    backend = () if str(args[0]).endswith("one.npz") else ("--backend", "numpy")  # a mask is computed already
    result = salekit("mask-dump", *args, *backend, NO_COLOR="1")
    assert (result.returncode == 0) == ok and "Traceback" not in result.stderr, result.stderr
    return result


def test_lists_round_trip(files, tmp_path):
    folder, one, _ = files
    for form, back in (
        ("csr", mask_lists.from_csr),
        ("flex", mask_lists.from_counted_lists),
        ("fa4", mask_lists.from_counted_lists),
    ):
        dump(folder / "one.npz", "--format", form, "-o", tmp_path / form)
        with np.load(tmp_path / form) as archive:
            lists = {name: archive[name] for name in archive.files if name != "block"}
            assert archive["block"].tolist() == [128, 32]
        assert np.array_equal(back(lists, *BLOCKS).words, one.words)
    dump(folder / "one.npz", "--format", "flashinfer", "-o", tmp_path / "bsr")
    with np.load(tmp_path / "bsr") as archive:
        lists = [{name: archive[f"h{head}_{name}"] for name in ("indptr", "indices")} for head in range(6)]
    assert np.array_equal(mask_lists.from_flashinfer(lists, 2, *BLOCKS).words, one.words)


def test_difference(files):
    folder, one, two = files
    data = json.loads(dump(folder / "one.npz", "--diff", folder / "two.npz", "--json").stdout)
    a, b = (mask.to_dense().reshape(6, -1) for mask in (one, two))
    assert data["blocks"] == {
        "in both": (a & b).sum(axis=1).tolist(),
        "in the first alone": (a & ~b).sum(axis=1).tolist(),
        "in the second alone": (b & ~a).sum(axis=1).tolist(),
    }
    assert sum(data["blocks"]["in the first alone"]) + sum(data["blocks"]["in the second alone"]) > 0
    drawn = dump(folder / "one.npz", "--diff", folder / "two.npz", "--head", 5, "--width", 20).stdout
    assert "  c  in the second alone: " in drawn


def test_legend_of_the_terminal(files):
    """A letter a kind where there is no colour, in the legend and in the cells; else a swatch of its colour."""
    folder, one, two = files
    arguments = ("mask-dump", folder / "one.npz", "--diff", folder / "two.npz", "--head", 5, "--width", 41)
    for encoding, nothing in (("utf-8", "·"), ("ascii", "`")):
        lines = salekit(*arguments, NO_COLOR="1", PYTHONIOENCODING=encoding).stdout.splitlines()
        a, b, visible = one.to_dense()[1, 2], two.to_dense()[1, 2], one.visible()
        want = np.where(a & b, "a", np.where(a, "b", np.where(b, "c", np.where(visible, nothing, " "))))
        assert lines[1:4] == [
            f"  a  in both: {(a & b).sum()} blocks",
            f"  b  in the first alone: {(a & ~b).sum()} blocks",
            f"  c  in the second alone: {(b & ~a).sum()} blocks",
        ]
        assert [line.ljust(41) for line in lines[4:]] == ["".join(row) for row in want]
    terminal = {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": "100"}
    lines = salekit(*arguments, **terminal).stdout.splitlines()
    for line, (red, green, blue) in zip(lines[1:4], ((150, 150, 158), (249, 142, 9), (70, 140, 255))):
        assert line.startswith(f"  \x1b[48;2;{red};{green};{blue}m  \x1b[0m  in "), line
    assert "\u2580" in lines[4] and not re.match("  [abc]  ", lines[1])


def test_overlays(files):
    folder, one, _ = files
    data = json.loads(dump(folder / "one.npz", "--overlay", "diagonal", "--json").stdout)
    full = mask_lists.full_blocks(one)
    assert data["blocks"]["full"] == (one.to_dense() & full).sum(axis=(2, 3)).ravel().tolist()
    data = json.loads(dump(folder / "qkv.npz", "--overlay", "anchors", "--json").stdout)
    assert all(count > 0 for count in data["blocks"]["anchor"])
    rising = json.loads(dump(folder / "qkv.npz", "--overlay", "tau", "--tau", "0.01", "--json").stdout)["blocks"]
    assert list(rising) == ["tau 0.0025", "tau 0.005", "tau 0.01", "tau 0.02", "tau 0.04"]
    # What stays at the last tau was selected at all: with what falls out at each they are the mask of the first.
    whole = json.loads(dump(folder / "qkv.npz", "--tau", "0.0025", "--json").stdout)
    visible = BlockMask.from_dense(np.zeros((1, 1, 6, 22), bool), 128, 32, 700, 700, True).visible().sum()
    assert np.sum(list(rising.values()), axis=0) == pytest.approx(np.array(whole["density"]) * visible)


def test_difference_of_estimators(files):
    folder = files[0]
    data = json.loads(dump(folder / "qkv.npz", "--estimator", "int8", "--diff-estimator", "int8-sp24", "--json").stdout)
    assert set(data["blocks"]) == {"in both", "in the first alone", "in the second alone"}


def test_contact_sheet(files, tmp_path):
    folder, one, _ = files
    dump(folder / "one.npz", "--format", "png", "-o", tmp_path / "sheet.png")
    rows, columns = one.num_q_blocks, one.num_k_blocks
    assert decode_png((tmp_path / "sheet.png").read_bytes()).shape == (2 * rows + 4, 3 * columns + 8, 3)


def test_svg(files, tmp_path):
    dump(files[0] / "one.npz", "--format", "svg", "-o", tmp_path / "m.svg", "--overlay", "diagonal")
    root = ElementTree.parse(tmp_path / "m.svg").getroot()
    images = root.findall(".//{http://www.w3.org/2000/svg}image")
    assert len(images) == 6
    picture = decode_png(base64.b64decode(images[5].get("href").partition("base64,")[2]))
    assert picture.shape == (8, 41, 3)
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert any("density" in text for text in texts) and "on the diagonal or a ragged end" in texts


def page_data(path) -> dict:
    return json.loads(re.search(r"const mask = (\{.*\});", path.read_text()).group(1).replace("\\u003c", "<"))


def test_page(files, tmp_path):
    folder, one, _ = files
    dump(folder / "one.npz", "--format", "html", "-o", tmp_path / "m.html", "--head", 4, "--head", 1)
    text = (tmp_path / "m.html").read_text()
    assert "http" not in text.replace("http://www.w3.org", "")  # nothing is fetched
    data = page_data(tmp_path / "m.html")
    dense = one.to_dense().reshape(6, one.num_q_blocks, one.num_k_blocks)
    for entry, head in zip(data["heads"], (4, 1)):
        cells = np.frombuffer(zlib.decompress(base64.b64decode(entry["cells"])), np.uint8)
        assert np.array_equal(cells.reshape(dense.shape[1:]), dense[head])
        assert entry["set"] == dense[head].sum(axis=1).tolist()


def best_scores(entry, shape) -> np.ndarray:
    """What a page shows: natural logarithms, +inf and -inf."""
    best = entry["best"]
    codes = np.frombuffer(zlib.decompress(base64.b64decode(best["codes"])), np.uint8).reshape(shape).astype(float)
    values = best["low"] + (codes - 1) / 253 * (best["high"] - best["low"])
    return np.where(codes == 0, -np.inf, np.where(codes == 255, np.inf, values))


def sample_scores(folder) -> np.ndarray:
    """float32 [2, num_q_blocks, num_k_blocks] of qkv.npz."""
    import salekit as package
    from salekit.data_files import load_qkv

    q, k, v, _ = load_qkv(folder / "qkv.npz")
    plan = package.make_plan(q, k, v, estimator="int8", dense_below=0)
    codes = package.quantize(q, k, plan)
    return package.block_scores(codes, *package.anchor_statistics(q, k, codes.k_mean, plan), plan)[0]


def test_best_scores_of_a_page(files, tmp_path):
    folder = files[0]
    dump(folder / "qkv.npz", "--estimator", "int8", "--format", "html", "-o", tmp_path / "m.html")
    data = page_data(tmp_path / "m.html")
    scores = sample_scores(folder)
    assert data["note"] == "" and len(data["heads"]) == 2
    for entry, want in zip(data["heads"], scores):
        got = best_scores(entry, want.shape)
        finite = np.isfinite(want)
        assert np.array_equal(got[~finite], want[~finite]) and finite.any()
        step = (entry["best"]["high"] - entry["best"]["low"]) / 253
        assert np.abs(got[finite] - want[finite]).max() <= step / 2 + 1e-6 and step < 0.1


def test_pages_without_best_scores(files, tmp_path, monkeypatch):
    from salekit.cli import mask_pictures

    folder, one, _ = files
    dump(folder / "one.npz", "--format", "html", "-o", tmp_path / "m.html")
    data = page_data(tmp_path / "m.html")
    assert data["note"] == "no best scores: made from masks" and not any("best" in entry for entry in data["heads"])
    scores = sample_scores(folder)
    drawing = mask_pictures.Drawing(
        mask_pictures.SELECTED, lambda head: (scores[head] > -5).astype(np.uint8), ["a", "b"], scores[0] > -np.inf,
        128, 32, 700, 700, scores.__getitem__,
    )

    def data_of(heads):
        return json.loads(re.search(r"const mask = (\{.*\});", mask_pictures.encode_html(drawing, heads, "t")).group(1))

    (entry,) = data_of([0])["heads"]
    monkeypatch.setattr(mask_pictures, "MAX_PAGE_BYTES", len(entry["cells"]) + len(entry["best"]["codes"]))
    for heads, kept in (([0], True), ([0, 1], False)):
        data = data_of(heads)
        assert all(("best" in entry) == kept for entry in data["heads"])
        assert ("left out" in data["note"]) != kept


def test_score_codes():
    from salekit.cli.mask_pictures import LOWEST_SCORE, score_codes

    most = np.finfo(np.float32).max
    scores = np.array([-np.inf, np.inf, most, -100, -3.0, 2.5], np.float32)
    codes, low, high = score_codes(scores)
    assert low == pytest.approx(LOWEST_SCORE) and high == 2.5
    assert codes.dtype == np.uint8 and codes.tolist()[:4] == [0, 255, 255, 1] and codes[5] == 254
    assert low + (codes[4] - 1) / 253 * (high - low) == pytest.approx(-3, abs=(high - low) / 500)
    assert score_codes(np.full(3, -np.inf, np.float32))[0].tolist() == [0, 0, 0]
    assert score_codes(np.full(2, 1.5, np.float32))[0].tolist() == [1, 1]


HOVER = """<script>
const waiting = setInterval(() => {
  if (!document.body.dataset.ready) return;
  clearInterval(waiting);
  const box = view.getBoundingClientRect(), found = [];
  for (const [row, column] of SPOTS) {
    view.dispatchEvent(new PointerEvent("pointermove", {
      clientX: box.left + (column + 0.5) / mask.columns * box.width,
      clientY: box.top + (row + 0.5) / mask.rows * box.height,
    }));
    found.push(under.textContent);
  }
  document.body.dataset.found = JSON.stringify(found);
}, 10);
</script>"""


def open_in_browser(page, profile) -> str:
    """The document that Chromium makes of a page."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom")
    command = [browser, *options, f"--user-data-dir={profile}", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


needs_browser = pytest.mark.skipif(
    not (shutil.which("chromium") or shutil.which("chromium-browser")), reason="needs Chromium"
)


@needs_browser
def test_page_opens_in_a_browser(files, tmp_path):
    folder, one, _ = files
    dump(folder / "one.npz", "--format", "html", "-o", tmp_path / "m.html", "--head", 5)
    page = open_in_browser(tmp_path / "m.html", tmp_path / "profile")
    count = int(one.to_dense().reshape(6, -1)[5].sum())
    assert 'data-ready="0"' in page and f": {count} of {one.visible().sum()} visible blocks set<" in page
    assert "no best scores: made from masks" in page


@needs_browser
def test_hover_shows_best_scores(files, tmp_path):
    """The pointer over a scored block, an anchor and a block that no row sees."""
    folder = files[0]
    dump(folder / "qkv.npz", "--estimator", "int8", "--format", "html", "-o", tmp_path / "m.html", "--head", 1)
    scores = sample_scores(folder)[1]
    scored = np.argwhere(np.isfinite(scores))[-1]
    spots = [scored.tolist(), [3, 0], [0, 21]]
    text = (tmp_path / "m.html").read_text()
    assert "</body>" in text
    (tmp_path / "hover.html").write_text(text.replace("</body>", HOVER.replace("SPOTS", str(spots)) + "</body>"))
    document = html.unescape(open_in_browser(tmp_path / "hover.html", tmp_path / "profile"))
    seen = json.loads(re.search(r'data-found="(\[.*?\])"', document).group(1))
    value = best_scores(page_data(tmp_path / "m.html")["heads"][0], scores.shape)[tuple(scored)]
    assert f"key block {scored[1]} " in seen[0]
    shown = float(re.search(r"; best score ([\d.e-]+);", seen[0]).group(1))
    assert shown == pytest.approx(np.exp(value), rel=0.05)
    assert shown == pytest.approx(np.exp(scores[tuple(scored)]), rel=0.1)
    assert "; kept at every tau; " in seen[1]
    assert "not visible" in seen[2] and "best" not in seen[2]


@pytest.fixture(scope="module")
def layered(files):
    """layers.4 and layers.12 with 4 query heads and 2 KV heads, in one file and in one file each."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(1)
    folder, whole = files[0], {}
    for layer in (4, 12):
        tensors = {
            name: (2 * rng.standard_normal((1, 1500, heads, 64))).astype(np.float16)
            for name, heads in zip("qkv", (4, 2, 2))
        }
        save_file(tensors, folder / f"layer{layer}.safetensors")
        whole.update({f"layers.{layer}.{name}": x for name, x in tensors.items()})
    save_file(whole, folder / "layers.safetensors")
    np.savez(folder / "layers.npz", **whole)
    return folder


def test_sheet_of_layers(layered, tmp_path):
    """A row a layer; each panel is what the layer's own file gives."""
    args = ("--estimator", "int8", "--tau", 30, "--format", "svg", "--json")
    heads = ("--head", 1, "--head", 3, "--head", 2)
    data = json.loads(dump(layered / "layers.npz", *args, "-o", tmp_path / "all.svg", *heads).stdout)
    assert data["layers"] == ["4"] * 3 + ["12"] * 3 and data["heads"] == [1, 3, 2, 1, 3, 2]
    of_files, own = [], []
    for layer in (4, 12):
        one = tmp_path / f"{layer}.svg"
        summary = json.loads(dump(layered / f"layer{layer}.safetensors", *args, "-o", one, *heads).stdout)
        assert "layer" not in summary
        of_files += summary["density"]
        own += [image.get("href") for image in ElementTree.parse(one).getroot().iter() if image.get("href")]
    assert data["density"] == of_files and len(set(own)) == 6
    root = ElementTree.parse(tmp_path / "all.svg").getroot()
    images = [image for image in root.iter() if image.get("href")]
    assert [image.get("href") for image in images] == own
    assert [len({image.get(side) for image in images}) for side in "xy"] == [3, 2]
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert [text.partition(", density")[0] for text in texts if ", density" in text] == [
        f"layer {layer}, head {head}" for layer in (4, 12) for head in (1, 3, 2)
    ]
    dump(layered / "layers.safetensors", "--format", "png", "-o", tmp_path / "all.png")
    assert decode_png((tmp_path / "all.png").read_bytes()).shape == (2 * 12 + 4, 4 * 47 + 3 * 4, 3)


def test_one_layer_of_several(layered, tmp_path):
    args = ("--estimator", "int8", "--format", "npz", "-o", tmp_path / "m.npz", "--force")
    dump(layered / "layers.safetensors", "--layer", 12, *args)
    chosen = BlockMask.load_npz(tmp_path / "m.npz")
    dump(layered / "layer12.safetensors", *args)
    assert np.array_equal(chosen.words, BlockMask.load_npz(tmp_path / "m.npz").words)
    assert json.loads(dump(layered / "layers.safetensors", "--layer", 12, "--json").stdout)["layer"] == "12"


@pytest.mark.parametrize(
    "args, said",
    [
        ((), "--format term takes one layer, not 4, 12 of layers.safetensors; --layer chooses one"),
        (("--format", "npz", "-o", "{free}"), "--format npz takes one layer"),
        (("--format", "flex", "-o", "{free}", "--layer", 4, "--layer", 12), "--format flex takes one layer"),
        (("--format", "png", "-o", "{free}", "--diff", "{mask}"), "--diff takes one layer"),
        (("--format", "png", "-o", "{free}", "--head", 4), "there are heads 0 to 3"),
        (("--layer", 5), "--layer 5: layers.safetensors holds 4, 12"),
    ],
)
def test_usage_of_layers(layered, tmp_path, args, said):
    places = {"{free}": tmp_path / "free", "{mask}": layered / "one.npz"}
    result = dump(layered / "layers.safetensors", *(places.get(arg, arg) for arg in args), ok=False)
    assert result.returncode == 2 and said in " ".join(result.stderr.split()) and not (tmp_path / "free").exists()


LAYERS = """<script>
const waiting = setInterval(async () => {
  if (!document.body.dataset.ready) return;
  clearInterval(waiting);
  const found = [layerChooser.parentElement.hidden, [...layerChooser.options].map((option) => option.text),
                 [...chooser.options].map((option) => option.text), under.textContent];
  const settle = () => new Promise((resolve) => setTimeout(resolve, 300));
  layerChooser.value = 1; layerChooser.dispatchEvent(new Event("change")); await settle();
  found.push(under.textContent);
  document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft", bubbles: true })); await settle();
  document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowDown", bubbles: true })); await settle();
  found.push(under.textContent);
  document.body.dataset.found = JSON.stringify(found);
}, 10);
</script>"""


@pytest.mark.parametrize("several", (True, False))
@needs_browser
def test_page_of_layers(layered, tmp_path, several):
    file = layered / ("layers.safetensors" if several else "layer4.safetensors")
    dump(file, "--estimator", "int8", "--format", "html", "-o", tmp_path / "m.html", "--head", 1, "--head", 3)
    data = page_data(tmp_path / "m.html")
    assert data["sheet"] == (["layer 4", "layer 12"] if several else []) and all("best" in x for x in data["heads"])
    page = (tmp_path / "m.html").read_text().replace("</body>", LAYERS + "</body>")
    (tmp_path / "try.html").write_text(page)
    document = html.unescape(open_in_browser(tmp_path / "try.html", tmp_path / "profile"))
    hidden, layers, heads, *under = json.loads(re.search(r'data-found="(\[.*?\])"', document).group(1))
    assert hidden != several and layers == data["sheet"]
    assert [head.partition(",")[0] for head in heads] == ["head 1", "head 3"]
    texts = [text.partition(", density")[0] for text in under]
    if several:
        assert texts == ["layer 4, head 1", "layer 12, head 1", "layer 12, head 3"]
    else:
        assert texts[0] == "head 1"


def test_large_masks_keep_isolated_blocks(tmp_path):
    """A million tokens: 8,192 x 32,768 blocks."""
    from salekit.cli import mask_pictures

    bits = np.zeros((8192, 32768), bool)
    bits[5000, 1234] = True
    visible = BlockMask(np.zeros((1, 1, 8192, 1024), np.uint32), 128, 32, 2**20, 2**20, True).visible()
    drawing = mask_pictures.Drawing(
        mask_pictures.SELECTED, lambda head: bits.astype(np.uint8), ["head 0"], visible, 128, 32, 2**20, 2**20
    )
    picture = mask_pictures.head_picture(drawing, 0, 480, 480)
    empty, dark = picture[-1, 0], picture[0, -1]
    stands_out = (picture != empty).any(axis=2) & (picture != dark).any(axis=2)
    edges = [np.arange(480) * size // 480 for size in bits.shape]
    row, column = (np.searchsorted(edge, at, "right") - 1 for edge, at in zip(edges, (5000, 1234)))
    assert stands_out.sum() == 1 and stands_out[row, column]
    page = mask_pictures.encode_html(drawing, [0], "big")
    data = json.loads(re.search(r"const mask = (\{.*\});", page).group(1))
    cells = np.frombuffer(zlib.decompress(base64.b64decode(data["heads"][0]["cells"])), np.uint8).reshape(4096, 8192)
    assert cells.sum() == 1 and cells[2500, 308] == 1


@pytest.mark.parametrize("arguments", ["", "--overlay diagonal", "--format svg", "--diff"])
def test_drawing_takes_a_few_bytes_a_block(tmp_path, arguments):
    """A small file may hold billions of blocks. Counts and pictures are made row by row, not with 8 bytes a block."""
    rows, columns = 2000, 16000
    mask = BlockMask(np.full((1, 1, rows, columns // 32), 0x10, np.uint32), 1, 1, rows, columns, False)
    for name in ("a.npz", "b.npz"):
        mask.save_npz(tmp_path / name)
    arguments += f" {tmp_path / 'b.npz'}" if arguments == "--diff" else ""
    output = ["-o", str(tmp_path / "out")] if "svg" in arguments else []
    warm = CliRunner().invoke(cli, ["mask-dump", "--help"])
    tracemalloc.start()
    try:
        result = CliRunner().invoke(cli, ["mask-dump", str(tmp_path / "a.npz"), *arguments.split(), *output])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert warm.exit_code == result.exit_code == 0, result.output
    assert peak <= 7 * rows * columns


@pytest.mark.parametrize(
    "args, said",
    [
        (("--format", "csr"), "needs -o"),
        (("--format", "npz", "-o", "{taken}"), "exists; --force"),
        (("--overlay", "anchors", "--diff", "{two}"), "exclude each other"),
        (("--overlay", "tau"), "is a mask"),
        (("--diff-estimator", "int8"), "is a mask"),
        (("--format", "csr", "-o", "{free}", "--overlay", "anchors"), "holds one mask"),
        (("--diff", "{other}"), "differ in shape"),
        (("--diff", "{window}"), "differ in what rows see: causal and causal, window (64, 0)"),
        (("--head", "6"), "there are heads 0 to 5"),
    ],
)
def test_usage(files, tmp_path, args, said):
    folder = files[0]
    random_mask((128, 32, 500, 500, True)).save_npz(tmp_path / "other.npz")
    BlockMask.from_dense(files[1].to_dense(), *BLOCKS[:4], False, 64, 0).save_npz(tmp_path / "window.npz")
    places = {
        "{taken}": folder / "two.npz", "{two}": folder / "two.npz", "{free}": tmp_path / "free",
        "{other}": tmp_path / "other.npz", "{window}": tmp_path / "window.npz",
    }
    result = dump(folder / "one.npz", *(places.get(arg, arg) for arg in args), ok=False)
    assert result.returncode == 2 and said in " ".join(result.stderr.split()) and not (tmp_path / "free").exists()


@pytest.mark.parametrize("causal, left, right", [(False, -1, 0), (True, -1, 0), (True, 1299, -1), (False, 5000, 0)])
def test_the_same_sight_in_other_words(files, tmp_path, causal, left, right):
    BlockMask.from_dense(files[1].to_dense(), *BLOCKS[:4], causal, left, right).save_npz(tmp_path / "same.npz")
    report = json.loads(dump(files[0] / "one.npz", "--diff", tmp_path / "same.npz", "--json").stdout)
    alone = report["blocks"]["in the first alone"] + report["blocks"]["in the second alone"]
    assert sum(report["blocks"]["in both"]) > 0 and not any(alone)


def test_auto_is_said_by_name():
    report = json.loads(dump("--sample", "--head", "0", "--json").stdout)
    assert report["estimator"] == "int8"


def test_force_overwrites(files, tmp_path):
    target = tmp_path / "mask.npz"
    target.write_text("something")
    dump(files[0] / "one.npz", "--format", "npz", "-o", target, "--force")
    assert np.array_equal(BlockMask.load_npz(target).words, files[1].words)
