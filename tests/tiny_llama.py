"""A real provider for the tests: llama.cpp's own server with a random-weight model of half a megabyte.

The model is written here and says nonsense, but everything around it is the real thing: tokenizer, sampling, SSE
framing, usage, `timings`, cancelling. Its byte tokens and its end token get an output row of zeros, so that it never
says broken UTF-8 and never stops before max_tokens. `python tiny_llama.py MODEL` is the server; it ends with its stdin.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

SYLLABLES = ("ka", "lo", "mi", "nu", "re", "sa"), ("ban", "den", "fil", "gor", "hum", "jax", "kin", "lop")
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{value:02X}>" for value in range(256)]
LETTERS = [*map(chr, range(ord("a"), ord("z") + 1)), "▁"]
WORDS = [f"▁{first}{second}" for first, second in itertools.product(*SYLLABLES)]
CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def write_model(path: Path, width: int = 64, layers: int = 2) -> Path:
    """Writes a llama of that size: 64 x 2 is 0.5 MB, thousands of tokens a second; 1024 x 6 is 250 MB, a hundred."""
    import gguf
    import numpy

    random = numpy.random.default_rng(7)

    def weights(*shape: int, spread: float | None = None) -> Any:
        return random.standard_normal(shape, dtype=numpy.float32) * numpy.float32(spread or shape[-1] ** -0.5)

    writer = gguf.GGUFWriter(path, "llama")
    _write_shape(writer, width, layers)
    _write_tokenizer(writer)
    vocabulary = len(SPECIAL + BYTES + LETTERS + WORDS)
    output = weights(vocabulary, width, spread=1.0)
    output[: len(SPECIAL + BYTES)] = 0
    ones = numpy.ones(width, numpy.float32)
    for name, tensor in {"token_embd": weights(vocabulary, width), "output_norm": ones, "output": output}.items():
        writer.add_tensor(f"{name}.weight", tensor)
    for layer in range(layers):
        square = {name: weights(width, width) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
        wide = {"ffn_gate": weights(2 * width, width), "ffn_up": weights(2 * width, width)}
        rest = {"ffn_down": weights(width, 2 * width), "attn_norm": ones, "ffn_norm": ones}
        for name, tensor in {**square, **wide, **rest}.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_shape(writer: Any, width: int, layers: int) -> None:
    writer.add_name("tiny")
    writer.add_file_type(0)
    writer.add_context_length(131072)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(2 * width)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // 4)


def _write_tokenizer(writer: Any) -> None:
    """A sentencepiece vocabulary: words score best, letters spell the rest, bytes catch what is left."""
    tokens = SPECIAL + BYTES + LETTERS + WORDS
    unknown, control, byte, normal = 2, 3, 6, 1
    types = [unknown, control, control, *[byte] * len(BYTES), *[normal] * len(LETTERS + WORDS)]
    scores = [0.0] * len(SPECIAL + BYTES) + [-100.0] * len(LETTERS) + [-float(rank) for rank in range(len(WORDS))]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)


class LlamaServer:
    """llama.cpp's server in a child process; `url` once it listens, `log` for what it said."""

    def __init__(self, model: Path, log: Path) -> None:
        self._log = log
        with log.open("wb") as errors:
            self._child = subprocess.Popen(
                [sys.executable, __file__, str(model)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
            )
        assert self._child.stdout
        self.url = self._child.stdout.readline().decode().strip()
        assert self.url.startswith("http"), f"llama.cpp did not start: {self.log[-2000:]}"

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def kill(self) -> None:
        """As if it had crashed."""
        self._child.kill()

    def close(self) -> None:
        assert self._child.stdin
        assert self._child.stdout
        self._child.stdin.close()
        self._child.stdout.close()
        try:
            self._child.wait(10)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()


def running(folder: Path, **shape: int) -> Generator[LlamaServer, None, None]:
    """For a fixture: `yield from running(tmp_path)`."""
    server = LlamaServer(write_model(folder / "tiny.gguf", **shape), folder / "llama.log")
    try:
        yield server
    finally:
        server.close()


def serve(model: str) -> None:
    import xllamacpp  # type: ignore[import-untyped]

    parameters = xllamacpp.CommonParams()
    parameters.model.path = model
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = 0
    parameters.n_ctx = 65536
    parameters.n_parallel = 2
    parameters.warmup = False
    parameters.cpuparams.n_threads = 1
    server = xllamacpp.Server(parameters)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    serve(sys.argv[1])
