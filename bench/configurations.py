"""What the benchmarks of small models quantize with."""

from __future__ import annotations

# Name -> (spec, method, whether attention's products too); None: not quantized.
CONFIGURATIONS: dict[str, tuple[str, str, bool] | None] = {
    "full precision": None,
    **{
        f"{spec} {method}{' attention' if attention else ''}": (spec, method, attention)
        for attention in (False, True)
        for spec in ("w4a4", "w4a8", "w6a6", "w8a8")
        for method in ("minmax", "fpq", "best")
    },
}
