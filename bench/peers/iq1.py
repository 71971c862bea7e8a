"""Peer: matrices through llama.cpp's own encoders of IQ1_S and IQ1_M, with an importance for every column.

    iq1.py --input IN.safetensors --output OUT.safetensors --out OUT.json

``IN`` holds ``NAME.weight`` float32 [O, I] and ``NAME.importance`` float32 [I], the mean squared input of every column,
as llama.cpp's importance matrix has it; ``I`` is a multiple of 256. ``OUT`` gets ``NAME.IQ1_S`` and ``NAME.IQ1_M``, the
dequantized matrices, and the record what the encoder says it wrote, in bytes.

Encoding is ``ggml_quantize_chunk`` of the library in the package ``xllamacpp`` (llama.cpp, linked whole), decoding the
package ``gguf``; ggml's own decoder must give the same numbers. Needs no torch, and nothing of the project's own code.
"""

import argparse
import ctypes
import importlib.metadata
import importlib.util
import json
import platform
import time
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from safetensors import safe_open
from safetensors.numpy import save_file

TYPES = ("IQ1_S", "IQ1_M")
BLOCK = 256


def library() -> ctypes.CDLL:
    """The shared library of the package, with the types of what is called."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("xllamacpp is not installed in this environment; see docs/measuring.md")
    found = sorted(Path(spec.submodule_search_locations[0]).glob("xllamacpp*.so"))
    lib = ctypes.CDLL(str(found[0]))
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    lib.ggml_quantize_init.argtypes = [ctypes.c_int]
    lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    for name in TYPES:
        getattr(lib, f"dequantize_row_{name.lower()}").argtypes = [pointer, pointer, count]
        lib.ggml_quantize_init(int(GGMLQuantizationType[name]))  # the grids, which the encoder searches
    return lib


def encode(lib: ctypes.CDLL, kind: str, weight: np.ndarray, importance: np.ndarray) -> tuple[np.ndarray, int]:
    """Bytes of every row, and how many the encoder says it wrote."""
    own = GGMLQuantizationType[kind]
    size, width = gguf.GGML_QUANT_SIZES[own]
    rows, columns = weight.shape
    data = np.zeros((rows, columns // size * width), np.uint8)
    written = lib.ggml_quantize_chunk(
        int(own), weight.ctypes.data, data.ctypes.data, 0, rows, columns, importance.ctypes.data
    )
    return data, written


def decode(lib: ctypes.CDLL, kind: str, data: np.ndarray, columns: int) -> np.ndarray:
    """The dense matrix, by two decoders that must agree."""
    dense = dequantize(data, GGMLQuantizationType[kind]).astype(np.float32)
    again = np.zeros_like(dense)
    for row in range(len(data)):
        getattr(lib, f"dequantize_row_{kind.lower()}")(data[row].ctypes.data, again[row].ctypes.data, columns)
    if not np.array_equal(dense, again):
        raise SystemExit(f"two decoders of {kind} give different numbers")
    return dense


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    lib = library()
    dense, matrices = {}, {}
    with safe_open(args.input, "np") as file:
        for key in sorted(file.keys()):
            name, _, part = key.rpartition(".")
            if part != "weight":
                continue
            weight = np.ascontiguousarray(file.get_tensor(key), np.float32)
            importance = np.ascontiguousarray(file.get_tensor(f"{name}.importance"), np.float32)
            if weight.shape[1] % BLOCK or importance.shape != weight.shape[1:]:
                raise SystemExit(f"{name} is {weight.shape} with {importance.shape}; rows must be multiples of {BLOCK}")
            matrices[name] = {}
            for kind in TYPES:
                began = time.process_time()
                data, written = encode(lib, kind, weight, importance)
                seconds = time.process_time() - began
                if written != data.nbytes:
                    raise SystemExit(f"{kind} of {name}: {written} bytes written, {data.nbytes} expected")
                dense[f"{name}.{kind}"] = decode(lib, kind, data, weight.shape[1])
                matrices[name][kind] = {"bytes": written, "cpu_seconds": round(seconds, 2)}
    save_file(dense, args.output)
    versions = {name: importlib.metadata.version(name) for name in ("xllamacpp", "gguf", "numpy")}
    record = {"versions": {"python": platform.python_version(), **versions}, "matrices": matrices}
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
