"""What ``bitfloor inspect`` knows of a folder: from its headers, its config and its report, without torch.

Sizes are those of the files, read from the safetensors headers; the errors come from the report that the run left
behind (``bitfloor.json``). Where the two describe the same thing they must agree. Times are not part of a checkpoint:
they are shown on the machine that made it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from bitfloor.cli.report import REPORT, read_report
from bitfloor.core.errors import InputError
from bitfloor.core.headers import CONFIG, TensorEntry
from bitfloor.formats.checkpoint import check_accounting, read_checkpoint
from bitfloor.formats.layout import NativeConfig, announce_version
from bitfloor.formats.verify import verify_checkpoint
from bitfloor.pipeline.timing import recall

JOURNAL = ".bitfloor"
ORIGINAL_BITS = 16
ENDS = ("embedding", "head")


@dataclass(frozen=True)
class Layer:
    """One quantized matrix as it lies in the files.

    Args:
        name: public name.
        kind: ``linear``, ``conv1d``, ``expert``, ``embedding`` or ``head``.
        shape: ``(O, I)``.
        segments: ``bits``, ``columns`` and ``group_size`` of each column segment.
        nbytes: stored bytes, scales, zero-points and all; an order shared with another matrix is counted there.
        block_error: relative squared error of its block's output, None when the report has none.
        learning: of its block: loss ``before`` and ``after``, the ``step`` kept, ``steps`` made; None if nothing was.
        seconds: time spent on it, None when this machine does not remember the run.
        note: a fallback that was taken, None when there was none.
        rotation: block size of the rotation of its inputs, 0 for none.
        sorted: its input channels are put into an order of their own first.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    segments: tuple[dict[str, int], ...]
    nbytes: int
    block_error: float | None
    learning: Mapping[str, float] | None
    seconds: float | None
    note: str | None = None
    rotation: int = 0
    sorted: bool = False

    @property
    def weights(self) -> int:
        return prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.weights


@dataclass(frozen=True)
class Inspection:
    """A quantized folder.

    Args:
        recipe: name, hash and content of the resolved recipe; the content is missing without a report.
        layers: quantized matrices in natural order.
        nbytes: ``total``, ``linears``, ``embeddings`` and ``other``.
        parameters: of the whole model, a tied matrix counted once.
        linear_weights: weights of the linears, kept ones included.
        tuning: divergence ``before`` and ``after``, and the ``step`` kept, of a tuned model; else None.
        restoration: held-out loss ``before`` and ``after``, and the ``step`` kept, of a restored model; else None.
        format_version: as it lies on disk.
        verified: shards whose bytes were compared, and shards without anything to compare with; None if not asked.
    """

    recipe: dict[str, Any]
    layers: tuple[Layer, ...]
    nbytes: dict[str, int]
    parameters: int
    linear_weights: int
    tuning: Mapping[str, Any] | None = None
    restoration: Mapping[str, Any] | None = None
    format_version: int = 0
    verified: Mapping[str, list[str]] | None = None

    @property
    def bits_per_linear_weight(self) -> float | None:
        return 8 * self.nbytes["linears"] / self.linear_weights if self.linear_weights else None

    @property
    def bits_per_parameter(self) -> float:
        return 8 * self.nbytes["total"] / self.parameters

    @property
    def ratio(self) -> float:
        """Size of the model at 16 bits a parameter, divided by its size here."""
        return ORIGINAL_BITS / self.bits_per_parameter

    def as_json(self) -> dict[str, Any]:
        """The document of ``inspect --json``; its schema is in docs/cli.md."""
        return {
            "recipe": self.recipe,
            "bits_per_linear_weight": self.bits_per_linear_weight,
            "bits_per_parameter": self.bits_per_parameter,
            "bytes": self.nbytes,
            "tuning": _course(self.tuning),
            "restoration": _course(self.restoration),
            "format_version": self.format_version,
            "verified": None if self.verified is None else dict(self.verified),
            "layers": [
                {
                    "name": layer.name,
                    "shape": list(layer.shape),
                    "segments": [dict(segment) for segment in layer.segments],
                    "rotation": layer.rotation,
                    "sorted": layer.sorted,
                    "bytes": layer.nbytes,
                    "bits_per_weight": layer.bits_per_weight,
                    "block_error": layer.block_error,
                    "learning": None if layer.learning is None else dict(layer.learning),
                }
                for layer in self.layers
            ],
        }


