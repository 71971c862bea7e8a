"""Peer baseline: quantize a Hugging Face causal LM with GPTQModel on a CPU and measure its perplexity.

Two steps, run as separate processes so that memory and CPU time of the quantization are not mixed with the
evaluation's:

    gptqmodel_yardstick.py quantize --model DIR --calibration DOCS.txt --bits 3 --asym --mse 2.4 \
        --weights w3.safetensors --out w3.json
    gptqmodel_yardstick.py evaluate --model DIR --weights w3.safetensors --text wiki=raw:wiki.test.raw \
        --text c4=docs:c4_unseen.txt --out w3.json

``quantize`` hands GPTQModel ready token ids, so the calibration data cannot depend on its own tokenization, and writes
the dequantized decoder weights next to a JSON record. ``evaluate`` puts those weights into the float32 model, scores
the texts and adds the result to the record. Without ``--weights`` it scores the unquantized model.

Nothing here uses the project's own quantization code: the record is an independent reference point.
"""

import argparse
import os

import torch
from peer_record import (
    add_steps,
    calibration_entry,
    calibration_tokens,
    cpu_seconds,
    evaluate,
    origin,
    peak_rss_mib,
    update_record,
)
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

TOOL = "gptqmodel"


def unpack_stream(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Read ``count`` values of ``bits`` bits from every column of a little-endian stream of 32-bit words."""
    position = torch.arange(count) * bits
    low, shift = position // 32, position % 32
    high = (low + 1).clamp(max=words.shape[0] - 1)
    unsigned = words.to(torch.int64) & 0xFFFFFFFF
    pair = unsigned[low] | (unsigned[high] & 0x7FFFFFFF) << 32
    return pair >> shift[:, None] & (1 << bits) - 1


def dequantize(module) -> torch.Tensor:
    """Float32 weight [out, in] of one packed linear, from its integers, zero points and float16 scales."""
    bits, scales = module.bits, module.scales.float()
    codes = unpack_stream(module.qweight, bits, module.in_features)
    zeros = unpack_stream(module.qzeros.T, bits, module.out_features).T
    group = module.g_idx.long()
    return (scales[group] * (codes - zeros[group])).T.contiguous()


def make_config(args: argparse.Namespace):
    from gptqmodel import QuantizeConfig
    from gptqmodel.quantization.config import FOEMConfig, GPTAQConfig

    options = {
        "desc_act": args.desc_act or None,
        "act_group_aware": False if args.no_group_aware else None,
        "damp_percent": args.damp,
        "gptaq": None if args.gptaq is None else GPTAQConfig(alpha=args.gptaq),
        "foem": None if args.foem is None else FOEMConfig(alpha=args.foem[0], beta=args.foem[1]),
    }
    options = {name: value for name, value in options.items() if value is not None}
    options |= {"bits": args.bits, "group_size": args.group_size, "sym": not args.asym, "mse": args.mse}
    # gptq_v2 only says how zero points are written: as they are. The older form stores them less one.
    options |= {"static_groups": args.static_groups, "format": "gptq_v2", "offload_to_disk": False, "device": "cpu"}
    return QuantizeConfig(**options)


def describe(config) -> dict:
    """The settings as the library resolved them, defaults included."""
    names = "sym desc_act act_group_aware static_groups damp_percent damp_auto_increment mse true_sequential lm_head"
    settings = {name: getattr(config, name) for name in [*names.split(), "rotation", "format"]}
    settings["gptaq_alpha"] = config.gptaq.alpha if config.gptaq else None
    settings["foem_alpha_beta"] = [config.foem.alpha, config.foem.beta] if config.foem else None
    staging = str(config.hessian.staging_dtype).removeprefix("torch.")
    return settings | {"hessian_staging_dtype": staging, "working_dtype": "float32"}


def quantize(args: argparse.Namespace) -> None:
    from gptqmodel import GPTQModel
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokens = calibration_tokens(tokenizer, args.calibration, args.documents, args.min_chars, args.length)
    config = make_config(args)
    settings = describe(config)
    model = GPTQModel.load(str(args.model), config, dtype=torch.float32)
    dtypes = {str(parameter.dtype) for parameter in model.model.parameters()}
    if dtypes != {"torch.float32"}:
        raise SystemExit(f"the library loaded the model as {sorted(dtypes)}, float32 was asked for")

    before = cpu_seconds()
    model.quantize([{"input_ids": row.tolist()} for row in tokens], batch_size=args.batch_size)
    used, peak = cpu_seconds() - before, peak_rss_mib()

    original = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).state_dict()
    weights, worst, change = {}, 0.0, 0.0
    for name, module in model.model.named_modules():
        if not isinstance(module, BaseQuantLinear):
            continue
        weight = dequantize(module)
        module.post_init()
        library = module.dequantize_weight().float().T
        worst = max(worst, ((library - weight).abs().max() / weight.abs().max()).item())
        dense = original[f"{name}.weight"]
        change += ((weight - dense).norm() / dense.norm()).item()
        weights[f"{name}.weight"] = weight
    if not weights or worst > 2e-3:
        raise SystemExit(f"{len(weights)} packed linears, decoded up to {worst:.1e} off the library (relative)")
    save_file(weights, args.weights)
    measured = {
        "quantized_linears": len(weights),
        "threads": torch.get_num_threads(),
        "quantize_cpu_seconds": round(used, 1),
        "quantize_peak_rss_mib": round(peak, 1),
        "decode_check_max_relative_difference": worst,
        "mean_relative_weight_change": change / len(weights),
    }
    chosen = {"bits": args.bits, "group_size": args.group_size, "settings": settings}
    calibration = calibration_entry(args, tokens)
    update_record(args.out, **origin(TOOL, TOOL, args), **chosen, calibration=calibration, **measured)
    print(
        f"quantized {len(weights)} linears: {used:.0f} CPU seconds, peak {peak:.0f} MiB, decode check {worst:.1e}, "
        f"mean relative weight change {change / len(weights):.3f}"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    step = add_steps(parser)
    step.add_argument("--bits", type=int, choices=(2, 3, 4, 8), required=True)
    step.add_argument("--group-size", type=int, default=64)
    step.add_argument("--asym", action="store_true", help="sym=False")
    step.add_argument("--desc-act", action="store_true", help="desc_act=True (turns act_group_aware off)")
    step.add_argument("--no-group-aware", action="store_true", help="act_group_aware=False")
    step.add_argument("--static-groups", action="store_true", help="static_groups=True")
    step.add_argument("--damp", type=float, help="damp_percent (default: the library's)")
    step.add_argument("--mse", type=float, default=0.0, help="exponent of the clipping search, 0 for none")
    step.add_argument("--gptaq", type=float, metavar="ALPHA", help="GPTAQ with this alpha")
    step.add_argument("--foem", type=float, nargs=2, metavar=("ALPHA", "BETA"), help="FOEM with these factors")
    step.add_argument("--documents", type=int, default=128)
    step.add_argument("--min-chars", type=int, default=1500)
    step.add_argument("--length", type=int, default=256, help="tokens taken from each document")
    step.add_argument("--batch-size", type=int, default=1, help="documents a forward pass")
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # The library's loader pool wants two workers and its default on one or two cores is one: it would refuse to start.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    arguments = parse_arguments()
    if arguments.step == "quantize":
        quantize(arguments)
    else:
        evaluate(TOOL, arguments)
