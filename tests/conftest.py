"""What the tests share: the embedded model, one of phi-2's widths, and the reference libraries."""

import json
import multiprocessing
import os
import resource
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"  # real MNLI and phi-2's tokenizer, where they are
TARGETS = ("q_proj", "v_proj")

# Before torch is imported: pytest-xdist's processes share the cores. With more threads than cores,
# those that wait awake keep the others from working.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# The tests need no network. Those of the Hub set what they need.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402
from forks import script, start_script  # noqa: E402, F401  (the tests import them from here)
from hypothesis import HealthCheck, settings  # noqa: E402
from torch import Tensor  # noqa: E402

import lora  # noqa: E402
import phi2  # noqa: E402
import quant  # noqa: E402
from support import checkpoints, cli, packing, peft_files  # noqa: E402
from support.examples import find_splits, read_split  # noqa: E402
from support.stopping import StopRequest  # noqa: E402

# On a busy machine any example may take long.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

# What nohup, or a shell that starts something in the background, has made this process ignore, the
# runs would ignore too.
for number in StopRequest.SIGNALS:
    if signal.getsignal(number) is signal.SIG_IGN:
        is_ctrl_c = number == signal.SIGINT
        signal.signal(number, signal.default_int_handler if is_ctrl_c else signal.SIG_DFL)

# The files that take longest, the longest first. They begin in this order, so that no process waits
# for another at the end.
SLOWEST = (
    "test_resume.py", "test_processes.py", "test_train.py", "test_count.py", "test_eval.py",
    "test_packing.py", "test_plan.py", "test_bench.py", "test_push.py", "test_hub.py",
    "test_notebooks.py", "test_reference.py", "test_cli.py", "test_loading.py", "test_docs.py",
    "test_selftest.py", "test_best.py", "test_project.py", "test_lora.py", "test_hardware.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(SLOWEST)))


# -----------------------------------------------------------------------------
# Models


@pytest.fixture(scope="session")
def tiny() -> Path:
    return ROOT / "tiny" / "model"


@pytest.fixture(scope="session")
def wide(tmp_path_factory) -> Path:
    """A random model of phi-2's widths, saved in fp16 in two shards, as phi-2 is on the Hub.

    It has one layer: all widths and the 32 heads are phi-2's. What goes from one layer to the next
    shows in the embedded model, and more words would compute the same once more.
    """
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=2048,
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=1,
        num_attention_heads=32,
        partial_rotary_factor=0.4,
        resid_pdrop=0.0,
        bos_token_id=50256,
        eos_token_id=50256,
        dtype=torch.float16,
    )
    with torch.device("meta"):
        model = PhiForCausalLM(config)
    model = model.to_empty(device="cpu")
    # Larger than usual, so that a mistake shows. LayerNorms vary around 1.
    for name, parameter in model.named_parameters():
        parameter.data.uniform_(-0.04, 0.04)
        if "layernorm.weight" in name:
            parameter.data.add_(1)
    directory = tmp_path_factory.mktemp("wide")
    model.to(torch.float16).save_pretrained(directory, max_shard_size="100MB")
    return directory


def ours(
    directory: Path, dtype: torch.dtype, quantization: str = "none", double_quant: bool = False
) -> phi2.Phi2:
    """Our model on the CPU, in eval mode."""
    checkpoints.find(str(directory), phi2.read_config)
    model = phi2.build(str(directory))
    if quantization == "nf4":
        quant.quantize_linears(model, double_quant=double_quant)
    phi2.load_weights(model, str(directory), "cpu", dtype)
    return model.eval()


def reference(
    directory: Path, dtype: torch.dtype, quantization: str = "none", double_quant: bool = False
):
    """transformers' model on the CPU, without dropout.

    It stays in train mode: on some CPUs bitsandbytes' 4-bit layers change their weights in eval
    mode.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = {}
    if quantization == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=double_quant,
        )
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="sdpa", **options
    )
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def peft_model(base, targets=TARGETS, dropout: float = 0.0, **options):
    """PEFT's adapters of rank 8 and alpha 16 around transformers' model."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=8,
        lora_alpha=16,
        lora_dropout=dropout,
        target_modules=list(targets),
        task_type="CAUSAL_LM",
        **options,
    )
    return get_peft_model(base, config)


def peft_tensors(model) -> dict[str, Tensor]:
    """PEFT's adapter tensors, under our names."""
    return {
        name.removeprefix(lora.PEFT_PREFIX).replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }


def pair(
    directory: Path,
    dtype: torch.dtype = torch.float32,
    quantization: str = "none",
    targets=TARGETS,
    seed: int = 1,
) -> tuple:
    """Our model and PEFT's, with the same random A and B."""
    mine = ours(directory, dtype, quantization)
    lora.inject(mine, lora.LoRAConfig(dropout=0.0, targets=targets))
    theirs = peft_model(reference(directory, dtype, quantization), targets)
    their_tensors = peft_tensors(theirs)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in lora.lora_parameters(mine).items():
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(values * parameter.shape[1] ** -0.5)
            their_tensors[name].copy_(parameter)
    return mine, theirs


def load_adapter(model, directory: Path) -> lora.LoRAConfig:
    """Loads an adapter of any program, as eval.py does."""
    config = peft_files.read_config(directory, lora.LoRAConfig)
    return lora.load_adapter(model, directory, config)


# -----------------------------------------------------------------------------
# Numbers


def random_ids(model, rows: int = 3, length: int = 24, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (rows, length), generator=generator)


def logits(model: phi2.Phi2, ids: Tensor) -> Tensor:
    """Runs our model on rows of one length, ids (B, T). Returns (B, T, vocab), as transformers."""
    rows, length = ids.shape
    flat = model(ids.flatten(), packing.PackedRows([length] * rows, device=ids.device))
    return flat.unflatten(0, (rows, length))


def distance(a: Tensor, b: Tensor) -> float:
    """The norm of the difference, relative to the norm of b."""
    a = a.double()
    b = b.double()
    return ((a - b).norm() / b.norm()).item()


# -----------------------------------------------------------------------------
# Scripts and files


def in_process(module: ModuleType, *arguments, cwd: Path = ROOT) -> None:
    """Runs a script's main in this process, for tests that look into it or replace a part of it."""
    folder_before = os.getcwd()
    argv_before = sys.argv
    sys.argv = [module.__file__, *(str(argument) for argument in arguments)]
    os.chdir(cwd)
    try:
        cli.run(module.main)
    finally:
        os.chdir(folder_before)
        sys.argv = argv_before


def forget_what_was_read() -> None:
    """Lets the next test read a dataset anew that has changed under the same name."""
    find_splits.cache_clear()
    read_split.cache_clear()


def read_json(path: Path) -> dict:
    return json.loads(Path(path).read_text())


# -----------------------------------------------------------------------------
# What runs leave, and what happens to them


@pytest.fixture(scope="session", autouse=True)
def no_run_is_left():
    """A test that fails may leave a run behind, for whose end multiprocessing would wait."""
    yield
    for process in multiprocessing.active_children():
        process.kill()


@pytest.fixture(autouse=True)
def signal_handlers():
    """A run in this process leaves handlers of its own."""
    before = {number: signal.getsignal(number) for number in StopRequest.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@contextmanager
def full_disk(size: int):
    """No file can grow beyond `size` bytes: what a full disk does to a write, without filling it.

    The system sends a signal too, which Python ignores, so that the write fails with an error.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
