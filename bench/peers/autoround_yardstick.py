"""Peer baseline: quantize a Hugging Face causal LM with auto-round on a CPU and measure its perplexity.

Two steps, run as separate processes so that memory and CPU time of the quantization are not mixed with the
evaluation's:

    autoround_yardstick.py quantize --model DIR --calibration DOCS.txt --bits 2 \
        --weights w2.safetensors --out w2.json
    autoround_yardstick.py evaluate --model DIR --weights w2.safetensors --text wiki=raw:wiki.test.raw \
        --text c4=docs:c4_unseen.txt --out w2.json

``quantize`` hands auto-round ready token ids, so the calibration data cannot depend on its own tokenization, and checks
that its model was fed these and no others. It writes the decoder weights, codes times float16 scales in float32, next
to a JSON record. ``evaluate`` puts those weights into the float32 model, scores the texts and adds the result to the
record. Everything that has no option here is left at auto-round's default: bfloat16 autocast, torch.compile, the best
of all steps, inputs from the blocks quantized before.

Nothing here uses the project's own quantization code: the record is an independent reference point.
"""

import argparse
import logging
import os
import re
import tempfile

import torch
from peer_record import (
    add_steps,
    calibration_entry,
    calibration_tokens,
    cpu_seconds,
    digest,
    evaluate,
    origin,
    peak_rss_mib,
    update_record,
)
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

TOOL = "auto-round"

BLOCK_LINE = re.compile(r"quantized (\d+)/(\d+) layers in the block, loss iter 0: (\S+) -> iter (\d+): (\S+)")


class BlockLog(logging.Handler):
    """Collects what the library says of each block it finished, with the CPU seconds since ``started``."""

    def __init__(self) -> None:
        super().__init__()
        self.started = cpu_seconds()
        self.blocks: list[dict] = []

    def emit(self, record: logging.LogRecord) -> None:
        found = BLOCK_LINE.search(record.getMessage())
        if found is None:
            return
        _, _, first, step, best = found.groups()
        entry = {"first_loss": float(first), "best_loss": float(best), "best_step": int(step)}
        self.blocks.append(entry | {"cpu_seconds_so_far": round(cpu_seconds() - self.started, 1)})


def describe(compressor) -> dict:
    """The settings as the library resolved them, defaults included."""
    solver, scheme = compressor.alg_composer.block_quantizer, compressor.scheme_context
    names = "iters lr minmax_lr momentum gradient_accumulate_steps enable_minmax_tuning enable_norm_bias_tuning "
    names += "enable_quanted_input not_use_best_mse enable_alg_ext enable_lfq"
    settings = {"sym": scheme.sym, "data_type": scheme.data_type, "act_bits": scheme.act_bits}
    settings |= {"solver": type(solver).__name__, **{name: getattr(solver, name) for name in names.split()}}
    calibration, compression = compressor.calibration_context, compressor.compress_context
    settings |= {name: getattr(calibration, name) for name in ("batch_size", "nsamples", "seqlen")}
    settings |= {name: getattr(compression, name) for name in ("enable_torch_compile", "low_gpu_mem_usage")}
    dtype = str(compressor.model_context.amp_dtype).removeprefix("torch.")
    return settings | {"lm_head": compressor.quant_lm_head, "amp": compressor.model_context.amp, "amp_dtype": dtype}


def dequantize(module) -> tuple[torch.Tensor, int, int]:
    """Float32 weight [out, in] of a tuned linear from its codes and float16 scales, and the code range it uses.

    The library keeps the rounded weight in bfloat16. The codes are found by dividing by the scale, and have to give
    back the very same bfloat16 numbers; codes times scale is what its packed file would hold.
    """
    kept = module.weight.detach()
    scales = module.scale.float().view(*module.scale.shape, 1)
    if module.scale.dtype != torch.float16 or kept.shape[1] % module.group_size:
        raise SystemExit(f"{module.global_name}: scales of {module.scale.dtype}, {kept.shape[1]} inputs")
    codes = (kept.float().view(*scales.shape[:2], module.group_size) / scales).round()
    weight = (codes * scales).view(kept.shape)
    if not torch.equal(weight.to(kept.dtype), kept):
        raise SystemExit(f"{module.global_name}: not on a grid of {module.group_size} weights with the stored scales")
    zeros = torch.as_tensor(module.zp, dtype=torch.float32)
    if zeros.numel() > 1:
        zeros = zeros.view(scales.shape)
    unsigned = codes + zeros
    return weight, int(unsigned.min()), int(unsigned.max())


