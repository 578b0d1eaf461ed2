"""What lies beside the shards of a checkpoint: the small files to copy along, and weights in other formats."""

from __future__ import annotations

import os
from pathlib import Path

INDEX_SUFFIX = ".safetensors.index.json"
SMALL_FILE = 64 * 2**20  # the largest tokenizers are near 35 MB
WEIGHT_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".npz",
    ".onnx",
    ".tflite",
)


def collect_small_files(directory: Path, converted: set[Path | None]) -> tuple[list[tuple[Path, Path]], list[str]]:
    """Config, tokenizer and the like, folders too. Hidden files are a tool's, and stay; others are copied or noted.

    Returns:
        (file, its place relative to the directory) of those to copy, and a note on each of the others.
    """
    found: list[tuple[Path, Path]] = []
    notes: list[str] = []

    def fail(error: OSError) -> None:
        raise error

    for folder, subfolders, files in os.walk(directory, onerror=fail):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        linked = [name for name in subfolders if Path(folder, name).is_symlink()]  # os.walk does not enter those
        for name in sorted(files) + linked:
            file = Path(folder, name)
            if file in converted or name.startswith(".") or name.endswith(INDEX_SUFFIX):
                continue
            place = file.relative_to(directory)
            if obstacle := reason_to_leave(file):
                notes.append(f"not copied: {place} ({obstacle})")
            else:
                found.append((file, place))
    return found, notes


def reason_to_leave(file: Path) -> str | None:
    if not file.is_file():
        return "not a file, or a link to a folder"
    if file.suffix in WEIGHT_SUFFIXES:
        return "weights outside the converted shards"
    size = file.stat().st_size
    return f"{size / 2**20:.0f} MiB is not a small file" if size > SMALL_FILE else None


def other_weights(directory: Path) -> str:
    found = sorted(file.name for file in directory.iterdir() if file.suffix in WEIGHT_SUFFIXES)
    return f" (it holds {found[0]}; save it as safetensors first)" if found else ""
