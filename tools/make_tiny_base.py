"""Makes the newcomer's base model, a Qwen2 of 0.3 M parameters that half knows how to add, and its questions.

    python tools/make_tiny_base.py --hf-dir checkpoints/rlsc-tiny-base --data-dir examples/data

The text that it learns from sometimes writes an addition out, digit by digit with the carries, and sometimes blurts the
answer: mostly the latter where the first number is below 600. The model learns to be right where it writes the work
out, and guesses where it does not, about 45 % right on held-out sums. Its samples agree with each other where it
writes the work out; that is all that RLSC needs to know.

A hash of the sum decides what the sum is for: training of the base, rollout questions (whose answers are never
written), or held-out. One to three minutes on one thread, the same weights each time on one kind of machine.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import trange
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

Purpose = Literal["base", "rollout", "heldout"]
PROMPT = "{problem}="
"""`prompt_template` of examples/rlsc_tiny.toml."""
MAX_POSITIONS = 4096
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Qwen2.5's without its tools.
CHAT_TEMPLATE = """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role != 'system' or not loop.first %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


@dataclass(frozen=True, kw_only=True)
class Args:
    hf_dir: Path = Path("checkpoints/rlsc-tiny-base")
    """Where the model goes, in HF format."""
    data_dir: Path = Path("examples/data")
    """Where addition_rollout.jsonl and addition_heldout.jsonl go."""
    batches: int = 700
    """Training batches."""
    batch_size: int = 64
    """Sums a batch."""
    lr: float = 2e-3
    """Peak learning rate, after a linear warm-up over a tenth of the batches and before a linear decay to zero."""
    rollout_questions: int = 2000
    """Lines of addition_rollout.jsonl, without answers."""
    heldout_questions: int = 500
    """Lines of addition_heldout.jsonl, with answers."""
    seed: int = 0
    """Of the weights and the sums."""


def purpose(a: int, b: int) -> Purpose:
    """What the sum a + b serves; b + a serves the same."""
    bucket = hashlib.sha256(f"{min(a, b)}+{max(a, b)}".encode()).digest()[0] % 8
    return {0: "rollout", 1: "heldout"}.get(bucket, "base")


def draw_sums(wanted: Purpose, count: int, rng: random.Random) -> list[tuple[int, int]]:
    """`count` different sums of two 3-digit numbers."""
    sums: dict[tuple[int, int], None] = {}
    while len(sums) < count:
        a, b = rng.randint(100, 999), rng.randint(100, 999)
        if purpose(a, b) == wanted:
            sums[a, b] = None
    return list(sums)


def write_out(a: int, b: int) -> str:
    r"""345 + 678 -> `5+8+0=13 4+7+1=12 3+6+1=10 \boxed{1023}`: units, tens, hundreds, each with the carry."""
    steps, carry = [], 0
    for place in (1, 10, 100):
        x, y = a // place % 10, b // place % 10
        steps.append(f"{x}+{y}+{carry}={x + y + carry:02d}")
        carry = (x + y + carry) // 10
    return " ".join(steps) + rf" \boxed{{{a + b}}}"


def solution(a: int, b: int, rng: random.Random) -> str:
    """What the base's text has after `a+b=`: the work and the answer, or the answer alone."""
    shows_work = rng.random() < (0.7 if a >= 600 else 0.3)
    return write_out(a, b) if shows_work else rf"\boxed{{{a + b}}}"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and the special tokens of Qwen2.5: 259 in all, which no TP above 1 divides."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    eos, im_end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,  # of 32, the smallest that vLLM's CPU attention knows
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=eos,
        dtype=torch.float32,
    )
    model = Qwen2ForCausalLM(config)
    # A residual stream of size 0.5 instead of 0.05 makes the model ten times less sensitive to a step of its weights;
    # the last norm keeps the first logits, which the tied embedding makes, near 1.
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.5)
    torch.nn.init.constant_(model.model.norm.weight, 1 / (0.5 * config.hidden_size**0.5))
    model.generation_config = GenerationConfig(eos_token_id=[eos, im_end], pad_token_id=eos)
    return model


def train(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, args: Args, rng: random.Random) -> None:
    """Next-token loss on the solutions, the end of text included."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, args.batches // 10)
    progress = trange(args.batches, desc="base", unit="batch")
    for batch in progress:
        tokens, labels = [], []
        for a, b in draw_sums("base", args.batch_size, rng):
            prompt = tokenizer(PROMPT.replace("{problem}", f"{a}+{b}")).input_ids
            response = [*tokenizer(solution(a, b, rng)).input_ids, tokenizer.eos_token_id]
            tokens.append(prompt + response)
            labels.append([-100] * len(prompt) + response)
        width = max(map(len, tokens))
        input_ids = torch.tensor([row + [tokenizer.eos_token_id] * (width - len(row)) for row in tokens])
        targets = torch.tensor([row + [-100] * (width - len(row)) for row in labels])
        loss = model(input_ids=input_ids, labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = args.lr * min((batch + 1) / warmup, 1 - batch / args.batches)
        optimizer.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}")


def write_questions(args: Args, rng: random.Random) -> None:
    args.data_dir.mkdir(parents=True, exist_ok=True)
    rollout = [{"problem": f"{a}+{b}"} for a, b in draw_sums("rollout", args.rollout_questions, rng)]
    heldout = [
        {"problem": f"{a}+{b}", "answer": str(a + b)} for a, b in draw_sums("heldout", args.heldout_questions, rng)
    ]
    for name, lines in (("addition_rollout", rollout), ("addition_heldout", heldout)):
        path = args.data_dir / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def main(args: Args) -> None:
    torch.set_num_threads(1)  # the same sums in the same order on every machine of a kind
    torch.manual_seed(args.seed)
    write_questions(args, random.Random(args.seed + 1))
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    train(model, tokenizer, args, random.Random(args.seed))
    model.save_pretrained(args.hf_dir)
    tokenizer.save_pretrained(args.hf_dir, save_jinja_files=False)  # the template inside tokenizer_config.json


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
