"""Makes what the package ships under `gdro_jax/embedded`: the problem sets, the tokenizer and the base policy.

    python experiments/make_base.py [--out FOLDER] [--steps N]

Deterministic for one JAX version and machine type; about ten minutes on 2 cores. The base is warmed up by supervised
learning on a corpus that is uneven in two ways, as real corpora are: hard strata are rare in it, and some of its
answers are wrong (a digit changed). So the base knows more than it shows, to a degree that differs by stratum.
"""

import argparse
import json
import pathlib
import random
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
import transformers

from gdro_jax.data import procedural
from gdro_jax.models import hf, qwen3

SEED = 20260119
LENGTH = 16  # longest prompt and answer with its stop token
BATCH = 48
CONFIG = qwen3.Qwen3Config(
    vocab_size=128, hidden_size=128, intermediate_size=192, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32,
    rope_theta=10_000.0, max_positions=256,
)  # fmt: skip

# stratum: (share of the warm-up corpus, share of its answers that are wrong)
CORPUS = {
    "add-1": (0.10, 0.02), "add-2": (0.14, 0.85), "add-3": (0.06, 0.95),
    "mod-1": (0.06, 0.02), "mod-2": (0.12, 0.80),
    "sort-1": (0.06, 0.02), "sort-2": (0.10, 0.90),
    "linear-1": (0.07, 0.02), "linear-2": (0.09, 0.85),
    "chain-1": (0.08, 0.02), "chain-2": (0.08, 0.85), "chain-3": (0.04, 0.95),
}  # fmt: skip
TRAIN = {
    "add-1": 160, "linear-1": 160, "chain-1": 160, "mod-1": 160, "sort-1": 160,
    "add-2": 64, "linear-2": 64, "chain-2": 64, "mod-2": 64, "sort-2": 64,
    "add-3": 48, "chain-3": 48,
}  # fmt: skip
HELDOUT = {s: 400 if s.endswith("-1") else 640 for s in procedural.strata()}
SETS = {"train": TRAIN, "heldout": HELDOUT}


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per printable character, padded to 128 entries by unused ones, in the Hugging Face layout."""
    special = ["<|pad|>", "<|endoftext|>", "<|unk|>"]
    characters = ["\n"] + [chr(c) for c in range(32, 127)]
    vocabulary = {token: i for i, token in enumerate(special + characters)}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[], unk_token="<|unk|>"))
    core.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|pad|>", eos_token="<|endoftext|>", unk_token="<|unk|>"
    )


def corpus_batch(
    rng: random.Random, forbidden: set[str], tokenizer: transformers.PreTrainedTokenizerFast
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int32[BATCH, LENGTH] and a mask of the answer tokens, stop token included."""
    tokens, answer_mask = np.zeros((BATCH, LENGTH), np.int32), np.zeros((BATCH, LENGTH), bool)
    names = list(CORPUS)
    for row, stratum in enumerate(rng.choices(names, [CORPUS[s][0] for s in names], k=BATCH)):
        prompt, answer = procedural.generate(stratum, rng)
        while prompt in forbidden:
            prompt, answer = procedural.generate(stratum, rng)
        if rng.random() < CORPUS[stratum][1]:
            answer = wrong(rng, answer)
        p, a = tokenizer.encode(prompt), [*tokenizer.encode(answer), tokenizer.eos_token_id]
        tokens[row, : len(p) + len(a)] = p + a
        answer_mask[row, len(p) : len(p) + len(a)] = True
    return tokens, answer_mask


def wrong(rng: random.Random, answer: str) -> str:
    """The answer with one digit changed."""
    at = rng.choice([i for i, c in enumerate(answer) if c.isdigit()])
    digit = rng.choice([d for d in "0123456789" if d != answer[at]])
    return answer[:at] + digit + answer[at + 1 :]


def warm_up(model: qwen3.Qwen3, forbidden: set[str], tokenizer, steps: int) -> qwen3.Qwen3:
    schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, 200, steps, 1e-4)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=0.01))

    @jax.jit
    def step(model, state, tokens, answer_mask):
        def loss(model):
            logits = qwen3.logits(model, tokens[:, :-1], jnp.ones_like(tokens[:, :-1], bool))
            each = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
            return jnp.sum(each * answer_mask[:, 1:]) / jnp.sum(answer_mask[:, 1:])

        value, gradient = jax.value_and_grad(loss)(model)
        updates, state = optimiser.update(gradient, state, model)
        return optax.apply_updates(model, updates), state, value

    rng, state, begun = random.Random(SEED + 1), optimiser.init(model), time.perf_counter()
    for i in range(steps):
        model, state, value = step(model, state, *corpus_batch(rng, forbidden, tokenizer))
        if (i + 1) % 500 == 0:
            print(f"step {i + 1}/{steps}  loss {float(value):.3f}  {time.perf_counter() - begun:.0f} s", flush=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path(__file__).parent.parent / "gdro_jax" / "embedded"
    )
    parser.add_argument("--steps", type=int, default=4500)
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    sets = procedural.split(SETS, SEED)
    for name, problems in sets.items():
        lines = (
            json.dumps({"id": p.id, "prompt": p.prompt, "answer": p.answer, "stratum": p.stratum}) for p in problems
        )
        (args.out / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    tokenizer = make_tokenizer()
    forbidden = {p.prompt for problems in sets.values() for p in problems}
    model = warm_up(qwen3.init(CONFIG, jax.random.key(SEED)), forbidden, tokenizer, args.steps)
    model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
    hf.save(model, args.out / "base")
    tokenizer.save_pretrained(args.out / "base")
    generation = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    (args.out / "base" / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
