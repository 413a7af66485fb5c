"""Exercise 4: alpha / sqrt(rank), and the key that says so to whoever loads the file."""

import math
from dataclasses import dataclass


@dataclass
class LoRAConfig:
    rank: int
    alpha: float
    targets: tuple[str, ...]
    use_rslora: bool = False

    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


def to_peft(config: LoRAConfig) -> dict:
    return {
        "peft_type": "LORA",
        "r": config.rank,
        "lora_alpha": config.alpha,
        "target_modules": list(config.targets),
        "use_rslora": config.use_rslora,
    }


def from_peft(raw: dict) -> LoRAConfig:
    return LoRAConfig(
        rank=raw["r"],
        alpha=raw["lora_alpha"],
        targets=tuple(raw["target_modules"]),
        use_rslora=raw.get("use_rslora", False),  # older files have no such key
    )
