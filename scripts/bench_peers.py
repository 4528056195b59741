#!/usr/bin/env python3
"""Sequor beside llama.cpp and Hugging Face transformers: the same files, in turn.

    scripts/bench_peers.py --sequor target/release/sequor [--repeats 5] [--json peers.json]

Peers are installed by package name into a scratch environment (default: target/peers), llama.cpp
compiled there for this processor. Each repeat measures every program once, one process each, one
after another; medians and the spread are printed, and ratios repeat by repeat, so that what
else the machine does falls on all. Two models: SmolLM2-135M-Instruct from its Q4_1 GGUF file (and
a bf16 folder written from it), and a random Llama of 190 M parameters (12 layers, 1024 wide,
vocabulary of 32,000), whose GGUF files `sequor quantize` writes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

LLAMA_CPP = "llama-cpp-python==0.3.36"
TRANSFORMERS = ["torch==2.11.0", "transformers", "safetensors"]
PROMPT = 18  # tokens before decoding is timed, as `sequor bench decode` has it
PREFILL = 512


def setup(env: Path, with_transformers: bool) -> Path:
    """A virtual environment with the peers; what is there already is kept."""
    python = env / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "-q"]
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(env)], check=True)

    def there(module: str) -> bool:
        return subprocess.run([str(python), "-c", f"import {module}"], capture_output=True).returncode == 0

    if not there("llama_cpp"):
        print("compiling llama.cpp (several minutes)", file=sys.stderr)
        subprocess.run(pip + ["cmake", "ninja", "scikit-build-core", "numpy"], check=True)
        flags = dict(os.environ, CMAKE_ARGS="-DGGML_NATIVE=ON", PATH=f"{env / 'bin'}:{os.environ['PATH']}")
        source = ["--no-build-isolation", "--no-binary", "llama-cpp-python", LLAMA_CPP]
        subprocess.run(pip + source, check=True, env=flags)
    if with_transformers and not there("transformers"):
        subprocess.run(pip + TRANSFORMERS, check=True)
    return python


# What runs inside the scratch environment: `bench_peers.py --child KIND MODEL TOKENS THREADS`.


def child_llama(model: str, tokens: int, threads: int) -> dict:
    import numpy as np
    import llama_cpp as c

    llm = c.Llama(model_path=model, n_ctx=1024, n_threads=threads, n_threads_batch=threads, n_batch=512, verbose=False)
    ctx = llm._ctx.ctx
    vocab = llm.n_vocab()
    remove = getattr(c, "llama_memory_seq_rm", None)
    memory = c.llama_get_memory(ctx) if remove else ctx
    remove = remove or c.llama_kv_self_seq_rm

    def evaluate(ids, at):
        # Logits of the last row alone, as a prompt needs.
        batch = c.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, at + i, 1, 0
            batch.logits[i] = i + 1 == len(ids)
        if c.llama_decode(ctx, batch) != 0:
            raise RuntimeError("llama_decode failed")
        c.llama_batch_free(batch)

    def best():
        return int(np.ctypeslib.as_array(c.llama_get_logits_ith(ctx, -1), shape=(vocab,)).argmax())

    def clear(start=0):
        remove(memory, 0, start, -1)

    prompt = [(37 * i + 11) % 1000 + 300 for i in range(PREFILL)]
    evaluate(prompt[:PROMPT], 0)
    clear()
    start = time.perf_counter()
    evaluate(prompt, 0)
    prefill = PREFILL / (time.perf_counter() - start)
    clear()
    evaluate(prompt[:PROMPT], 0)
    token = best()
    start = time.perf_counter()
    for i in range(tokens):
        evaluate([token], PROMPT + i)
        token = best()
    decode = tokens / (time.perf_counter() - start)
    # A pass over eight rows at the same place, over one row.
    times = {1: [], 8: []}
    for _ in range(8):
        for n in times:
            clear(128)
            if not times[n]:
                clear()
                evaluate(prompt[:128], 0)
            start = time.perf_counter()
            evaluate(prompt[128 : 128 + n], 128)
            times[n].append(time.perf_counter() - start)
    cost = statistics.median(times[8]) / statistics.median(times[1])
    return {"decode": decode, "prefill": prefill, "c8": cost}


def child_transformers(model: str, tokens: int, threads: int) -> dict:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    prompt = torch.tensor([[(37 * i + 11) % 1000 + 300 for i in range(PREFILL)]])
    with torch.inference_mode():
        lm(prompt[:, :PROMPT])
        start = time.perf_counter()
        lm(prompt, use_cache=True, logits_to_keep=1)
        prefill = PREFILL / (time.perf_counter() - start)
        out = lm(prompt[:, :PROMPT], use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        start = time.perf_counter()
        for _ in range(tokens):
            out = lm(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        return {"decode": tokens / (time.perf_counter() - start), "prefill": prefill}


def child_random_llama(folder: str, *_) -> dict:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=2048, num_hidden_layers=12,
        num_attention_heads=16, num_key_value_heads=16, max_position_embeddings=1024,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    path = Path(folder) / "config.json"
    plain = json.loads(path.read_text())
    plain.setdefault("rope_theta", 10000.0)
    path.write_text(json.dumps(plain))
    return {"parameters": sum(p.numel() for p in LlamaForCausalLM(config).parameters())}


CHILDREN = {"llama.cpp": child_llama, "transformers": child_transformers, "random": child_random_llama}


def last_json(command) -> dict:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_sequor(binary, model, weights, tokens, threads) -> dict:
    report = last_json(
        [binary, "bench", "decode", "--plain", "--json", "--offline", "--repeats", "1", "--model", model,
         "--weights", weights, "--tokens", str(tokens), "--threads", str(threads)]
    )
    row = report["rows"][0]
    return {
        "decode": row["tokens_per_second"]["median"],
        "prefill": row["prefill_tokens_per_second"],
        "c8": dict(map(tuple, row["cost"]))[8],
        "bandwidth_fraction": row["bandwidth_fraction"],
        "bandwidth": report["bandwidth"],
    }


def main() -> None:
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--sequor", type=Path, default=Path("target/release/sequor"))
    a.add_argument("--env", type=Path, default=Path("target/peers"))
    a.add_argument("--repeats", type=int, default=5)
    a.add_argument("--tokens", type=int, default=64)
    a.add_argument("--threads", type=int, default=os.cpu_count())
    a.add_argument("--only", default="", help="measure rows whose name contains this")
    a.add_argument("--no-transformers", action="store_true")
    a.add_argument("--json", type=Path)
    a = a.parse_args()
    sequor = str(a.sequor.resolve())
    a.env.mkdir(parents=True, exist_ok=True)
    python = str(setup(a.env.resolve(), True))
    me = str(Path(__file__).resolve())

    fetched = subprocess.run([sequor, "models", "fetch", "smollm2"], capture_output=True, text=True, check=True)
    smollm2 = fetched.stdout.strip().splitlines()[-1].split()[-1]
    smollm2_folder = a.env / "smollm2-bf16"
    random = a.env / "random-llama"
    if not (random / "config.json").exists():
        last_json([python, me, "--child", "random", str(random), "0", "0"])

    def quantized(model, to, out):
        if not out.exists():
            command = [sequor, "quantize", str(model), "--to", to, "--tables", to, "--out", str(out), "--offline"]
            subprocess.run(command, check=True, stdout=sys.stderr)
        return str(out)

    quantized("smollm2", "bf16", smollm2_folder)
    # The random model has no text to read: any tokenizer serves, padded to its vocabulary.
    for name in ("tokenizer.json", "tokenizer_config.json"):
        source = Path(__file__).resolve().parent.parent / "models" / "bible-lm" / name
        (random / name).write_bytes(source.read_bytes())
    files = {f: quantized(random, f, a.env / f"random-{f}.gguf") for f in ("bf16", "q8_0", "q4_0")}

    # Name, who, model, weights.
    rows = [
        ("SmolLM2 q4_1 llama.cpp", "llama.cpp", smollm2, ""),
        ("SmolLM2 q4_1 sequor", "sequor", smollm2, "auto"),
    ]
    for f, path in files.items():
        rows += [(f"random {f} llama.cpp", "llama.cpp", path, ""), (f"random {f} sequor", "sequor", path, "auto")]
    if not a.no_transformers:
        rows += [
            ("SmolLM2 bf16 transformers", "transformers", str(smollm2_folder), ""),
            ("SmolLM2 bf16 sequor", "sequor", str(smollm2_folder), "bf16"),
            ("random bf16 transformers", "transformers", str(random), ""),
        ]
    rows = [r for r in rows if a.only in r[0]]
    results = {name: [] for name, *_ in rows}
    for repeat in range(a.repeats):
        for name, who, model, weights in rows:
            if who == "sequor":
                found = run_sequor(sequor, model, weights, a.tokens, a.threads)
            else:
                found = last_json([python, me, "--child", who, model, str(a.tokens), str(a.threads)])
            results[name].append(found)
            print(f"{repeat + 1}/{a.repeats} {name}: {found['decode']:.1f} tokens/s", file=sys.stderr)

    def spread(values):
        return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"

    print(f"\n{a.repeats} repeats, medians (smallest-largest), {a.threads} threads\n")
    print("| model, weights, program | tokens/s | prefill tokens/s | c(8) |")
    print("|---|---|---|---|")
    for name, found in results.items():
        column = lambda key: [f[key] for f in found if key in f]
        cost = f"{statistics.median(column('c8')):.2f}" if column("c8") else ""
        print(f"| {name} | {spread(column('decode'))} | {spread(column('prefill'))} | {cost} |")
    print("\n| ratio, repeat by repeat | decode | prefill |")
    print("|---|---|---|")
    pairs = [("SmolLM2 q4_1 sequor", "SmolLM2 q4_1 llama.cpp")]
    pairs += [(f"random {f} sequor", f"random {f} llama.cpp") for f in files]
    pairs += [("SmolLM2 bf16 sequor", "SmolLM2 bf16 transformers"), ("SmolLM2 q4_1 sequor", "SmolLM2 bf16 transformers")]
    pairs += [(f"random {f} sequor", "random bf16 transformers") for f in files]
    for ours, theirs in pairs:
        if ours in results and theirs in results:
            two = lambda key: "{:.2f} ({:.2f}-{:.2f})".format(
                *(f([x[key] / y[key] for x, y in zip(results[ours], results[theirs])]) for f in (statistics.median, min, max))
            )
            print(f"| {ours} / {theirs} | {two('decode')} | {two('prefill')} |")
    for f in files:
        found = results.get(f"random {f} sequor", [])
        if found:
            share = statistics.median(x["bandwidth_fraction"] for x in found)
            rate = statistics.median(x["bandwidth"] for x in found)
            print(f"\nrandom {f} sequor: {100 * share:.0f} % of the {rate / 1e9:.1f} GB/s that memory reads at")
    if a.json:
        a.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        kind, model, tokens, threads = sys.argv[2:6]
        print(json.dumps(CHILDREN[kind](model, int(tokens), int(threads))))
    else:
        main()
