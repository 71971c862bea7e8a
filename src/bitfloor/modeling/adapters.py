"""Trainable adapters on the matrices of a model, and their merge into the weights: the one place that imports ``peft``.

Any adapter of that package will do that works on matrices and becomes part of them when it is merged. Whether one does
is found by trying it, before anything else is done, on matrices of the model's sizes.
"""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bitfloor.core.errors import InputError
from bitfloor.core.spec import MatrixRef

INSTALL = "pip install peft"
# What this package calls a setting that all adapters share, and what peft's configurations call it.
FIELDS = {"rank": ("r",), "alpha": ("lora_alpha", "alpha"), "dropout": ("lora_dropout", "dropout", "module_dropout")}
# Decided by the recipe's other keys, or about things that are no matrices of the blocks.
NOT_OPTIONS = {
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "revision",
    "target_modules",
    "target_parameters",
    "task_type",
    "trainable_token_indices",
}
# Starts that peft makes from data in a call of its own; without it the adapter quietly starts as another.
FROM_DATA = {("init_lora_weights", "eva")}
# Adapters that drop ranks on the way, told by the one who trains them when.
SCHEDULED = ("adalora",)
# How far a merged product may be from the adapted one, relative to its largest entry: float32 in another order.
MERGE_ERROR = 1e-3
NUDGE = 0.02  # size of the values that stand for learnt ones in the trial


@dataclasses.dataclass(frozen=True)
class AdapterChoice:
    """An adapter of peft.

    Args:
        kind: its name there, in lower case: ``"lora"``.
        rank, alpha, dropout: None leaves them to the adapter's own defaults.
        options: of its configuration.
    """

    kind: str = "lora"
    rank: int | None = 64
    alpha: float | None = 16.0
    dropout: float | None = 0.1
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def peft_version() -> str:
    """The version of peft.

    Raises:
        InputError: it is not installed.
    """
    return str(_peft().__version__)


