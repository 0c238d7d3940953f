"""What the benchmarks of small models quantize with."""

from __future__ import annotations

# Name -> (spec, method); None: not quantized.
CONFIGURATIONS: dict[str, tuple[str, str] | None] = {
    "full precision": None,
    **{
        f"{spec} {method}": (spec, method)
        for spec in ("w4a4", "w4a8", "w6a6", "w8a8")
        for method in ("minmax", "fpq", "best")
    },
}
