"""salekit kernels: compile every kernel for each architecture, with or without a GPU."""

from __future__ import annotations

import json

import click

from salekit.plans import SUPPORTED_ARCHS
from salekit.written_files import write

from . import options, render

DEFAULT_ARCHS = "sm_80,sm_86,sm_89,sm_90a,sm_100a,sm_120a"
SCHEMA = 1


def _parse_archs(context, parameter, text: str) -> list[str]:
    archs = [part.strip() for part in text.split(",")]
    for arch in archs:
        if arch not in SUPPORTED_ARCHS:
            raise click.BadParameter(f"{arch!r} is not supported; wants some of {','.join(SUPPORTED_ARCHS)}")
    return archs


@click.command("kernels")
@click.option("--arch", "archs", default=DEFAULT_ARCHS, show_default=True, callback=_parse_archs, help="Architectures.")
@options.force
@options.as_json
@options.output
@click.pass_context
def kernels(context: click.Context, archs: list[str], force: bool, as_json: bool, output: str | None) -> None:
    """Compile every kernel; print registers, shared memory, stack, spills and warnings.

    Exit code 4 on a compile error, a spill or a wgmma serialisation warning.
    """
    options.check_output("-o", output, force=force)
    report = {"schema": SCHEMA, "kind": "salekit-kernels", "nvrtc": None, "kernels": []}
    from salekit import catalog, jit

    report["nvrtc"] = ".".join(map(str, jit.nvrtc_version()))
    for arch in archs:
        jit.check_nvrtc(arch)  # one error, not one a kernel
    for arch in archs:
        specs = catalog.all_specs(arch)
        with render.progress(f"compiling for {arch}", len(specs)) as advance:
            results = compile_all([spec for _, spec in specs], arch, advance)
        for (stage, spec), (info, error) in zip(specs, results):
            entry = {
                "arch": arch,
                "stage": stage,
                "kernel": spec.label,
                "error": error,
                "problem": problem_of(info, error),
            }
            if info is not None:
                entry.update(
                    registers=info.registers,
                    shared_bytes=info.static_shared_bytes + info.dynamic_shared_bytes,
                    stack_bytes=info.stack_bytes,
                    spill_store_bytes=info.spill_store_bytes,
                    spill_load_bytes=info.spill_load_bytes,
                    warnings=list(info.warnings),
                    seconds=info.compile_seconds,
                )
            report["kernels"].append(entry)
    if output:
        write(output, json.dumps(report, indent=2) + "\n")
        render.note(f"wrote {output}")
    if as_json:
        render.print_json(report)
    else:
        _print(report)
    bad = [entry for entry in report["kernels"] if entry["problem"]]
    for entry in bad:
        render.note(f"salekit: error: {entry['kernel']} for {entry['arch']}: {entry['problem']}")
    if bad:
        context.exit(4)


def compile_all(specs, arch: str, advance=lambda: None) -> list[tuple]:
    """(info, error) of each spec: one of them is None."""
    import os
    from concurrent.futures import ThreadPoolExecutor

    from salekit import jit
    from salekit.errors import CompileError

    def compile_one(spec):
        try:
            return jit.compile_kernel(spec, arch).info, None
        except CompileError as error:
            return None, str(error)
        finally:
            advance()

    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        return list(pool.map(compile_one, specs))


def problem_of(info, error: str | None) -> str | None:
    """What makes a build unacceptable, in a few words; None when nothing does."""
    if error is not None:
        return next((line.strip() for line in error.splitlines() if "error" in line), error.splitlines()[0])
    if info.spill_store_bytes or info.spill_load_bytes:
        return f"spills {info.spill_store_bytes} bytes of stores, {info.spill_load_bytes} of loads"
    for warning in info.warnings:
        if "serializ" in warning:
            return warning
    return None


def _print(report: dict) -> None:
    columns = ["kernel", "arch", "registers", "shared KiB", "stack", "spills", "seconds", "warnings"]
    rows = [
        [
            e["kernel"],
            e["arch"],
            e["registers"],
            f"{e['shared_bytes'] / 1024:.1f}",
            e["stack_bytes"],
            e["spill_store_bytes"] + e["spill_load_bytes"],
            f"{e['seconds']:.2f}",
            len(e["warnings"]),
        ]
        if e["error"] is None
        else [e["kernel"], e["arch"], "error", "", "", "", "", ""]
        for e in report["kernels"]
    ]
    render.table(f"{len(rows)} kernels, NVRTC {report['nvrtc']}", columns, rows)