def _peft() -> Any:
    with _quiet():
        try:
            import peft
        except ImportError as error:
            raise InputError(f"restoring needs the peft package ({error}); install it with: {INSTALL}") from None
    return peft


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings: what matters of them (Conv1D, tied weights, unknown names) is checked here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def make_config(choice: AdapterChoice, modules: Sequence[str], *, transposed: bool) -> Any:
    """Peft's configuration of an adapter.

    Args:
        choice: the adapter.
        modules: paths of the modules to adapt.
        transposed: they are ``Conv1D``.

    Raises:
        InputError: an unknown adapter or option, or a value that peft refuses, with its reason.
    """
    kinds = {kind.value.lower(): config for kind, config in _peft().PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if choice.kind not in kinds:
        close = difflib.get_close_matches(choice.kind, kinds, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise InputError(
            f"restore.adapter = {choice.kind!r} is no adapter of this peft; {hint}known: {', '.join(sorted(kinds))}."
        )
    if choice.kind in SCHEDULED:
        raise InputError(
            f"the adapter {choice.kind} learns on a schedule of its own, which this stage does not keep; use another "
            "one, such as lora."
        )
    kind = kinds[choice.kind]
    known = {field.name for field in dataclasses.fields(kind)}
    values = dict(choice.options)
    for name in values:
        if name in NOT_OPTIONS:
            raise InputError(f"restore.options.{name} is set by the stage itself; leave it out.")
        if name not in known:
            close = difflib.get_close_matches(name, known - NOT_OPTIONS, n=1)
            hint = f"; did you mean {close[0]}?" if close else "."
            raise InputError(f"restore.options.{name} is no option of the adapter {choice.kind} in peft{hint}")
        if (name, str(values[name]).lower()) in FROM_DATA:
            raise InputError(
                f"restore.options.{name} = {values[name]} is made from data, which this stage does not do."
            )
    for name, spellings in FIELDS.items():
        value = getattr(choice, name)
        field = next((spelling for spelling in spellings if spelling in known), None)
        if value is None:
            continue
        if field is None:
            raise InputError(f"restore.{name} = {value} says nothing to the adapter {choice.kind}; leave it out.")
        if field in choice.options:
            raise InputError(f"restore.{name} and restore.options.{field} are one setting; give one of them.")
        values[field] = int(value) if name == "alpha" and value == int(value) else value
    if "target_modules" not in known:
        raise InputError(f"the adapter {choice.kind} is not for matrices of a model; use another one, such as lora.")
    if transposed and "fan_in_fan_out" in known:
        values["fan_in_fan_out"] = True
    try:
        with _quiet():
            return kind(target_modules=list(modules), **values)
    except Exception as error:  # configurations raise many kinds on bad values
        raise InputError(f"peft refuses the adapter {choice.kind}: {_line(error)}.") from error


class Adapters:
    """Adapters on some modules of a model, which are replaced in it until they are merged.

    Args:
        model: in place; weights loaded, nothing trainable.
        refs: the matrices to adapt, none of them an expert.
        choice: the adapter.
        seed: of its start.

    Attributes:
        parameters: what learns, by a name that does not change.

    Raises:
        InputError: peft refuses, or adapts something else.
    """

    def __init__(self, model: nn.Module, refs: Sequence[MatrixRef], choice: AdapterChoice, seed: int) -> None:
        peft = _peft()
        from peft.tuners.tuners_utils import BaseTunerLayer

        names = [ref.param.rpartition(".")[0] for ref in refs]
        config = make_config(choice, names, transposed=all(ref.kind == "conv1d" for ref in refs))
        devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
        try:
            with _quiet(), torch.random.fork_rng(devices=devices):
                torch.manual_seed(seed)
                self._model = peft.get_peft_model(model, config)
        except Exception as error:  # of many kinds, from many adapters
            raise InputError(f"peft cannot put the adapter {choice.kind} on this model: {_line(error)}.") from error
        self._layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        found = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
        if found != set(names):
            odd = sorted(found ^ set(names))[0]
            raise InputError(f"peft put the adapter {choice.kind} not where it was asked to ({odd}); use another one.")
        self.parameters: dict[str, nn.Parameter] = {}
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad:
                self.parameters[name.removeprefix("base_model.model.")] = parameter
        if not self.parameters:
            raise InputError(f"the adapter {choice.kind} has nothing that learns; use another one, such as lora.")

    def train(self, mode: bool) -> None:
        """Turn dropout of the adapters on or off; the model stays as it is."""
        for layer in self._layers:
            layer.train(mode)

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Set what learns."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])

    def merge(self) -> None:
        """Make the adapters part of the weights and put the model's own modules back."""
        with _quiet(), torch.no_grad():
            self._model.merge_and_unload()
        self.parameters, self._layers = {}, []


class _Bench(nn.Module):
    """One module of each size, to try an adapter on."""

    def __init__(self, refs: Sequence[MatrixRef]) -> None:
        super().__init__()
        for ref in refs:
            rows, columns = ref.shape
            module = Conv1D(rows, columns) if ref.kind == "conv1d" else nn.Linear(columns, rows)
            module.bias.data.zero_()
            self.add_module(f"m{len(self._modules)}", module.requires_grad_(False))
        self._columns = [ref.shape[1] for ref in refs]

    def forward(self) -> list[Tensor]:
        """Every module's product with the same few random vectors."""
        generator = torch.Generator().manual_seed(0)
        return [self._modules[f"m{i}"](torch.randn(2, n, generator=generator)) for i, n in enumerate(self._columns)]  # type: ignore[misc]

    def biased(self) -> bool:
        """Whether a bias is not what it was."""
        return any(bool(module.bias.any()) for module in self._modules.values())  # type: ignore[union-attr]


def check_adapter(choice: AdapterChoice, refs: Sequence[MatrixRef]) -> int:
    """Try an adapter on one matrix of each size: does peft take it, and does it merge into the weights?

    Args:
        choice: the adapter.
        refs: the matrices to adapt.

    Returns:
        How many parameters it has on all of them (what matrices share is counted for each).

    Raises:
        InputError: peft is not installed or refuses, or the merged matrices are not the adapted ones.
    """
    sizes: dict[tuple[str, tuple[int, int]], list[MatrixRef]] = {}
    for ref in refs:
        sizes.setdefault((ref.kind, ref.shape), []).append(ref)
    kinds = [own[0] for own in sizes.values()]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        bench = _Bench(kinds)
        stand_ins = [dataclasses.replace(ref, param=f"m{i}.weight") for i, ref in enumerate(kinds)]
        with torch.no_grad():
            plain = bench()
        adapters = Adapters(bench, stand_ins, choice, 0)
        adapters.train(False)
        counts = [0] * len(kinds)
        for name, parameter in adapters.parameters.items():
            owner = name.split(".")[0]
            for i in range(len(kinds)):  # what belongs to none is shared
                counts[i] += parameter.numel() if owner == f"m{i}" or owner not in bench._modules else 0
        with torch.no_grad():
            try:
                start = bench()
                for parameter in adapters.parameters.values():
                    parameter.add_(torch.randn_like(parameter), alpha=NUDGE)
                before = bench()
                adapters.merge()
                after = bench()
            except Exception as error:
                raise InputError(
                    f"the adapter {choice.kind} cannot be merged into a model's weights ({_line(error)}); "
                    "use another one, such as lora."
                ) from error
    if bench.biased():
        raise InputError(f"the adapter {choice.kind} changes biases too, which stay; use another one, such as lora.")
    if any(_apart(*pair) for pair in zip(plain, start, strict=True)):
        raise InputError(
            f"the adapter {choice.kind} changes the model before it has learnt anything, so the model as it was could "
            "not be kept; use options with which it starts as nothing, or another one, such as lora."
        )
    for one, other in zip(before, after, strict=True):
        if _apart(one, other):
            raise InputError(
                f"the adapter {choice.kind} does not become part of a model's weights when it is merged; "
                "use another one, such as lora."
            )
    return sum(count * len(own) for count, own in zip(counts, sizes.values(), strict=True))


def _apart(one: Tensor, other: Tensor) -> bool:
    return not float((one - other).abs().max()) <= MERGE_ERROR * float(one.abs().max())


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
