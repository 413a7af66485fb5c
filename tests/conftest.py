"""What the tests share: the embedded model, a random model of phi-2's widths, and the reference libraries on both."""
import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: with two processes on one core, threads that spin wait for ever
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the tests need no network; the Hub's own test sets what it needs
SHARED = ROOT.parent / "shared"  # real MNLI and phi-2's tokenizer, where they are
torch.set_num_threads(os.cpu_count() or 1)


@pytest.fixture(scope="session")
def tiny() -> Path:
    return ROOT / "tiny" / "model"


@pytest.fixture(scope="session")
def wide(tmp_path_factory) -> Path:
    """Four layers of phi-2's widths with random weights, saved in fp16 in two shards, as phi-2 is on the Hub."""
    from transformers import PhiConfig, PhiForCausalLM
    torch.manual_seed(0)
    config = PhiConfig(vocab_size=51200, hidden_size=2560, intermediate_size=10240, num_hidden_layers=4, num_attention_heads=32,
                       partial_rotary_factor=0.4, resid_pdrop=0.0, bos_token_id=50256, eos_token_id=50256, dtype=torch.float16)
    with torch.device("meta"):
        model = PhiForCausalLM(config)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():  # larger than usual, so that a mistake shows; LayerNorms vary around 1
        parameter.data.uniform_(-0.04, 0.04)
    for name, parameter in model.named_parameters():
        if "layernorm.weight" in name:
            parameter.data.add_(1)
    directory = tmp_path_factory.mktemp("wide")
    model.to(torch.float16).save_pretrained(directory, max_shard_size="700MB")
    return directory


def ours(directory: Path, dtype: torch.dtype, quantization: str = "none", double_quant: bool = False):
    import eval as evaluation
    return evaluation.load_model(directory, quantization, dtype, "cpu", double_quant).eval()


def reference(directory: Path, dtype: torch.dtype, quantization: str = "none", double_quant: bool = False):
    """transformers' model. In train mode: bitsandbytes' 4-bit layers change their weights in eval mode on some CPUs."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    options = {}
    if quantization == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
                                                            bnb_4bit_use_double_quant=double_quant)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa", **options).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def peft_model(base, targets=("q_proj", "v_proj"), dropout=0.0, **options):
    from peft import LoraConfig, get_peft_model
    return get_peft_model(base, LoraConfig(r=8, lora_alpha=16, lora_dropout=dropout, target_modules=list(targets), task_type="CAUSAL_LM", **options))


def peft_tensors(model) -> dict[str, torch.Tensor]:
    """PEFT's adapter tensors under our names."""
    import lora
    return {name.removeprefix(lora.PREFIX).replace(".default", ""): parameter for name, parameter in model.named_parameters() if "lora_" in name}


def pair(directory, dtype=torch.float32, quantization="none", targets=("q_proj", "v_proj"), seed=1):
    """Our model and PEFT's with the same random A and B."""
    import lora
    mine, theirs = ours(directory, dtype, quantization), reference(directory, dtype, quantization)
    lora.inject(mine, lora.LoRAConfig(dropout=0.0, targets=targets))
    theirs = peft_model(theirs, targets)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in lora.lora_parameters(mine).items():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5)
            peft_tensors(theirs)[name].copy_(parameter)
    return mine, theirs


def random_ids(model, rows: int = 3, length: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The norm of the difference, relative to the norm of b."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def script(*arguments, timeout: int = 300, env: dict | None = None, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Runs one of the project's scripts as a user would."""
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=timeout,
                          env=os.environ | (env or {}))


def in_process(module, *arguments, cwd=ROOT) -> None:
    """A script's main in this process, which saves the seconds of its imports."""
    import data
    before, argv = os.getcwd(), sys.argv
    sys.argv = [f"{module.__name__}.py", *map(str, arguments)]
    os.chdir(cwd)
    try:
        data.run(module.main)
    finally:
        os.chdir(before)
        sys.argv = argv


def read_json(path: Path) -> dict:
    return json.loads(Path(path).read_text())
