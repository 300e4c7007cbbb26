"""Single measurements of the bench, with the large model: loading, decoding, saving."""

from __future__ import annotations

from dataclasses import replace

from benchmarks import decoding, loading, saving
from benchmarks.gpu_check.desk import Desk, plain


def run_loading(desk: Desk) -> None:
    """Loads into place, beside the slower of bare reads and a page-locked copy, with more and more threads."""
    limits = replace(desk.sizes.settings().limits, loader_threads=desk.sizes.loader_threads)
    bench = desk.bench(desk.sizes.middle, limits=limits)
    desk.keep(plain(loading.measure(bench), bench))


def run_decoding(desk: Desk) -> None:
    """A token at the longest context, beside a `DynamicCache`."""
    bench = desk.bench(desk.sizes.lengths[-1])
    desk.keep(plain(decoding.measure(bench), bench))


def run_saving(desk: Desk) -> None:
    """A cold prompt with saving and without."""
    bench = desk.saving_bench()
    desk.keep(plain(saving.measure(bench), bench))
