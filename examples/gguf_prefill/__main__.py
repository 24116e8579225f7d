"""The command line: python -m examples.gguf_prefill COMMAND, in a checkout."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import Any, Callable

import click
import numpy as np
from salekit.cli import backends, options, render
from salekit.cli.main import exit_code_of

import salekit
from salekit import timing
from salekit.errors import ArgumentError, SalekitError
from salekit.written_files import check_output

from . import files, measure
from .model import BFLOAT16, Model, array_module

TWIN = "NumPy computes, which takes long beyond a few thousand tokens"
DENSE = "dense"
COLUMNS = ("density", "mean_nll", "perplexity", "passkey", "first_token_ms", "attention_ms")


def _several(*found: Callable) -> Callable:
    """One decorator of several options, shown in this order."""

    def decorate(command: Callable) -> Callable:
        for option in reversed(found):
            command = option(command)
        return command

    return decorate


def _offset(context: Any, parameter: Any, value: str) -> int:
    return 0 if value == "0" else options.parse_seqlen(value)


def _numbers(context: Any, parameter: Any, value: str | None) -> list[int] | None:
    try:
        return None if value is None else [int(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers; wants e.g. 0,7,15") from None


def _thresholds(context: Any, parameter: Any, values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        try:
            tau = float(value)
        except ValueError:  # "dense", or a file's name
            continue
        if not tau >= 0:
            raise click.BadParameter(f"{value!r} is not a threshold; wants dense, a number >= 0, inf or a file")
    return values


common = _several(
    click.option("--model", default="smollm2", show_default=True, help="smollm2, qwen or a GGUF file."),
    click.option(
        "--tokens", callback=lambda c, p, value: options.parse_seqlen(value), default="2k", show_default=True,
        help="Length of a prompt.",
    ),
    click.option("--text", type=click.Path(), help="UTF-8 file.  [default: Python's language reference]"),
    click.option("--offset", callback=_offset, default="0", show_default=True, help="First token of the text to use."),
    options.backend,
    options.as_json,
)
attention = _several(
    click.option(
        "--thresholds", multiple=True, default=(DENSE, "0.008"), show_default=True, metavar="dense|TAU|FILE",
        callback=_thresholds, help="One way of attention, several times: a row each. FILE: of salekit calibrate.",
    ),
    options.block,
    options.estimator,
    options.query_stride,
    options.attend,
)
trials = click.option("--trials", type=click.IntRange(1), default=5, show_default=True, help="Passkeys, a depth each.")
repeats = click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Timed prefills.")


class Session:
    """The model and the tokens that the options name."""

    def __init__(self, model: str, tokens: int, text: str | None, offset: int, backend: str, **_: Any):
        self.use_gpu = backends.use_gpu(backend, TWIN)
        self.model, self.tokens = Model(files.find_model(model), array_module(self.use_gpu)), tokens
        if tokens > self.model.context:
            raise ArgumentError(f"--tokens: got {tokens}; the model's context is {self.model.context}")
        self.ids = self.model.tokenizer.encode(files.read_text(text), offset + tokens)[offset:]
        if len(self.ids) < tokens:
            raise ArgumentError(f"--text: has {len(self.ids)} tokens from --offset {offset} on; wants {tokens}")
        digest = hashlib.sha256(np.asarray(self.ids, "<i4").tobytes()).hexdigest()
        self.about = {
            "model": self.model.path.name,
            "tokens": tokens,
            "text": {"file": text and Path(text).name, "offset": offset, "tokens_sha256": digest},
        }

    def load(self) -> None:
        with render.progress("weights", self.model.num_tensors) as tick:
            self.model.load(tick)

    def ways(self, thresholds: tuple[str, ...], **chosen: Any) -> list[measure.Attention]:
        """Of each value of --thresholds. Raises what load_thresholds raises when a file is not of these options."""
        model = self.model
        q, k = (model.xp.empty((1, 1, n, model.head_dim), BFLOAT16) for n in (model.num_heads, model.num_kv_heads))
        estimator = salekit.make_plan(q, k, k, **chosen).estimator  # what "auto" is here
        self.about["options"] = {**chosen, "estimator": estimator}
        return [self._way(name, estimator, chosen) for name in thresholds]

    def _way(self, name: str, estimator: str, chosen: dict[str, Any]) -> measure.Attention:
        if name == DENSE:
            return measure.Attention(name, None)
        layers = range(self.model.num_layers)
        try:
            thresholds = [options.TAU.convert(name, None, None)] * len(layers)
        except click.BadParameter:
            of = dict(seqlen=self.tokens, estimator=estimator, block=chosen["block"], skipped="drop")
            of["query_stride"] = chosen["query_stride"]
            thresholds = [salekit.load_thresholds(name, layer=layer, **of) for layer in layers]
        return measure.Attention(Path(name).name, thresholds, chosen)


def _table(parts: tuple[str, ...], given: dict[str, Any]) -> None:
    """Measures the parts for each way and prints a row for each."""
    session = Session(**given)
    chosen = {name: given[name] for name in ("thresholds", "block", "estimator", "query_stride", "attend")}
    ways = session.ways(**chosen)
    session.load()
    rows: list[dict[str, Any]] = [{"attention": way.name} for way in ways]
    for way, row in zip(ways, rows):
        if "perplexity" in parts:
            row |= measure.likelihood(session.model, session.ids, way)
            render.note(f"{way.name}: mean negative log-likelihood {row['mean_nll']:.4f}, density {row['density']:.3f}")
        if "passkey" in parts:
            row["passkey"] = measure.recall(session.model, session.ids, session.tokens, given["trials"], way)
            render.note(f"{way.name}: passkey {_cell('passkey', row['passkey'])}")
    if "ttft" in parts:
        for row, times in zip(rows, measure.first_token(session.model, session.ids, ways, given["repeats"])):
            row |= times
    if given["as_json"]:
        machine = {"gpu": timing.gpu_info() if session.use_gpu else None, "versions": timing.versions()}
        about = {**session.about, "machine": machine, "commit": timing.git_commit()}
        render.print_json({"schema": 1, "kind": "salekit-gguf-prefill", **about, "rows": rows})
        return
    shown = [column for column in COLUMNS if column in rows[0]]
    render.table(
        f"{session.about['model']}, {session.tokens} tokens",
        ["attention", *(name.replace("_", " ") for name in shown)],
        [[row["attention"], *(_cell(name, row[name]) for name in shown)] for row in rows],
    )


def _cell(name: str, value: Any) -> str:
    if name == "passkey":
        return f"{value['right']} of {value['trials']}"
    if name == "first_token_ms":
        value = value["median"]
    return f"{value:.1f}" if name.endswith("_ms") else f"{value:.4f}"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Prefill of a GGUF model (Llama or Qwen2 family) on CuPy or NumPy, with salekit as its attention."""


