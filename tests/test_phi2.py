"""phi2.py's model beside transformers': keys, logits of its sizes, and what a GPU compiles."""

import shutil

import pytest
import torch
import torch._inductor.config
from conftest import distance, logits, ours, random_ids
from torch import Tensor
from torch._inductor.utils import fresh_inductor_cache

import eval as evaluation  # noqa: F401  (it replaces two of phi2's functions)
import phi2
from support import fused

# Two orders of summation in fp32, through six layers. Measured: 2e-6 and below.
TOLERANCE = 1e-5


# -----------------------------------------------------------------------------
# The model is transformers'


@pytest.mark.parametrize("name", ["tiny", "wide"])
def test_keys_and_shapes_are_those_of_transformers(name, request):
    from transformers import AutoConfig, PhiForCausalLM

    directory = request.getfixturevalue(name)
    with torch.device("meta"):
        theirs = PhiForCausalLM(AutoConfig.from_pretrained(directory)).state_dict()
    mine = phi2.build(directory).state_dict()
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        assert tensor.shape == theirs[key].shape, key


def test_phi_2_has_453_tensors_and_2_779_683_840_parameters():
    with torch.device("meta"):
        tensors = phi2.Phi2(phi2.Phi2Config()).state_dict()
    assert len(tensors) == 453
    assert sum(tensor.numel() for tensor in tensors.values()) == 2_779_683_840


@torch.no_grad()
def test_phi_1_differs_by_its_config_alone(tmp_path):
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        partial_rotary_factor=0.5,
        rope_theta=500.0,
        layer_norm_eps=1e-3,
    )
    theirs = PhiForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    mine = ours(tmp_path, torch.float32)
    ids = random_ids(mine)
    assert distance(logits(mine, ids), theirs(ids).logits) < TOLERANCE


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_residual_dropout_is_what_config_says_and_off_in_eval_mode(tiny, p):
    config = phi2.read_config(tiny)
    config.resid_pdrop = p
    torch.manual_seed(0)
    model = phi2.Phi2(config)
    ids = random_ids(model)
    model.train()
    assert torch.equal(logits(model, ids), logits(model, ids)) == (p == 0)
    model.eval()
    assert torch.equal(logits(model, ids), logits(model, ids))


@pytest.mark.skipif(not shutil.which("g++"), reason="on a CPU torch.compile needs g++")
def test_what_a_gpu_runs_as_one_kernel_is_what_is_written_here():
    """They compile as a whole, once for all numbers of tokens, and have the same bits.

    So have the gradients, and nothing is stored for them that is as large as x.
    """
    torch.manual_seed(0)
    options = {"emulate_precision_casts": True}
    choices = {"dynamic": True, "fullgraph": True, "options": options}
    rotate = phi2.rotate.__wrapped__  # eval.py has replaced both
    add = phi2.add_branches.__wrapped__
    compiled_rotate = torch.compile(rotate, **choices)
    compiled_add = torch.compile(add, **choices)
    stored = []

    def pack(tensor: Tensor) -> Tensor:
        stored.append(tensor.numel())
        return tensor

    def check(tokens: int) -> None:
        x = torch.randn(tokens, 4, 10).bfloat16().requires_grad_()
        cos, sin = torch.randn(2, tokens, 1, 3).bfloat16()
        grad = torch.randn_like(x)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            found = compiled_rotate(x, cos, sin)
        expected = rotate(x, cos, sin)
        assert torch.equal(found, expected)
        gradients = [torch.autograd.grad(y, x, grad)[0] for y in (found, expected)]
        assert torch.equal(*gradients)
        branches = torch.randn(3, tokens, 16).bfloat16()
        assert torch.equal(compiled_add(*branches), add(*branches))
        assert stored and max(stored) < x.numel()
        stored.clear()

    check(7)
    with torch.compiler.set_stance("fail_on_recompile"):
        check(12)


def test_without_a_compiler_what_is_written_runs_after_one_line(monkeypatch):
    """On a CPU: its compiler for Triton's, and tensors that call themselves a GPU's."""
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda tensor: True))
    monkeypatch.setattr(fused, "CAN_COMPILE", True)
    no_compiler = torch._inductor.config.patch({"cpp.cxx": (None, "/nonexistent")})
    x = torch.randn(5, 4, 10).bfloat16()
    cos, sin = torch.randn(2, 5, 1, 3).bfloat16()
    with no_compiler, fresh_inductor_cache():
        with pytest.warns(UserWarning, match="slower without torch.compile.*/nonexistent") as told:
            found = phi2.rotate(x, cos, sin)
            phi2.rotate(x, cos, sin)
            phi2.add_branches(x, x, x)
    assert torch.equal(found, phi2.rotate.__wrapped__(x, cos, sin))
    own = [warning for warning in told if "torch.jit" not in str(warning.message)]
    assert len(own) == 1 and "\n" not in str(own[0].message)