def decode(model, original: dict[str, torch.Tensor], bits: int) -> tuple[dict[str, torch.Tensor], dict]:
    """Decoded weights of all tuned linears by name, and what was found about them."""
    weights, change, most, lowest, highest = {}, 0.0, 0, 0, 0
    for name, module in model.named_modules():
        if getattr(module, "scale", None) is None:
            continue
        weight, low, high = dequantize(module)
        ordered = weight.view(-1, module.group_size).sort(dim=1).values
        most = max(most, int((ordered.diff(dim=1) != 0).sum(dim=1).max()) + 1)
        lowest, highest = min(lowest, low), max(highest, high)
        dense = original[f"{name}.weight"]
        change += ((weight - dense).norm() / dense.norm()).item()
        weights[f"{name}.weight"] = weight
    linears = {name for name in original if ".layers." in name and original[name].ndim == 2}
    if weights.keys() != linears or most > 2**bits or lowest < 0 or highest >= 2**bits:
        raise SystemExit(f"{len(weights)} of {len(linears)} linears, {most} values a group, codes {lowest}..{highest}")
    found = {"quantized_linears": len(weights), "max_values_per_group": most, "code_range": [lowest, highest]}
    return weights, found | {"mean_relative_weight_change": change / len(weights)}


def compile_seconds() -> float:
    """Wall-clock seconds torch.compile took in this process, forward and backward graphs."""
    from torch._dynamo.utils import cumulative_time_spent_ns as spent

    return sum(spent.get(phase, 0) for phase in ("entire_frame_compile", "entire_backward_compile")) / 1e9


def quantize(args: argparse.Namespace) -> None:
    import torch._inductor.config
    from auto_round import AutoRound

    torch._inductor.config.compile_threads = 1  # no helper processes: every second is this process's or a compiler's
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokens = calibration_tokens(tokenizer, args.calibration, args.documents, args.min_chars, args.length)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    fed: list[torch.Tensor] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, inputs: fed.append(inputs[0].clone()))
    # No mask, which is what its own datasets come to. Bare tensors would get one that hides the last token.
    batches = [{"input_ids": rows.clone(), "attention_mask": None} for rows in tokens.split(args.batch_size)]
    options = {"bits": args.bits, "group_size": args.group_size, "sym": not args.asym, "iters": args.steps}
    options |= {} if args.lr is None else {"lr": args.lr}
    options |= {"enable_alg_ext": True} if args.alg_ext else {}
    options |= {} if args.seed is None else {"seed": args.seed}

    log = BlockLog()
    logging.getLogger("autoround").addHandler(log)
    compressor = AutoRound(
        model, tokenizer, dataset=batches, seqlen=args.length, nsamples=args.documents, batch_size=args.batch_size,
        device_map="cpu", **options,
    )  # fmt: skip
    tuned, _ = compressor.quantize()
    used, whole, peak = cpu_seconds() - log.started, cpu_seconds(), peak_rss_mib()

    if digest(torch.cat(fed)) != digest(tokens):
        raise SystemExit(f"the library read {sum(len(rows) for rows in fed)} sequences, not the {len(tokens)} given")
    original = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).state_dict()
    weights, found = decode(tuned, original, args.bits)
    save_file(weights, args.weights)
    scales = 16 / args.group_size + (args.bits / args.group_size if args.asym else 0)
    chosen = {"bits": args.bits, "group_size": args.group_size, "settings": describe(compressor)}
    chosen |= {} if args.seed is None else {"seed": args.seed}
    measured = {
        **found,
        "bits_per_linear_weight": args.bits + scales,
        "threads": torch.get_num_threads(),
        "quantize_cpu_seconds": round(used, 1),
        "process_cpu_seconds": round(whole, 1),
        "compile_wall_seconds": round(compile_seconds(), 1),
        "quantize_peak_rss_mib": round(peak, 1),
        "blocks": log.blocks,
    }
    calibration = calibration_entry(args, tokens) | {"ids_the_model_was_fed_sha256": digest(torch.cat(fed))}
    update_record(args.out, **origin(TOOL, TOOL, args), **chosen, calibration=calibration, **measured)
    print(
        f"quantized {len(weights)} linears: {used:.0f} CPU seconds ({compile_seconds():.0f} s compiling), peak "
        f"{peak:.0f} MiB, mean relative weight change {found['mean_relative_weight_change']:.3f}"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    step = add_steps(parser)
    step.add_argument("--bits", type=int, choices=(2, 3, 4, 8), required=True)
    step.add_argument("--group-size", type=int, default=64)
    grid = step.add_mutually_exclusive_group()
    grid.add_argument("--sym", dest="asym", action="store_false", default=False, help="the default, as in auto-round")
    grid.add_argument("--asym", action="store_true", help="sym=False")
    step.add_argument("--steps", type=int, default=200, help="iters")
    step.add_argument("--lr", type=float, help="default: the library's, 1 / steps")
    step.add_argument("--seed", type=int, help="of the order of the batches; default: the library's, 42")
    step.add_argument("--alg-ext", action="store_true", help="enable_alg_ext=True")
    step.add_argument("--nsamples", dest="documents", type=int, default=128)
    step.add_argument("--min-chars", type=int, default=1500)
    step.add_argument("--seqlen", dest="length", type=int, default=256, help="tokens taken from each document")
    step.add_argument("--batch-size", type=int, default=4, help="documents a step")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.step == "evaluate":
        evaluate(TOOL, arguments)
        return
    # Compiled code goes to an empty folder: every run compiles, and is charged for it.
    with tempfile.TemporaryDirectory() as scratch:
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": f"{scratch}/compiled", "AR_WORK_SPACE": f"{scratch}/work"}
        quantize(arguments)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
