"""Peer: how fast llama.cpp reads and continues a text, asked line by line by bench/decode.py.

    llamacpp_speed.py MODEL.gguf

Every line of input is JSON, ``{"what": "prefill" | "decode", "tokens": N, "threads": T}``; every line of output is
JSON with the seconds of wall time and CPU that it took, all threads. Either package will do: ``llama-cpp-python``
(built on the machine, for its processor) is called through its C interface, ``xllamacpp`` (as it comes) through its
server's own timings.
Needs no torch, and nothing of the project's own code.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import resource
import sys
import time

CONTEXT = 1024
BEFORE = 16  # tokens in front of what is decoded


def cpu() -> float:
    """CPU seconds of this process, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def tokens(count: int) -> list[int]:
    """The same ones that bench/decode.py takes."""
    return [37 * i % 40000 + 5 for i in range(count)]


class Direct:
    """Through the C interface."""

    package = "llama-cpp-python"

    def __init__(self, path: str) -> None:
        import llama_cpp

        self.api = llama_cpp
        self.quiet = llama_cpp.llama_log_callback(lambda *_: None)  # kept: the library calls it
        llama_cpp.llama_log_set(self.quiet, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        self.contexts: dict[int, object] = {}

    def context(self, threads: int) -> object:
        if threads not in self.contexts:
            params = self.api.llama_context_default_params()
            params.n_ctx, params.n_batch, params.n_ubatch = CONTEXT, 512, 512
            params.n_threads = params.n_threads_batch = threads
            self.contexts[threads] = self.api.llama_init_from_model(self.model, params)
        return self.contexts[threads]

    def read(self, context: object, ids: list[int]) -> None:
        given = (self.api.llama_token * len(ids))(*ids)
        if self.api.llama_decode(context, self.api.llama_batch_get_one(given, len(ids))):
            raise SystemExit("llama.cpp could not read the tokens")

    def run(self, what: str, count: int, threads: int) -> tuple[float, float]:
        context = self.context(threads)
        self.api.llama_memory_clear(self.api.llama_get_memory(context), True)
        if what == "decode":
            self.read(context, tokens(BEFORE))
        wall, used = time.perf_counter(), cpu()
        if what == "prefill":
            self.read(context, tokens(count))
        else:
            for token in tokens(count):
                self.read(context, [token])
        self.api.llama_synchronize(context)
        return time.perf_counter() - wall, cpu() - used

    def system(self) -> str:
        return str(self.api.llama_print_system_info().decode())


class Served:
    """Through the server that the package has inside, whose own timings count; CPU seconds are of the whole request."""

    package = "xllamacpp"

    def __init__(self, path: str) -> None:
        import xllamacpp

        self.api, self.path = xllamacpp, path
        self.servers: dict[int, object] = {}

    def server(self, threads: int) -> object:
        if threads not in self.servers:
            self.servers.clear()
            params = self.api.CommonParams()
            params.model.path, params.n_ctx, params.n_batch, params.n_parallel = self.path, CONTEXT, 512, 1
            params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
            params.verbosity = -1
            self.servers[threads] = self.api.Server(params)
        return self.servers[threads]

    def run(self, what: str, count: int, threads: int) -> tuple[float, float]:
        server = self.server(threads)
        prompt, new = (tokens(count), 1) if what == "prefill" else (tokens(BEFORE), count + 1)
        used = cpu()
        asked = {"prompt": prompt, "n_predict": new, "temperature": 0, "cache_prompt": False, "ignore_eos": True}
        found = server.handle_completions(asked)  # type: ignore[attr-defined]
        told = (json.loads(found) if isinstance(found, str | bytes) else found)["timings"]
        used = cpu() - used
        if what == "prefill":
            return told["prompt_ms"] / 1000 / told["prompt_n"] * count, used
        return told["predicted_ms"] / 1000 / told["predicted_n"] * count, used

    def system(self) -> str:
        return str(self.api.get_system_info())


def main() -> None:
    """Answer until there are no more questions."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print must not be taken for an answer
    peer = (Direct if importlib.util.find_spec("llama_cpp") else Served)(sys.argv[1])
    about = {"package": peer.package, "version": importlib.metadata.version(peer.package), "system": peer.system()}
    answers.write(json.dumps(about) + "\n")
    answers.flush()
    for line in sys.stdin:
        asked = json.loads(line)
        wall, used = peer.run(asked["what"], asked["tokens"], asked["threads"])
        answers.write(json.dumps({"wall": wall, "cpu": used}) + "\n")
        answers.flush()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
