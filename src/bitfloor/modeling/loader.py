"""The float model as a source: an untouched skeleton, and weights that come and go one block at a time."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from bitfloor.core.errors import BitfloorError, InputError
from bitfloor.core.heap import trim_heap
from bitfloor.modeling.accounting import check_accounting
from bitfloor.modeling.discover import ModelMap, describe
from bitfloor.modeling.locate import locate
from bitfloor.modeling.mapping import WeightGroup, WeightMapping
from bitfloor.modeling.shards import TensorInfo, list_tensors, read_tensor, same_bytes
from bitfloor.modeling.skeleton import build_skeleton, load_config
from bitfloor.modeling.weights import all_finite, move_buffers, own_memory, set_weight

# Left over in old checkpoints: a rotary table that transformers now computes.
_COMPUTED = (
    re.compile(r"rotary_emb\.inv_freq$"),
    re.compile(r"attn\.(masked_)?bias$"),
    re.compile(r"attention\.(masked_)?bias$"),
)


def open_source(
    source: str | os.PathLike[str], *, trust_remote_code: bool = False, cache_dir: str | os.PathLike[str] | None = None
) -> SourceModel:
    """Open a model: read its config and shard headers, build its skeleton, check that both agree. No weights are read.

    Args:
        source: local folder, hub id, or ``.gguf`` file (dequantized once into the cache).
        trust_remote_code: allow Python code that comes with the model; never on by default.
        cache_dir: for downloads and dequantized GGUF files; None = the usual places.

    Raises:
        InputError: anything wrong with the model, in one sentence.
    """
    cache = None if cache_dir is None else Path(cache_dir)
    folder = locate(source, cache_dir=cache, remote_code=trust_remote_code)
    try:
        config = load_config(folder, trust_remote_code=trust_remote_code)
        tensors = list_tensors(folder)
    except PermissionError as error:
        raise InputError(f"no permission to read {error.filename or folder}; check its mode and owner.") from error
    model = build_skeleton(config, trust_remote_code=trust_remote_code)
    return SourceModel(folder, model, tensors, trust_remote_code=trust_remote_code)


class SourceModel:
    """A float checkpoint and the skeleton its weights are poured into.

    Attributes:
        path: the local folder.
        skeleton: the untouched Hugging Face module in eval mode; parameters on meta unless loaded.
        config: the skeleton's configuration.
        map: blocks, matrices, embedding, head, kept names.
        tensors: source tensor name -> file, dtype, shape and target parameters.
        ignored: source tensor name -> why it is not a weight of the model.
    """

    def __init__(
        self, path: Path, model: PreTrainedModel, tensors: Mapping[str, TensorInfo], *, trust_remote_code: bool = False
    ) -> None:
        self.path = path
        self.skeleton = model
        self.config = model.config
        self._remote_code = trust_remote_code
        self._mapping = WeightMapping(model, tensors)
        self.ignored: dict[str, str] = {}
        groups = self._settle_ties(self._mapping.groups, tensors)
        self._check_names(groups, tensors)
        targets: dict[str, list[str]] = {}
        for group in self._mapping.groups:
            for name in group.sources:
                targets[name] = list(group.targets)
        self.tensors = {n: replace(i, targets=tuple(targets[n])) for n, i in tensors.items() if n in targets}
        self.map: ModelMap = describe(model)
        self._outer: list[WeightGroup] = []
        self._blocks: list[list[WeightGroup]] = [[] for _ in range(self.map.n_blocks)]
        for group in groups:
            self._place(group)
        self._parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._by_target = {name: group for group in groups for name in group.targets}

    # -- names ---------------------------------------------------------------------------------------------------

    def _settle_ties(self, groups: list[WeightGroup], tensors: Mapping[str, TensorInfo]) -> list[WeightGroup]:
        """Follow transformers: tied if one of the two is absent or both hold the same values, else two matrices."""
        model = self.skeleton
        by_target = {name: group for group in groups for name in group.targets}
        dropped: set[str] = set()
        self._tied: dict[str, str] = {}
        for name, other in dict(model.all_tied_weights_keys).items():
            here, there = by_target.get(name), by_target.get(other)
            if here is not None and there is not None and not self._same_values(here, there, tensors):
                del model.all_tied_weights_keys[name]
                self.config.tie_word_embeddings = False
                shape = model.get_parameter(name).shape
                set_weight(model, name, torch.empty(shape, dtype=torch.float32, device="meta"))
                continue
            if here is not None and there is not None:
                dropped.add(here.first)
            self._tied[name] = other
        return [group for group in groups if group.first not in dropped]

    def _same_values(self, a: WeightGroup, b: WeightGroup, tensors: Mapping[str, TensorInfo]) -> bool:
        alone = len(a.sources) == 1 and len(b.sources) == 1
        return alone and same_bytes(tensors[a.sources[0]], tensors[b.sources[0]])

    def _check_names(self, groups: list[WeightGroup], tensors: Mapping[str, TensorInfo]) -> None:
        known = self.skeleton.state_dict()
        have = {name: group for group in groups for name in group.targets}
        for name, group in have.items():
            if name not in known:
                raise InputError(
                    f"the tensor {group.sources[0]} would become {name}, which the model of config.json does not have."
                )
            if tuple(known[name].shape) != tuple(group.targets[name]):
                raise InputError(
                    f"the tensor {group.sources[0]} gives {name} the shape {list(group.targets[name])}, "
                    "but config.json asks for "
                    f"{list(known[name].shape)}."
                )
        covered = set(have) | {n for pair in self._tied.items() for n in pair if set(pair) & set(have)}
        missing = [name for name in known if name not in covered]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise InputError(
                f"the checkpoint {self.path} lacks the tensor {missing[0]}{more}; it is incomplete or of another model."
            )
        patterns = [re.compile(p) for p in self.skeleton._keys_to_ignore_on_load_unexpected or ()]
        for name in self._mapping.unexpected:
            if any(p.search(name) for p in _COMPUTED):
                self.ignored[name] = "computed from the config"
            elif any(p.search(name) for p in patterns):
                self.ignored[name] = "not used by the model, as transformers declares"
            else:
                raise InputError(
                    f"the checkpoint {self.path} has the tensor {name}, which the model of config.json does not have."
                )

    def _place(self, group: WeightGroup) -> None:
        prefix = f"{self.map.blocks_path}."
        homes = {int(n[len(prefix) :].split(".")[0]) if n.startswith(prefix) else -1 for n in group.targets}
        if len(homes) != 1:
            raise InputError(
                f"the tensor {group.sources[0]} is shared by several blocks, so they cannot be loaded one by one."
            )
        home = homes.pop()
        (self._outer if home < 0 else self._blocks[home]).append(group)

    # -- weights -------------------------------------------------------------------------------------------------

    def load_block(self, k: int, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
        """Pour the weights of block ``k`` into the skeleton.

        Returns:
            the block itself (not a copy), every tensor in memory of its own, ``requires_grad`` off.

        Raises:
            InputError: a weight that is NaN or infinite, by name.
            BitfloorError: a file that changed or vanished meanwhile.
        """
        for group in self._blocks[k]:
            self._install(group, device, dtype)
        trim_heap()
        block: nn.Module = self.skeleton.get_submodule(self.map.block_path(k))
        move_buffers(block, device)
        return block

    def release_block(self, k: int) -> None:
        """Give the memory of block ``k`` back; its parameters return to meta."""
        for group in self._blocks[k]:
            self._empty(group)
        trim_heap()

    def load_outer(
        self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, *, head: bool = True
    ) -> None:
        """Pour in everything outside the blocks: embeddings, final norm, head.

        Args:
            device, dtype: where and as what.
            head: False leaves an untied head on meta, enough to run the model up to its last hidden state.
        """
        skip = None if head or self.map.tied or self.map.head is None else self.map.head.param
        for group in self._outer:
            if skip not in group.targets:
                self._install(group, device, dtype)
        for name, other in self._tied.items():
            absent, present = (name, other) if other in self._by_target else (other, name)
            if present in self._by_target:
                set_weight(self.skeleton, absent, self.skeleton.get_parameter(present))
        for name, module in self.skeleton.named_modules():
            if not name.startswith(f"{self.map.blocks_path}."):
                move_buffers(module, device, recurse=False)

    def release_outer(self) -> None:
        """Give the memory of everything outside the blocks back."""
        for group in self._outer:
            self._empty(group)
        for name, other in self._tied.items():
            absent, present = (name, other) if other in self._by_target else (other, name)
            if present in self._by_target:
                set_weight(self.skeleton, absent, self.skeleton.get_parameter(present))
        trim_heap()

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One parameter or persistent buffer, read from disk without touching the skeleton.

        Args:
            name: full parameter name; the tied one of a pair gives the shared matrix.
            dtype: for floating-point tensors; None = as stored in the checkpoint.

        Raises:
            InputError: NaN or infinite values.
            BitfloorError: the model has no such parameter.
        """
        group = self._by_target.get(name)
        if group is None:
            back = {v: k for k, v in self._tied.items()}
            group = self._by_target.get(name := self._tied.get(name, back.get(name, name)))
        if group is None:
            raise BitfloorError(f"{name} is not a parameter of {type(self.skeleton).__name__}.")
        return self._convert(group, dtype)[name]

    def _convert(self, group: WeightGroup, dtype: torch.dtype | None) -> dict[str, Tensor]:
        def source(name: str) -> Tensor:
            tensor = read_tensor(self.tensors[name])
            return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

        made = self._mapping.convert(group, source)
        for name, tensor in made.items():
            if not all_finite(tensor):
                self.check_finite(group.sources)
                raise InputError(f"{name}, made of {group.sources[0]}, holds NaN or infinite values.")
            made[name] = own_memory(tensor)
        return made

    def check_finite(self, names: Iterable[str] | None = None) -> None:
        """Read source tensors, one at a time, and refuse NaN and infinity: better now than at block 30.

        Args:
            names: source tensor names; None = all. A second or two per gigabyte.

        Raises:
            InputError: naming the first tensor that is not finite.
        """
        for name in self.tensors if names is None else names:
            if not all_finite(read_tensor(self.tensors[name])):
                raise InputError(f"the tensor {name} in {self.path} holds NaN or infinite values; it is damaged.")

    def _install(self, group: WeightGroup, device: str | torch.device, dtype: torch.dtype) -> None:
        for name, tensor in self._convert(group, dtype).items():
            set_weight(self.skeleton, name, tensor.to(device))

    def _empty(self, group: WeightGroup) -> None:
        for name, shape in group.targets.items():
            if name in self._parameters:  # buffers are small and stay
                set_weight(self.skeleton, name, torch.empty(shape, dtype=torch.float32, device="meta"))

    def again(self, folder: Path | None = None) -> SourceModel:
        """The same model opened once more, with a skeleton of its own, or a folder that holds one like it."""
        return open_source(self.path if folder is None else folder, trust_remote_code=self._remote_code)

    # -- identity ------------------------------------------------------------------------------------------------

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over config.json and every byte of every shard, in order of file name.

        Sampling would be faster and would miss a change of one weight; a resumed run must not. About a second per
        gigabyte, once per run, only when asked for.
        """
        digest = hashlib.sha256()
        files = [self.path / "config.json", *sorted({info.file for info in self.tensors.values()})]
        for path in files:
            try:
                with path.open("rb") as file:
                    digest.update(f"{path.name}\n".encode() + hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise BitfloorError(f"cannot read {path}: {error.strerror or error}.") from error
        return digest.hexdigest()

    def check_accounting(self, quantized: Iterable[str], kept: Iterable[str], tied: Iterable[str] = ()) -> None:
        """Refuse unless every source tensor ends up exactly once in what was written.

        Args:
            quantized: public names of quantized matrices.
            kept: parameter and buffer names stored as they are.
            tied: names (module or parameter) stored once under another name.

        Raises:
            BitfloorError: a tensor that is missing or counted twice, or an expert stack quantized only in part.
        """
        done, keeps = set(quantized), set(kept)
        ties = {name if name in self._tied else f"{name}.weight" for name in tied}
        check_accounting(self.map, self.tensors.values(), done, keeps, ties)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that lies with the model.

        Raises:
            InputError: there is none, or it needs code that was not allowed.
        """
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(self.path, trust_remote_code=self._remote_code)
        except Exception as error:  # tokenizer classes raise many kinds on missing or damaged files
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise InputError(
                f"{self.path} has no usable tokenizer ({reason}); put tokenizer.json beside the weights."
            ) from error
        return tokenizer
