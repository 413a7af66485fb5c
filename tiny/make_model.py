"""Makes tiny/model: a byte-level BPE tokenizer and a Phi of 3 million parameters.

    PYTHONPATH=. python tiny/make_model.py            # about 30 minutes on 2 CPU cores

Like phi-2, the base has read plain text only: facts, stories, questions answered yes, maybe or no,
from the world of make_data.py. It has never seen the prompt of data.py nor a pair of tiny/data, so
what the adapter then learns is the task. Only the tokenizer has read the wording of the prompt, so
that it cuts it into words.
"""

import argparse
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from make_data import ANSWERS, documents, make_rows, pairs
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import trange

from data import EOS, PROMPT
from phi2 import Phi2, Phi2Config
from support.packing import PackedRows

HERE = Path(__file__).resolve().parent
CONFIG = Phi2Config(
    vocab_size=1024,
    hidden_size=192,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=6,
    partial_rotary_factor=0.5,
    resid_pdrop=0.0,
)
# What phi-2's config.json says besides, so that transformers loads the model too.
FURTHER_CONFIG = {
    "architectures": ["PhiForCausalLM"],
    "model_type": "phi",
    "torch_dtype": "bfloat16",
    "hidden_act": "gelu_new",
    "max_position_embeddings": 512,
    "embd_pdrop": 0.0,
    "attention_dropout": 0.0,
    "qk_layernorm": False,
    "tie_word_embeddings": False,
}


# -----------------------------------------------------------------------------
# Tokens


def make_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size - 24,  # phi-2's head has more rows than its tokenizer too
        special_tokens=[EOS],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def batches(
    tokenizer: Tokenizer, texts: Iterator[str], rows: int, length: int
) -> Iterator[Tensor]:
    """Yields endless (rows, length + 1) ids of documents, joined by the end-of-text token."""
    eos = tokenizer.token_to_id(EOS)
    count = rows * (length + 1)
    buffer = []
    while True:
        while len(buffer) < count:
            for encoding in tokenizer.encode_batch(list(itertools.islice(texts, 500))):
                buffer += [*encoding.ids, eos]
        yield torch.tensor(buffer[:count]).view(rows, length + 1)
        buffer = buffer[count:]


# -----------------------------------------------------------------------------
# The model


def make_model() -> Phi2:
    """Returns a model initialised as GPT-2 is."""
    model = Phi2(CONFIG)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.02)
    # The branches that add to the residual start smaller, the more of them there are.
    for block in model.model.layers:
        for layer in (block.self_attn.dense, block.mlp.fc2):
            std = 0.02 / math.sqrt(2 * CONFIG.num_hidden_layers)
            torch.nn.init.normal_(layer.weight, std=std)
    return model


def learning_rate(step: int, steps: int) -> float:
    """Returns the factor on the learning rate: 100 steps of warm-up, then half a cosine to 2 %."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min((step + 1) / 100, 0.02 + 0.98 * cosine)


@torch.no_grad()
def judgement(model: Phi2, tokenizer: Tokenizer, texts: Iterator[str]) -> float:
    """Returns the share of 500 fresh questions whose answer is the likeliest next token."""
    questions = (text for text in texts if text.split()[-1].rstrip(".") in ANSWERS)
    correct = 0
    for text in itertools.islice(questions, 500):
        ids = tokenizer.encode(text).ids
        tokens = [tokenizer.decode([token]).strip() for token in ids]
        place = max(number for number, token in enumerate(tokens) if token in ANSWERS)
        logits = model(torch.tensor(ids[:place]))
        correct += logits[-1].argmax().item() == ids[place]
    return correct / 500


def save(model: Phi2, tokenizer: Tokenizer, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    eos = tokenizer.token_to_id(EOS)
    config = FURTHER_CONFIG | {"bos_token_id": eos, "eos_token_id": eos} | asdict(CONFIG)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {key: tensor.to(torch.bfloat16) for key, tensor in model.state_dict().items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


# -----------------------------------------------------------------------------
# The script


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="pre-trains the embedded model",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "model")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)

    known = set().union(*(pairs(rows) for rows in make_rows().values()))
    texts = documents(args.seed + 1, known)
    read_by_tokenizer = list(itertools.islice(texts, 20000)) + [PROMPT] * 200
    tokenizer = make_tokenizer(read_by_tokenizer)

    model = make_model()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(step, args.steps)
    )
    stream = batches(tokenizer, texts, args.batch_size, args.length)
    rows = PackedRows([args.length] * args.batch_size)
    bar = trange(args.steps)
    for step in bar:
        ids = next(stream)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids[:, :-1].flatten(), rows)
        loss = cross_entropy(logits.float(), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 250 == 249:
            share = judgement(model, tokenizer, documents(args.seed + 2, known))
            save(model, tokenizer, args.out)
            bar.write(f"step {step + 1}: loss {loss.item():.3f}, {share:.1%} of questions right")

    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.out}: {parameters:,} parameters, {tokenizer.get_vocab_size()} token ids")


if __name__ == "__main__":
    main()
