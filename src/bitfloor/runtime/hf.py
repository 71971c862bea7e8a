"""bitfloor checkpoints in transformers: ``AutoModelForCausalLM.from_pretrained(folder)`` after ``import bitfloor``.

Registers a quantization configuration and a quantizer under the name ``bitfloor``. Loading replaces modules on the meta
device and lets transformers copy the stored tensors; saving writes the same tensors again, byte for byte. Importing
this module registers; :mod:`bitfloor._plugin` imports it when transformers is there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from bitfloor.core.errors import BitfloorError, InputError
from bitfloor.core.headers import CONFIG
from bitfloor.formats.checkpoint import check_tensors, read_checkpoint, read_entries
from bitfloor.formats.layout import QUANT_METHOD, announce_version, parse_config
from bitfloor.formats.verify import verify_checkpoint


@register_quantization_config(QUANT_METHOD)
class BitfloorConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """``quantization_config`` of a bitfloor checkpoint, checked when it is made.

    Raises:
        InputError: another format version, unknown keys, values out of range.
    """

    def __init__(self, **content: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.native = parse_config({"quant_method": QUANT_METHOD, **content})
        announce_version(self.native)

    def to_dict(self) -> dict[str, Any]:
        """The block as it stands in ``config.json``."""
        return self.native.to_dict()

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return iter(self.to_dict().items())


@register_quantizer(QUANT_METHOD)
class BitfloorQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads and saves packed matrices; quantizing is :func:`bitfloor.quantize`'s work, not ``from_pretrained``'s."""

    requires_calibration = True
    quantization_config: BitfloorConfig

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """None for a stored tensor of a packed matrix, which is never converted; else what transformers chose."""
        for pattern in getattr(converter, "target_patterns", ()):
            matrix, _, part = pattern.rpartition(".")
            if matrix in self.quantization_config.native.matrices and part != "bias":
                return None
        return super().get_new_dtype(converter, param, dtype)  # type: ignore[no-any-return]

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # Imported here: this module registers while transformers' own modules are still being imported.
        from bitfloor.runtime.swap import install, packed_parameters

        native = self.quantization_config.native
        if files := kwargs.get("checkpoint_files"):
            check_tensors(native, read_entries(files))
        install(model, native)
        _forget_tying(model, packed_parameters(native))
        if any(layout["kind"] == "expert" for layout in native.layouts):
            _read_experts_one_by_one(model)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from bitfloor.formats.native import check_channels, check_order
        from bitfloor.runtime.linear import PackedMatrix

        for name, module in model.named_modules():
            if isinstance(module, PackedMatrix) and module.get_buffer("codes").device.type != "meta":
                check_channels(name, module._buffers.get("channels"))
                if (order := module._buffers.get("order")) is not None:
                    check_order(name, module.layout, order)
        model._weight_conversions = []  # tensors keep their names when saved; no older spelling is restored
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _read_experts_one_by_one(model: Any) -> None:
    """The batched and grouped implementations index all experts of a layer at once; the eager one does not."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"


def _forget_tying(model: Any, gone: set[str]) -> None:
    """Remove ties whose parameters were packed: a packed head reads the embedding's matrix by itself."""
    kept = {a: b for a, b in model.all_tied_weights_keys.items() if a not in gone and b not in gone}
    if kept == model.all_tied_weights_keys:
        return
    model.all_tied_weights_keys = kept
    for module in model.modules():
        if getattr(module, "_tied_weights_keys", None):
            module._tied_weights_keys = {}


def load_packed(
    folder: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
) -> Any:
    """Load a bitfloor checkpoint as a transformers causal language model, ready to generate.

    Args:
        folder: the checkpoint.
        device: where the model goes.
        dtype: dtype of the activations and of what stayed float; ``"auto"`` takes the source model's.
        trust_remote_code: allow model code that comes with the checkpoint.

    Returns:
        The model, in evaluation mode.

    Raises:
        InputError: not a bitfloor checkpoint, another version, shards missing or damaged, not this model's tensors.
    """
    from bitfloor.runtime.linear import use_huge_pages

    verify_checkpoint(read_checkpoint(folder))  # bytes too: this reads what is about to be read anyway
    logging.disable_progress_bar()  # it would write over the command line's own progress
    model = _from_pretrained(Path(folder), dtype, trust_remote_code).to(device)
    use_huge_pages(model)
    return model


def _from_pretrained(folder: Path, dtype: str | torch.dtype, trust_remote_code: bool) -> Any:
    """What transformers makes of the folder, if its configuration and its tensors are of one model.

    Transformers fills with random numbers what a configuration asks for and the files do not hold.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(folder, **options)
    except InputError:
        raise
    except Exception as error:  # whatever a model's own configuration class raises on bad values
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InputError(
            f"{folder / CONFIG} describes no model that transformers can build ({reason}); check the file, or pass "
            "trust_remote_code if the model brings its own code and you trust it."
        ) from error
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (KeyError, ValueError, TypeError, AttributeError) as error:  # what classes of models make of bad values
        if isinstance(error, BitfloorError):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InputError(
            f"{folder} describes a model that transformers cannot build ({type(error).__name__}: {reason}); check its "
            f"{CONFIG} and generation_config.json."
        ) from error
    if other := sorted(map(str, (*found["mismatched_keys"], *found["missing_keys"], *found["unexpected_keys"]))):
        raise InputError(
            f"the tensors in {folder} are not those of the model in its {CONFIG} (the first that differs: {other[0]}); "
            f"{CONFIG} belongs to another model."
        )
    return model
