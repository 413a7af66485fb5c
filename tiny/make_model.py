"""Makes tiny/model: a byte-level BPE tokenizer and a Phi of 3 million parameters that knows the world of make_data.py.

    PYTHONPATH=. python tiny/make_model.py            # 30 minutes on 2 CPU cores

Like phi-2, the base has read plain text only: facts, stories, questions answered yes, maybe or no. It has never seen
the prompt of data.py nor a pair of tiny/data. What the adapter then learns is the task. The tokenizer alone has read
the prompt's wording, so that it cuts it into words.
"""
import argparse
import itertools
import json
import math
from dataclasses import asdict
from pathlib import Path

import torch
from make_data import ANSWERS, documents, make_rows
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from tqdm import trange

from data import PROMPT
from phi2 import Phi2, Phi2Config

HERE = Path(__file__).resolve().parent
EOS = "<|endoftext|>"
CONFIG = Phi2Config(vocab_size=1024, hidden_size=192, intermediate_size=768, num_hidden_layers=6, num_attention_heads=6,
                    partial_rotary_factor=0.5, resid_pdrop=0.0)


def make_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=CONFIG.vocab_size - 24, special_tokens=[EOS], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def batches(tokenizer: Tokenizer, texts, rows: int, length: int):
    """Endless (rows, length + 1) tensors of documents joined by the end-of-text token."""
    eos, buffer = tokenizer.token_to_id(EOS), []
    while True:
        while len(buffer) < rows * (length + 1):
            for encoding in tokenizer.encode_batch(list(itertools.islice(texts, 500))):
                buffer += encoding.ids + [eos]
        taken, buffer = buffer[:rows * (length + 1)], buffer[rows * (length + 1):]
        yield torch.tensor(taken).view(rows, length + 1)


@torch.no_grad()
def judgement(model: Phi2, tokenizer: Tokenizer, texts) -> float:
    """The part of 500 fresh questions whose answer is the likeliest next token."""
    questions = list(itertools.islice((text for text in texts if text.split()[-1].rstrip(".") in ANSWERS), 500))
    correct = 0
    for text in questions:
        ids = tokenizer.encode(text).ids
        at = max(i for i, token in enumerate(ids) if tokenizer.decode([token]).strip() in ANSWERS)
        correct += model(torch.tensor([ids[:at]]))[0, -1].argmax().item() == ids[at]
    return correct / len(questions)


def save(model: Phi2, tokenizer: Tokenizer, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    eos = tokenizer.token_to_id(EOS)
    config = {"architectures": ["PhiForCausalLM"], "model_type": "phi", "torch_dtype": "bfloat16", "hidden_act": "gelu_new",
              "max_position_embeddings": 512, "embd_pdrop": 0.0, "attention_dropout": 0.0, "qk_layernorm": False,
              "tie_word_embeddings": False, "bos_token_id": eos, "eos_token_id": eos}
    (directory / "config.json").write_text(json.dumps(config | asdict(CONFIG), indent=2) + "\n")
    tensors = {key: tensor.to(torch.bfloat16) for key, tensor in model.state_dict().items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description="pre-trains the embedded model", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "model")
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    known = {(row["premise"], row["hypothesis"]) for rows in make_rows().values() for row in rows}
    texts = documents(args.seed + 1, known)
    tokenizer = make_tokenizer(list(itertools.islice(texts, 20000)) + [PROMPT] * 200)

    model = Phi2(CONFIG)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.02)
    for block in model.model.layers:  # the branches that add to the residual start small, as GPT-2's do
        for layer in (block.self_attn.dense, block.mlp.fc2):
            torch.nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * CONFIG.num_hidden_layers))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 100, 0.02 + 0.98 * 0.5 * (
        1 + math.cos(math.pi * step / args.steps))))
    data, bar = batches(tokenizer, texts, args.batch_size, args.length), trange(args.steps)
    for step in bar:
        ids = next(data)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids[:, :-1])
        loss = cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 250 == 249:
            right = judgement(model, tokenizer, documents(args.seed + 2, known))
            save(model, tokenizer, args.out)
            bar.write(f"step {step + 1}: loss {loss.item():.3f}, {right:.1%} of fresh questions right")

    print(f"{args.out}: {sum(p.numel() for p in model.parameters()):,} parameters, {tokenizer.get_vocab_size()} token ids")


if __name__ == "__main__":
    main()
