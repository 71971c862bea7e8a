"""GGUF files with random blocks, of a Llama of any shape: what llama.cpp runs beside a packed model of the same shape.

    python bench/peers/random_gguf.py --out FILE --type Q4_0 --layers 32 --hidden 4096 --intermediate 11008

Blocks are random bytes with scales that keep activations finite; the tensors of a layer are drawn once and written for
every layer, so that seven billion weights take the memory of one layer. Needs the packages ``gguf`` and ``numpy``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

# type: bytes a block, and where its half-precision scales stand in it
SCALES = {"Q4_0": (18, (0,)), "Q2_K": (84, (80, 82)), "IQ1_S": (50, (0,)), "Q6_K": (210, (208,))}
WEIGHTS = {"Q4_0": 32, "Q2_K": 256, "IQ1_S": 256, "Q6_K": 256}
ENDS = "Q6_K"  # embedding and output


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--type", choices=sorted(SCALES), required=True, help="of the matrices of the layers")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def blocks(rows: int, columns: int, kind: str, rng: np.random.Generator) -> Any:
    """A matrix as bytes ``[rows, bytes of a row]``."""
    size, places = SCALES[kind]
    made = rng.integers(0, 256, (rows * columns // WEIGHTS[kind], size), dtype=np.uint8)
    level = {"Q4_0": 0.2, "Q2_K": 0.03, "IQ1_S": 0.2, "Q6_K": 0.0005}[kind] / columns**0.5
    for at in places:
        made[:, at : at + 2] = np.array([level], np.float16).view(np.uint8)
    return made.reshape(rows, -1)


def build(args: argparse.Namespace) -> None:
    """Write the file."""
    writer = gguf.GGUFWriter(str(args.out), "llama")
    heads = args.hidden // args.head_dim
    writer.add_context_length(2048)
    writer.add_embedding_length(args.hidden)
    writer.add_block_count(args.layers)
    writer.add_feed_forward_length(args.intermediate)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(args.head_dim)
    writer.add_vocab_size(args.vocabulary)
    special = ["<unk>", "<s>", "</s>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [f"t{i}" for i in range(len(tokens), args.vocabulary)]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (args.vocabulary - 259)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    rng = np.random.default_rng(args.seed)

    def matrix(name: str, drawn: Any, kind: str) -> None:
        writer.add_tensor(name, drawn, raw_dtype=gguf.GGMLQuantizationType[kind])

    def norm(name: str) -> None:
        writer.add_tensor(name, np.ones(args.hidden, np.float32))

    ends = blocks(args.vocabulary, args.hidden, ENDS, rng)
    matrix("token_embd.weight", ends, ENDS)
    matrix("output.weight", ends, ENDS)
    norm("output_norm.weight")
    square = [blocks(args.hidden, args.hidden, args.type, rng) for _ in range(4)]
    wide = [blocks(args.intermediate, args.hidden, args.type, rng) for _ in range(2)]
    down = blocks(args.hidden, args.intermediate, args.type, rng)
    for k in range(args.layers):
        for part, drawn in zip(("attn_q", "attn_k", "attn_v", "attn_output"), square, strict=True):
            matrix(f"blk.{k}.{part}.weight", drawn, args.type)
        for part, drawn in zip(("ffn_gate", "ffn_up"), wide, strict=True):
            matrix(f"blk.{k}.{part}.weight", drawn, args.type)
        matrix(f"blk.{k}.ffn_down.weight", down, args.type)
        norm(f"blk.{k}.attn_norm.weight")
        norm(f"blk.{k}.ffn_norm.weight")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    build(arguments())
