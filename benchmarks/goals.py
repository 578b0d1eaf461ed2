"""The goals as data: what is compared, with whom, in which cases, and the bound. The report says reached or missed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.measures import Found, Measure, error, error_over, latency, neighbours, per_weight, speed
from benchmarks.records import COLD, HOT

NOISE = 1.05  # by which neighbouring times may differ without meaning anything


@dataclass(frozen=True)
class Goal:
    """measure: from all records. at_most: whether the bound is an upper one. unit: behind the value."""

    text: str
    bound: float
    measure: Measure
    at_most: bool = False
    unit: str = ""

    def reached(self, found: Found) -> bool:
        return found.value <= self.bound if self.at_most else found.value >= self.bound


READ_WRITE, SAME, FRESH = "read w, write packed", "store, same memory", "store, fresh memory"
READ_SAME = "read packed, store, same memory"
READ, DENSE, BNB, GGML, INT4 = "read of packed", "dense torch", "bitsandbytes", "ggml", "int4pack"
_QUANTIZE: dict[str, Any] = {"suite": "codec", "what": "quantize", "place": COLD}
_DECODE: dict[str, Any] = {"suite": "codec", "what": "dequantize"}
_LINEAR: dict[str, Any] = {"suite": "linear", "candidate": "squish_nf4"}
_ONE: dict[str, Any] = {**_LINEAR, "m": 1, "place": COLD, "threads": 2, "n": 4096, "d": 4096}
_SWEEP: dict[str, Any] = {"suite": "growth with M", "candidate": "squish_nf4"}
_LARGE = (64, 256, 1024)

GOALS: tuple[Goal, ...] = (
    Goal(
        "quantize float32: of the read and write loop", 0.65, speed(READ_WRITE, dtype="float32", threads=1, **_QUANTIZE)
    ),
    Goal(
        "quantize bfloat16: of the read and write loop",
        0.45,
        speed(READ_WRITE, dtype="bfloat16", threads=1, **_QUANTIZE),
    ),
    Goal(
        "quantize float32, AVX2 path: of the read and write loop",
        0.40,
        speed(READ_WRITE, dtype="float32", threads=1, isa="avx2", **_QUANTIZE),
    ),
    Goal("quantize float32: times bitsandbytes", 70, speed(BNB, dtype="float32", **_QUANTIZE)),
    *(
        Goal(
            f"dequantize.out {dtype}: of the store loop",
            0.95,
            speed(SAME, dtype=dtype, place=COLD, candidate="squish_nf4 .out", **_DECODE),
        )
        for dtype in ("float32", "bfloat16", "float16")
    ),
    *(
        Goal(
            f"dequantize.out {dtype}: of the loop that also reads the packed bytes",
            0.95,
            speed(READ_SAME, dtype=dtype, place=COLD, candidate="squish_nf4 .out", **_DECODE),
        )
        for dtype in ("float32", "bfloat16", "float16")
    ),
    *(
        Goal(
            f"dequantize {dtype}, fresh: of the store loop into fresh memory",
            0.90,
            speed(FRESH, dtype=dtype, place=COLD, candidate="squish_nf4", **_DECODE),
        )
        for dtype in ("float32", "bfloat16", "float16")
    ),
    Goal("dequantize 1024 x 1024, in cache: times bitsandbytes", 2.0, speed(BNB, place=HOT, **_DECODE)),
    Goal("linear float32: relative error", 1e-6, error(dtype="float32", **_LINEAR), at_most=True),
    *(
        Goal(
            f"linear {dtype}: error over that of dense torch",
            1.2,
            error_over(DENSE, dtype=dtype, **_LINEAR),
            at_most=True,
        )
        for dtype in ("bfloat16", "float16")
    ),
    *(
        Goal(f"linear {dtype}, M = 1: of the read of its bytes", bound, speed(READ, dtype=dtype, **_ONE))
        for dtype, bound in (("bfloat16", 0.80), ("float16", 0.65), ("float32", 0.65))
    ),
    *(
        Goal(
            f"linear {dtype}, M = 1, AVX2 path: of the read of its bytes",
            bound,
            speed(READ, dtype=dtype, isa="avx2", **_ONE),
        )
        for dtype, bound in (("bfloat16", 0.70), ("float32", 0.40))
    ),
    Goal("linear bfloat16, M = 1: times bitsandbytes", 1.0, speed(BNB, dtype="bfloat16", **_ONE)),
    Goal("linear bfloat16, M = 1: times ggml", 1.0, speed(GGML, dtype="bfloat16", **_ONE)),
    *(
        Goal(
            f"linear {dtype}, M = 2 to 16: times the best of bitsandbytes, int4pack and dense torch",
            1.0,
            speed(BNB, INT4, DENSE, dtype=dtype, m=(2, 4, 8, 16), **_LINEAR),
        )
        for dtype in ("bfloat16", "float16", "float32")
    ),
    Goal("linear, every M: times ggml, which rounds activations to 8 bits (a stretch)", 1.0, speed(GGML, **_LINEAR)),
    Goal("linear bfloat16, M >= 64: times dense torch", 0.95, speed(DENSE, dtype="bfloat16", m=_LARGE, **_LINEAR)),
    Goal("linear float32, M >= 64: times dense torch", 1.0, speed(DENSE, dtype="float32", m=_LARGE, **_LINEAR)),
    Goal("linear: step in time from M to M + 1", 2.0, neighbours("m", step=1, **_SWEEP), at_most=True),
    Goal(
        "linear, M = 16 to 65: time of M over that of the next larger M measured",
        NOISE,
        neighbours("m", down=True, m=tuple(range(16, 66)), **_SWEEP),
        at_most=True,
    ),
    Goal("gradient of x, bfloat16: times dense torch", 0.9, speed(DENSE, suite="backward", dtype="bfloat16")),
    Goal("quantize_model: share of the bare kernel", 0.5, speed("the quantize kernel", suite="conversion")),
    Goal(
        "linear 4544 x 4544 and 2880 x 2880: time per weight over that of 4096 x 4096",
        1.15,
        per_weight((4544, 2880), suite="growth with shape"),
        at_most=True,
    ),
    Goal(
        "call of the op, 64 x 64, M = 1",
        5.0,
        latency(suite="overhead", what="call of a layer", candidate="squish_nf4 op"),
        at_most=True,
        unit=" us",
    ),
    Goal(
        "call of NF4Linear, 64 x 64, M = 1",
        9.0,
        latency(suite="overhead", candidate="squish_nf4 NF4Linear"),
        at_most=True,
        unit=" us",
    ),
    Goal("MiniLM bfloat16: times dense torch", 1 / 1.1, speed(DENSE, suite="model", dtype="bfloat16")),
    Goal("MiniLM bfloat16: times bitsandbytes", 1.0, speed(BNB, suite="model", dtype="bfloat16")),
    Goal("MiniLM float32: times dense torch", 1.0, speed(DENSE, suite="model", dtype="float32")),
    *(
        Goal(
            f"linear, growth with {name}: time per {name} over that of half of it",
            1.1,
            neighbours(name, per=name, doubled=True, suite=f"growth with {name}", what="linear"),
            at_most=True,
        )
        for name in ("n", "d")
    ),
    Goal(
        "linear, growth with M: time per M over that of half of it",
        1.1,
        neighbours("m", per="m", doubled=True, **_SWEEP),
        at_most=True,
    ),
    Goal(
        "more threads: time over that with the next smaller number of them",
        NOISE,
        neighbours("threads", suite="growth with threads"),
        at_most=True,
    ),
)
