"""Serves a language model from the CPU, in BF16 and in FP8: tokens a second, memory, agreement.

    python examples/serve_cpu.py                    0.6 B parameters, some minutes
    python examples/serve_cpu.py --size tiny        seconds
    python examples/serve_cpu.py --mode w8a8        quantizes the inputs of products, too

It makes a model in the shape of Qwen3 with random weights, saves it in BF16, quantizes the files to
an FP8 checkpoint with torchext.checkpoint, loads both with transformers, and generates the same
number of tokens with both, in turns. FP8 weights stay FP8: torchext.integrations.transformers
multiplies with them as they are. Needs transformers, accelerate and safetensors.

Random weights say nothing about quality: "agreement" is how near FP8's logits are to BF16's.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

import torchext.checkpoint
from torchext.integrations.transformers import enable
from torchext.nn.fp8_linear import Mode

# Sizes of Qwen3, but for the vocabulary: Qwen3's 151,936 tokens would be a quarter of a model of
# this size. Embedding and head are one BF16 matrix, in both models.
SIZES: dict[str, dict[str, int]] = {
    "0.6B": {
        "hidden_size": 1536,
        "intermediate_size": 4096,
        "num_hidden_layers": 20,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 32768,
    },
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 256,
    },
}


def write_checkpoints(folder: Path, size: str, vocabulary: int | None) -> tuple[Path, Path]:
    """Saves a model with random weights in BF16, and an FP8 checkpoint made of it."""
    sizes = {**SIZES[size], **({} if vocabulary is None else {"vocab_size": vocabulary})}
    config = Qwen3Config(**sizes, tie_word_embeddings=True, bos_token_id=0, eos_token_id=None)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    wide, narrow = folder / "bf16", folder / "fp8"
    model.save_pretrained(wide)
    print(torchext.checkpoint.quantize(wide, narrow))
    return wide, narrow


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()


def bytes_of(model: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def generate(model: Any, prompt: torch.Tensor, tokens: int) -> torch.Tensor:
    """Generates `tokens` tokens after the prompt, always the likeliest one, with a KV cache."""
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="0.6B")
    parser.add_argument("--vocabulary", type=int, help="number of tokens, such as Qwen3's 151936")
    parser.add_argument("--mode", choices=get_args(Mode), default="w8a16")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=5, help="times that BF16 and FP8 take turns")
    options = parser.parse_args(arguments)

    with tempfile.TemporaryDirectory() as folder, enable(options.mode), torch.inference_mode():
        wide, narrow = write_checkpoints(Path(folder), options.size, options.vocabulary)
        models = {"BF16": load(wide), "FP8": load(narrow)}
        parameters = sum(parameter.numel() for parameter in models["BF16"].parameters())
        sizes = {name: bytes_of(model) for name, model in models.items()}
        vocabulary = models["BF16"].config.vocab_size
        prompt = torch.randint(vocabulary, (1, options.prompt))

        # Generating one token takes the prompt's time. The time of `options.tokens` more tokens is
        # what a longer call takes beyond that.
        seconds: dict[str, list[float]] = {name: [] for name in models}
        first: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(options.rounds + 1):
            for name, model in models.items():
                start = time.perf_counter()
                generate(model, prompt, 1)
                after_first = time.perf_counter()
                generate(model, prompt, 1 + options.tokens)
                end = time.perf_counter()
                first[name].append(after_first - start)
                seconds[name].append(end - after_first - (after_first - start))
        logits = {name: model(prompt).logits[0].double() for name, model in models.items()}

    print(f"\n{parameters / 1e6:,.0f} M parameters, {torch.get_num_threads()} threads, batch 1")
    for name in models:
        # The first round warms up.
        rate = options.tokens / statistics.median(seconds[name][1:])
        print(
            f"{name:4}  {rate:8.1f} tokens/s  {1e3 * statistics.median(first[name][1:]):8.1f} ms to"
            f" the first token  {sizes[name] / 1e6:8.1f} MB of weights"
        )
    pairs = zip(seconds["BF16"][1:], seconds["FP8"][1:], strict=True)
    gain = statistics.median(slow / fast for slow, fast in pairs)
    memory = sizes["FP8"] / sizes["BF16"]
    print(f"FP8 generates {gain:.2f} times as fast, in {memory:.2f} times the memory")
    error = (logits["FP8"] - logits["BF16"]).norm() / logits["BF16"].norm()
    same = (logits["FP8"].argmax(-1) == logits["BF16"].argmax(-1)).double().mean()
    print(
        f"logits: relative error {error:.3f}, the same likeliest token at {same:.0%} of positions"
    )


if __name__ == "__main__":
    main()
