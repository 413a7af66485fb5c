"""Exercise 4: rsLoRA, and its file. 25 minutes.

B A x is a sum of `rank` terms. If they are independent, the sum grows with sqrt(rank), but LoRA
divides by rank. So at the same alpha a higher rank learns a smaller update, and learns it
more slowly. rsLoRA (arXiv:2312.03732, section 3, theorem 3.2) divides by sqrt(rank) instead:

    scale  =  alpha / rank          LoRA
    scale  =  alpha / sqrt(rank)    rsLoRA

That is one line. The exercise is about what else depends on it. An adapter is saved as two files:
the tensors, and adapter_config.json with rank, alpha and targets. Neither holds the scale:
whoever loads the adapter, you or PEFT, computes it again. So write `scale`, run the tests, and
see what PEFT computes with your adapter. `to_peft` and `from_peft`, below, are right for LoRA.
Are they right for rsLoRA?

What you should see: for each rank the size of scale B A x, with LoRA and with rsLoRA, for alpha
16 and random A and B.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> x = torch.randn(512, 256)    # 256 tokens, as columns
    >>> for rank in (1, 16, 256):
    ...     bax = torch.randn(512, rank) @ torch.randn(rank, 512) @ x / 512**0.5
    ...     plain = LoRAConfig(rank, 16, ("q_proj",)).scale()
    ...     stable = LoRAConfig(rank, 16, ("q_proj",), use_rslora=True).scale()
    ...     print(f"{rank:3}  {(plain * bax).std():4.1f}  {(stable * bax).std():4.1f}")
      1  17.4  17.4
     16   4.0  15.9
    256   1.0  16.0
"""

from dataclasses import dataclass


@dataclass
class LoRAConfig:
    rank: int
    alpha: float
    targets: tuple[str, ...]
    use_rslora: bool = False

    def scale(self) -> float:
        """Returns the factor by which B A x is multiplied."""
        raise NotImplementedError("exercise 4: LoRAConfig.scale")


def to_peft(config: LoRAConfig) -> dict:
    """Returns the content of adapter_config.json, which PEFT reads."""
    return {
        "peft_type": "LORA",
        "r": config.rank,
        "lora_alpha": config.alpha,
        "target_modules": list(config.targets),
    }


def from_peft(raw: dict) -> LoRAConfig:
    """Returns the config that the content of an adapter_config.json describes."""
    return LoRAConfig(
        rank=raw["r"],
        alpha=raw["lora_alpha"],
        targets=tuple(raw["target_modules"]),
    )