@cli.command()
@common
@attention
def perplexity(**given: Any) -> None:
    """Mean negative log-likelihood of a text, in nats, its exp, and the density of the masks."""
    _table(("perplexity",), given)


@cli.command()
@common
@attention
@trials
def passkey(**given: Any) -> None:
    """How often the model finds a five-digit key in a long text."""
    _table(("passkey",), given)


@cli.command()
@common
@attention
@repeats
def ttft(**given: Any) -> None:
    """Time to the first token, and what of it is attention."""
    _table(("ttft",), given)


@cli.command()
@common
@attention
@trials
@repeats
def table(**given: Any) -> None:
    """All three, a row for each --thresholds."""
    _table(("perplexity", "passkey", "ttft"), given)


@cli.command()
@common
@click.option("--layers", callback=_numbers, help="Comma separated, from 0.  [default: all]")
@click.option("--kv-heads", callback=_numbers, help="These and the query heads that share them.  [default: all]")
@click.option("-o", "--output", type=click.Path(dir_okay=False), required=True, help="Write this .safetensors file.")
def dump(layers: list[int] | None, kv_heads: list[int] | None, output: str, **given: Any) -> None:
    """Write q, k and v of dense prefill, bfloat16, for salekit calibrate and compare."""
    path = Path(output)
    if path.suffix != ".safetensors":
        raise click.UsageError(f"-o: got {output}; wants a name that ends in .safetensors")
    check_output("-o", output, given["text"], given["model"])
    session = Session(**given)
    layers = _within("--layers", layers, session.model.num_layers)
    kv_heads = _within("--kv-heads", kv_heads, session.model.num_kv_heads)
    group = session.model.num_heads // session.model.num_kv_heads
    heads = [head * group + member for head in kv_heads for member in range(group)]
    tensors: dict[str, np.ndarray] = {}

    def attend(layer: int, q: Any, k: Any, v: Any) -> Any:
        if layer in layers:
            for name, x, some in zip("qkv", (q, k, v), (heads, kv_heads, kv_heads)):
                x = x if isinstance(x, np.ndarray) else x.get()
                tensors[f"layers.{layer}.{name}"] = np.ascontiguousarray(x[:, :, some])
            render.note(f"layer {layer}")
        return salekit.dense_attention(q, k, v)

    session.model.forward(session.ids, attend, num_layers=max(layers) + 1)
    _write(tensors, path)
    if given["as_json"]:
        about = {**session.about, "file": path.name, "layers": layers, "kv_heads": kv_heads}
        render.print_json({"schema": 1, "kind": "salekit-gguf-dump", **about})
    else:
        render.text(f"{path}: {len(layers)} layers, {session.tokens} tokens, {len(heads)} and {len(kv_heads)} heads")


def _within(option: str, chosen: list[int] | None, count: int) -> list[int]:
    if chosen is not None and not set(chosen) <= set(range(count)):
        raise ArgumentError(f"{option}: got {','.join(map(str, chosen))}; wants some of 0 to {count - 1}")
    return list(range(count)) if chosen is None else sorted(set(chosen))


def _write(tensors: dict[str, np.ndarray], path: Path) -> None:
    """The file appears whole or not at all."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial, {"layout": "bshd"})
        os.replace(partial, path)
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written: {error}") from None
    finally:
        partial.unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code, which means what it means for ``salekit``."""
    try:
        cli.main(args=arguments, prog_name="python -m examples.gguf_prefill")
    except (SalekitError, OSError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(int(exit_code_of(error)))


if __name__ == "__main__":
    main()
