"""Benchmarks: ``python -m bench --help``. Timings are medians of interleaved runs."""