def _course(stage: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """How the learning of a stage went."""
    return None if stage is None else {key: stage[key] for key in ("before", "after", "step")}


def inspect_folder(folder: Path, *, verify: bool = False) -> Inspection:
    """Read a bitfloor folder and check that its files, its config and its report agree.

    Args:
        folder: it.
        verify: compare the bytes of all files with their checksums too.

    Raises:
        InputError: not a bitfloor folder (the message says what it is), a damaged one, or one whose report is of
            another checkpoint.
    """
    if (folder / JOURNAL).is_dir() and not (folder / CONFIG).exists():
        raise InputError(f"{folder} holds an unfinished run; repeat its bitfloor quantize command to finish it.")
    checkpoint = read_checkpoint(folder)
    native = checkpoint.native
    announce_version(native)
    check_accounting(folder, native, checkpoint.tensors)
    report = read_report(folder)
    facts: Mapping[str, Any] = report.get("matrices", {})
    kept = {name: entry for name, (_, entry) in checkpoint.tensors.items()}
    verified = None
    if verify:
        compared = verify_checkpoint(checkpoint, report.get("files"))
        verified = {"files": sorted(compared.files), "without_checksum": list(compared.without)}
    seconds = recall(report.get("made_from", {}))
    layers: list[Layer] = []
    for name in sorted(native.matrices, key=lambda name: _natural(name, native.layout_of(name)["kind"])):
        for tensor, _, _ in native.tensors_of(name):
            del kept[tensor]
        found = {**facts.get(name, {}), "seconds": seconds.get(name)}
        layers.append(_layer(name, native.layout_of(name), checkpoint.matrix_bytes(name), found))
    return replace(_totals(folder, native, layers, kept, report), verified=verified)


def _layer(name: str, layout: Mapping[str, Any], nbytes: int, facts: Mapping[str, Any]) -> Layer:
    segments = tuple({key: int(part[key]) for key in ("bits", "columns", "group_size")} for part in layout["segments"])
    rows, columns = layout["shape"]
    told = (facts.get("block_error"), facts.get("learning"), facts.get("seconds"), facts.get("note"))
    return Layer(
        name,
        layout["kind"],
        (rows, columns),
        segments,
        nbytes,
        *told,
        rotation=layout.get("rotation", 0),
        sorted=bool(layout.get("channels")),
    )


def _totals(
    folder: Path, config: NativeConfig, layers: list[Layer], kept: Mapping[str, TensorEntry], report: dict[str, Any]
) -> Inspection:
    nbytes = {"total": 0, "linears": 0, "embeddings": 0, "other": 0}
    weights = {"linears": 0, "embeddings": 0, "other": 0}
    for layer in layers:
        part = "embeddings" if layer.kind in ENDS else "linears"
        nbytes[part] += layer.nbytes
        weights[part] += layer.weights
    parts = _parts_of_kept(report.get("kept", {}))
    for tensor, entry in kept.items():
        part = parts.get(tensor, "other")
        nbytes[part] += entry.nbytes
        weights[part] += prod(entry.shape)
    nbytes["total"] = sum(nbytes.values())
    said = report.get("bytes", nbytes)
    if said != nbytes:
        raise InputError(
            f"{folder / REPORT} speaks of {said} bytes and the files hold {nbytes}; "
            "the report is of another checkpoint, copy the folder again."
        )
    recipe = dict(config.recipe) | dict(report.get("recipe", {}))
    stages = (report.get("tuning"), report.get("restoration"))
    parameters = sum(weights.values())
    return Inspection(recipe, tuple(layers), nbytes, parameters, weights["linears"], *stages, config.version)


def _parts_of_kept(matrices: Iterable[str]) -> dict[str, str]:
    """Tensors of the matrices that were kept as they were, and what they count as.

    A matrix ``a.b`` lies in ``a.b.weight``; an expert ``a.experts.3.up`` is a slice of ``a.experts.up``. Matrices of
    the blocks carry the number of their block; an embedding or a head has no number in its name.
    """
    parts = {}
    for name in matrices:
        part = "linears" if any(piece.isdigit() for piece in name.split(".")) else "embeddings"
        parts[f"{name}.weight"] = part
        parts[re.sub(r"\.\d+(\.[^.]+)$", r"\1", name)] = part
    return parts


def _natural(name: str, kind: str) -> tuple[int, list[tuple[int, str]]]:
    """Embedding first, head last, block 2 before block 10."""
    rank = {"embedding": 0, "head": 2}.get(kind, 1)
    return rank, [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
