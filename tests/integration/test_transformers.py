"""A quantized folder through transformers alone: found, loaded, run, saved and loaded again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from bitfloor import api
from bitfloor.formats.checkpoint import read_checkpoint
from bitfloor.formats.files import open_tensors
from bitfloor.runtime.linear import PackedLinear

IDS = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(0))

ORDERS = """
import os, sys
import torch  # the slow part, shared by the two processes that are forked from here

def load():
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    with torch.no_grad():
        found = model(input_ids=torch.tensor(eval(sys.argv[2])), use_cache=False).logits[0, -1]
    print(type(model.model.layers[0].mlp.up_proj).__name__, *[value.hex() for value in found.tolist()], flush=True)

assert not {"bitfloor", "transformers"} & set(sys.modules)
child = os.fork()
if child:
    assert os.waitpid(child, 0)[1] == 0
    import bitfloor
    assert "transformers" not in sys.modules
    from transformers import AutoModelForCausalLM
    load()
else:
    from transformers import AutoModelForCausalLM
    import bitfloor
    load()
    os._exit(0)
"""


@pytest.fixture(scope="module")
def folder(quantized: Callable[..., Path]) -> Path:
    return quantized("gptq", 3)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def test_it_does_not_matter_which_is_imported_first(folder: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, "-c", ORDERS, str(folder), repr(IDS.tolist())]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    expected = logits(api.load(folder))[0, -1]
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        kind, *values = line.split()
        assert kind == "PackedLinear"
        # Exact where the thread counts agree; another one may sum in another order.
        assert torch.allclose(torch.tensor([float.fromhex(v) for v in values]), expected, rtol=1e-5, atol=1e-5)


def test_save_pretrained_and_load_again(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model.model.layers[2].self_attn.k_proj, PackedLinear)
    model.save_pretrained(tmp_path)
    first, again = read_checkpoint(folder), read_checkpoint(tmp_path)
    assert first.native == again.native and set(first.tensors) == set(again.tensors)
    for name, (path, _) in first.tensors.items():
        assert torch.equal(open_tensors(path)[name], open_tensors(again.tensors[name][0])[name]), name
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(reloaded), logits(model))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"] == json.loads((folder / "config.json").read_text())["quantization_config"]


def test_generate_with_a_cache_is_generate_without(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    mask = torch.ones_like(IDS)
    found = [
        model.generate(IDS, attention_mask=mask, max_new_tokens=8, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*found) and found[0].shape == (1, IDS.shape[1] + 8)


def test_a_text_generation_pipeline(folder: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    run = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    text = run("The object is ", max_new_tokens=6, do_sample=False)[0]["generated_text"]
    assert text.startswith("The object is ")
    assert text.removeprefix("The object is ") == api.generate(folder, "The object is ", max_new_tokens=6)
