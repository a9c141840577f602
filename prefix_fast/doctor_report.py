"""What `prefix-fast doctor` prints."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prefix_fast import dispatch, linears
from prefix_fast.backends import cuda
from prefix_fast.doctor import (
    check_backends,
    check_configurations,
    check_cuda_kernels,
    check_linears,
    configurations_reason,
    environment,
)


def report(console: Console, every: bool, recheck: bool, tune: bool) -> bool:
    """Check everything and print it; whether all of it is right.

    Args:
        console: where it goes.
        every: all kinds of calls, not only those that most models need.
        recheck: those with a verdict too.
        tune: time other tiles of the Triton kernels, and the CUDA kernels against them.

    Raises:
        ValueError: there is no card to tune on.
    """
    for name, value in environment().items():
        console.print(f"{name:>19}  {escape(value)}")
    table = Table("backend", "devices", "available", "why not", title="Backends, in the order that auto tries them")
    for info in dispatch.backends():
        table.add_row(info.name, info.device, "yes" if info.available else "no", escape(info.reason))
    console.print(table)
    refused = _show_configurations(console, every, recheck, tune)
    refused |= _show_cuda_kernels(console, every, recheck, tune)
    _show_linears(console, recheck)
    with console.status("Checking every available backend against float64"):
        results = check_backends()
    checks = Table("backend", "device", "passed", "not served", "failed", title="Outputs and gradients")
    for result in results:
        failed = f"[red]{len(result.failures)}[/]" if result.failures else "0"
        checks.add_row(result.backend, result.device, str(result.passed), str(result.unsupported), failed)
    console.print(checks)
    failures = [(result, failure) for result in results for failure in result.failures]
    for result, failure in failures:
        console.print(f"[red]{result.backend} on {result.device}[/]: {escape(failure)}", soft_wrap=True)
    if failures or refused:
        return False
    console.print("[green]Every available backend agrees with the oracle.[/]")
    return True


def _show_configurations(console: Console, every: bool, recheck: bool, tune: bool) -> bool:
    """The self-check of the Triton kernels; whether a kernel was wrong with its safe tile too."""
    if reason := configurations_reason():
        if tune:
            raise ValueError(f"doctor: expected a card to tune on, got none: {reason}; leave --tune out")
        console.print(f"Self-check of the Triton kernels: {escape(reason)}")
        return False
    with console.status("") as status:
        doing = "Checking and timing" if tune else "Checking"
        states = check_configurations(
            every, recheck, tune, lambda configuration: status.update(f"{doing} the Triton kernels: {configuration}")
        )
    table = Table("device", "configuration", "queries×keys", "warps", "stages", "", title="Tiles of the Triton kernels")
    for state in states:
        tile = ("–", "–", "–")
        if state.tile is not None:
            tile = (f"{state.tile.queries}×{state.tile.keys}", str(state.tile.warps), str(state.tile.stages))
        table.add_row(state.device, state.configuration, *tile, escape(state.state))
    console.print(table)
    for state in states:
        if state.failure is not None:
            console.print(f"{state.configuration} on {state.device}: {escape(state.failure)}", soft_wrap=True)
    return any(state.failure is not None and state.tile is None for state in states)


def _show_cuda_kernels(console: Console, every: bool, recheck: bool, tune: bool) -> bool:
    """The self-check of the CUDA kernels, and which calls "auto" gives them; whether one was wrong."""
    if cuda.availability() is not None:
        return False
    with console.status("") as status:
        states = check_cuda_kernels(
            every, recheck, tune, lambda kind: status.update(f"Checking the CUDA kernels: {kind}")
        )
    table = Table("device", "kind of call", "", title="CUDA kernels")
    for state in states:
        for kind, verdict in state.verdicts.items():
            table.add_row(state.device, kind, {None: "unchecked", "": "checked"}.get(verdict, "failed: refused"))
    console.print(table)
    for state in states:
        for work, times in state.times.items():
            how = "measured" if times.measured else "predicted"
            console.print(
                f"{work} on {state.device}: {times.faster} is faster ({how}: CUDA {1e6 * times.cuda:.0f} µs, Triton "
                f"{1e6 * times.triton:.0f} µs), so auto takes it for the kinds that are checked"
            )
        for kind, verdict in state.verdicts.items():
            if verdict:
                console.print(f"[red]{kind} on {state.device}[/]: {escape(verdict)}", soft_wrap=True)
    return any(verdict for state in states for verdict in state.verdicts.values())


def _show_linears(console: Console, recheck: bool) -> None:
    """Which library multiplies by the weights of a frozen model."""
    table = Table("product", "PyTorch", "oneDNN", "used", title="Products with frozen weights (no second copies)")
    with console.status("Timing products with frozen weights"):
        for product, times in check_linears(recheck).items():
            shown = ("–", "–") if times is None else tuple(f"{seconds * 1e3:.3g} ms" for seconds in times)
            table.add_row(str(product), *shown, linears.library_of(product))
    console.print(table)
