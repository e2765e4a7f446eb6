"""The statements of docs/which-weights.md, with the real packages if they are installed.

Each row names the weights for which a limit holds. If a row says that a limit does not hold for
others, a test shows that it does not.
"""

import importlib
import importlib.util
import logging
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import wellcond as wc

pytestmark = pytest.mark.slow

K = 3.0
LIMIT = wc.ConditionLimit(K)


def net(width: int = 32) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))


def batches(count: int, width: int = 32) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    teacher = torch.randn(10, width, generator=generator)
    for _ in range(count):
        x = torch.randn(16, width, generator=generator)
        yield x, (x @ teacher.T).argmax(1)


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y)


def train(model: nn.Module, optimizer: Any, count: int = 30) -> None:
    for x, y in batches(count):
        optimizer.zero_grad()
        loss(model, x, y).backward()
        optimizer.step()


def kappas(model: nn.Module) -> list[float]:
    weights = [p.detach() for p in model.parameters() if p.ndim == 2]
    return [float(wc.condition_number(weight)) for weight in weights]


def obeys(model: nn.Module) -> bool:
    return max(kappas(model)) <= K


def real(module: str, name: str) -> Any:
    pytest.importorskip(module, reason=f"{module} is not installed")
    return getattr(importlib.import_module(module), name)


def of_timm(module: str, name: str) -> Any:
    """A module of timm without the others, which need torchvision."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    spec = importlib.util.find_spec("timm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = f"{spec.submodule_search_locations[0]}/{module}"
    with pytest.MonkeyPatch.context() as patch:
        for part in ("timm", f"timm.{module}"):
            parent = types.ModuleType(part)
            parent.__path__ = [folder if part != "timm" else folder.rpartition("/")[0]]
            patch.setitem(sys.modules, part, parent)
        return getattr(importlib.import_module(f"timm.{module}.{name}"), _NAMES[name])


_NAMES = {"lookahead": "Lookahead", "model_ema": "ModelEmaV3"}


# --- optimizers with an eval mode -----------------------------------------------------------------


def heavyball(name: str) -> Any:
    kind = real("heavyball", name)
    importlib.import_module("heavyball.utils").compile_mode = None
    return kind


WITH_MODES = {
    "schedulefree-AdamW": lambda: real("schedulefree", "AdamWScheduleFree"),
    "schedulefree-SGD": lambda: real("schedulefree", "SGDScheduleFree"),
    "schedulefree-RAdam": lambda: real("schedulefree", "RAdamScheduleFree"),
    "heavyball-SFAdamW": lambda: heavyball("SFAdamW"),
    "heavyball-MSAMLaProp": lambda: heavyball("MSAMLaProp"),
    "pytorch_optimizer-SPlus": lambda: real("pytorch_optimizer", "SPlus"),
}


@pytest.mark.parametrize("name", WITH_MODES)
def test_enforce_after_eval_limits_the_saved_weights(
    name: str, said: Callable[[], list[str]]
) -> None:
    model = net()
    optimizer = WITH_MODES[name]()(model.parameters(), lr=1e-2)
    reg = wc.Regularizer(model, LIMIT)
    reg.attach(optimizer)
    optimizer.train()
    for step, (x, y) in enumerate(batches(30)):
        optimizer.zero_grad()
        loss(model, x, y).backward()
        optimizer.step()
        assert step < 20 or max(kappas(model)) <= 1.05 * K
    optimizer.eval()
    reg.enforce()
    assert obeys(model)
    optimizer.train()
    train(model, optimizer, 5)
    optimizer.eval()
    reg.enforce()
    assert obeys(model)
    # heavyball stores no mode before the first call of eval(); here it was called.
    assert not said()


def test_enforce_in_train_mode_does_not_limit_eval_weights() -> None:
    model = net()
    optimizer = WITH_MODES["heavyball-MSAMLaProp"]()(model.parameters(), lr=1e-3)
    reg = wc.Regularizer(model, LIMIT)
    reg.attach(optimizer)
    train(model, optimizer)
    reg.enforce()
    assert obeys(model)
    optimizer.eval()
    assert max(kappas(model)) > 10 * K


# --- averages -------------------------------------------------------------------------------------


def averaged(model: nn.Module) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))


class OfEmaPytorch:
    def __init__(self, model: nn.Module) -> None:
        kind = real("ema_pytorch", "EMA")
        self.ema = kind(model, beta=0.9, update_after_step=0, update_every=1)
        self.module = self.ema.ema_model

    def update_parameters(self, model: nn.Module) -> None:
        self.ema.update()


class OfTimm:
    def __init__(self, model: nn.Module) -> None:
        self.ema = of_timm("utils", "model_ema")(model, decay=0.9)
        self.module = self.ema.module

    def update_parameters(self, model: nn.Module) -> None:
        self.ema.update(model)


@pytest.mark.parametrize("kind", [AveragedModel, averaged, OfEmaPytorch, OfTimm])
def test_average_satisfies_the_limit_only_after_enforce(kind: Any) -> None:
    """Each of the averaged weights is within the limit."""
    model = net()
    average = kind(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    wc.Regularizer(model, wc.ConditionLimit(1.1)).attach(optimizer, every=1)
    for x, y in batches(30):
        optimizer.zero_grad()
        loss(model, x, y).backward()
        optimizer.step()
        assert max(kappas(model)) <= 1.1
        average.update_parameters(model)
    assert max(kappas(average.module)) > 1.1
    trained = [p.detach().clone() for p in model.parameters()]
    wc.enforce(average.module, wc.ConditionLimit(1.1))
    assert max(kappas(average.module)) <= 1.1
    torch.testing.assert_close(trained, [p.detach() for p in model.parameters()], rtol=0, atol=0)


# --- wrappers of optimizers -----------------------------------------------------------------------


def test_sam_with_closure_and_two_steps() -> None:
    kind = real("pytorch_optimizer", "SAM")
    for two_steps in (False, True):
        model = net()
        optimizer = kind(model.parameters(), torch.optim.Adam, lr=1e-2)
        reg = wc.Regularizer(model, LIMIT)
        reg.attach(optimizer.base_optimizer, every=1)
        for x, y in batches(10):
            loss(model, x, y).backward()
            if two_steps:
                optimizer.first_step(zero_grad=True)
                loss(model, x, y).backward()
                optimizer.second_step(zero_grad=True)
            else:

                def again(model: nn.Module = model, x: Tensor = x, y: Tensor = y) -> Tensor:
                    value = loss(model, x, y)
                    value.backward()
                    return value

                optimizer.step(again)
                optimizer.zero_grad()
            assert obeys(model)


def test_attach_to_pytorch_optimizer_lookahead() -> None:
    model = net()
    optimizer = real("pytorch_optimizer", "Lookahead")(torch.optim.Adam(model.parameters(), 1e-2))
    wc.Regularizer(model, LIMIT).attach(optimizer, every=1)
    for _ in range(12):
        train(model, optimizer, 1)
        assert obeys(model)


def test_attach_to_timm_lookahead_after_zero_grad() -> None:
    model = net()
    optimizer = of_timm("optim", "lookahead")(torch.optim.Adam(model.parameters(), 1e-2))
    reg = wc.Regularizer(model, LIMIT)
    with pytest.raises(ValueError, match=r"Call optimizer\.zero_grad\(\) before"):
        reg.attach(optimizer)
    optimizer.zero_grad()
    reg.attach(optimizer, every=1)
    for _ in range(12):
        train(model, optimizer, 1)
        assert obeys(model)


def test_torch_optimizer_lookahead_moves_weights_after_the_limit() -> None:
    model = net()
    inner = torch.optim.Adam(model.parameters(), 1e-2)
    optimizer = real("torch_optimizer", "Lookahead")(inner, k=3, alpha=0.5)
    reg = wc.Regularizer(model, LIMIT)
    with pytest.raises(TypeError, match="attach to the optimizer that it wraps"):
        reg.attach(optimizer)
    reg.attach(inner, every=1)
    seen = []
    for x, y in batches(12):
        inner.zero_grad()
        loss(model, x, y).backward()
        optimizer.step()
        seen.append(max(kappas(model)))
    assert max(seen) > K
    reg.enforce()
    assert obeys(model)


def test_attach_to_several_optimizers(said: Callable[[], list[str]]) -> None:
    model = net()
    optimizers = [torch.optim.Adam(model[i].parameters(), 1e-2) for i in (0, 2)]
    reg = wc.Regularizer(model, LIMIT)
    for optimizer in optimizers:
        reg.attach(optimizer, every=1)
    for x, y in batches(10):
        model.zero_grad()
        loss(model, x, y).backward()
        for optimizer in optimizers:
            optimizer.step()
        assert obeys(model)
    assert not said()


def test_attach_to_optimizers_within_backward() -> None:
    model = net()
    optimizers = {p: torch.optim.Adam([p], 1e-2) for p in model.parameters()}

    def step(parameter: Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(step)
    reg = wc.Regularizer(model, LIMIT)
    for name in reg.names:
        reg.attach(optimizers[model.get_parameter(name)], every=1)
    for x, y in batches(10):
        loss(model, x, y).backward()
        assert obeys(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_attach_to_torch_helper_for_optimizers_within_backward() -> None:
    from torch.distributed.optim import _apply_optimizer_in_backward

    model = net()
    _apply_optimizer_in_backward(torch.optim.Adam, model.parameters(), {"lr": 1e-2})
    reg = wc.Regularizer(model, LIMIT)
    for name in reg.names:
        (optimizer,) = model.get_parameter(name)._in_backward_optimizers
        reg.attach(optimizer, every=1)
    for x, y in batches(10):
        loss(model, x, y).backward()
        assert obeys(model)


MORE = {
    "lion-pytorch": lambda p: real("lion_pytorch", "Lion")(p, lr=1e-3),
    "prodigyopt": lambda p: real("prodigyopt", "Prodigy")(p, lr=1.0),
    "dadaptation": lambda p: real("dadaptation", "DAdaptAdam")(p, lr=1.0),
    "dog": lambda p: real("dog", "DoG")(p, reps_rel=1e-4),
    "bitsandbytes": lambda p: real("bitsandbytes.optim", "AdamW8bit")(
        p, lr=1e-3, min_8bit_size=256
    ),
    "galore_torch": lambda p: real("galore_torch", "GaLoreAdamW")(
        [
            {"params": [q for q in p if q.ndim == 1]},
            {
                "params": [q for q in p if q.ndim == 2],
                **{"rank": 4, "update_proj_gap": 5, "scale": 1.0, "proj_type": "std"},
            },
        ],
        lr=1e-2,
        no_deprecation_warning=True,
    ),
    "SOAP": lambda p: real("pytorch_optimizer", "SOAP")(p, lr=3e-3),
    "Adafactor": lambda p: real("transformers.optimization", "Adafactor")(
        p, lr=None, relative_step=True, warmup_init=True
    ),
}


@pytest.mark.frameworks
@pytest.mark.parametrize("name", MORE)
def test_attach_to_other_optimizers(name: str) -> None:
    model = net()
    optimizer = MORE[name](list(model.parameters()))
    wc.Regularizer(model, LIMIT).attach(optimizer, every=1)
    for _ in range(20):
        train(model, optimizer, 1)
        assert obeys(model)


def test_skipped_scaler_steps_do_not_affect_the_limit() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120, growth_interval=5)
    attachment = wc.Regularizer(model, LIMIT).attach(optimizer, every=1)
    for x, y in batches(40):
        optimizer.zero_grad()
        scaler.scale(loss(model, x * 1e3, y)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert obeys(model) or attachment.steps == 0
    assert 0 < attachment.steps < 40


def test_compiled_step_applies_limits() -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    wc.Regularizer(model, LIMIT).attach(optimizer, every=1)
    step = torch.compile(optimizer.step, backend="eager")
    for x, y in batches(10):
        optimizer.zero_grad()
        loss(model, x, y).backward()
        step()
        assert obeys(model)
    torch._dynamo.reset()


# --- layers whose stored weight is not the effective weight ---------------------------------------


@pytest.mark.frameworks
def test_limits_on_lora_factors_do_not_bound_the_merged_weight(
    caplog: pytest.LogCaptureFixture,
) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = net()
    before = kappas(base)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["0"], lora_alpha=64))
    reg = wc.Regularizer(model, LIMIT)
    assert all("lora_" in name for name in reg.names)
    assert "each a factor of LoRA" in caplog.text
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    reg.attach(optimizer, every=1)
    train(model, optimizer)
    reg.enforce()
    factors = [p for name, p in model.named_parameters() if "lora_" in name]
    assert len(factors) == 2
    assert all(float(wc.condition_number(p.detach())) <= K for p in factors)
    merged = model.merge_and_unload()
    assert kappas(merged)[0] > K
    assert kappas(merged)[1] == before[1]
    wc.enforce(merged, LIMIT)
    assert obeys(merged)


def test_qat_float_weight_satisfies_the_limit(
    said: Callable[[], list[str]],
) -> None:
    quantization = pytest.importorskip("torch.ao.quantization")
    model = net()
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    quantization.prepare_qat(model.train(), inplace=True)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    reg = wc.Regularizer(model, LIMIT)
    reg.attach(optimizer, every=1)
    train(model, optimizer, 10)
    reg.enforce()
    assert obeys(model)
    acting = [layer.weight_fake_quant(layer.weight).detach() for layer in (model[0], model[2])]
    assert max(float(wc.condition_number(weight)) for weight in acting) > K
    assert any("trained for quantisation" in message for message in said())


def test_torchao_qat() -> None:
    qat = pytest.importorskip("torchao.quantization.qat", reason="torchao is not installed")
    quantize = real("torchao.quantization", "quantize_")
    model = net()
    configuration = qat.IntxFakeQuantizeConfig(torch.int4, group_size=16)
    quantize(model, qat.QATConfig(weight_config=configuration, step="prepare"))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    reg = wc.Regularizer(model, LIMIT)
    reg.attach(optimizer, every=1)
    train(model, optimizer, 10)
    reg.enforce()
    assert obeys(model)
    acting = [model[i].weight_fake_quantizer(model[i].weight).detach() for i in (0, 2)]
    assert max(float(wc.condition_number(weight)) for weight in acting) > K


def test_limit_fills_zeros_of_a_pruned_weight(said: Callable[[], list[str]]) -> None:
    model = net()
    prune.l1_unstructured(model[0], "weight", 0.8)
    reg = wc.Regularizer(model, LIMIT)
    assert reg.names == ["2.weight"]  # while the mask is active
    prune.remove(model[0], "weight")
    assert float((model[0].weight == 0).double().mean()) >= 0.79
    wc.Regularizer(model, LIMIT).enforce()
    assert obeys(model)
    assert float((model[0].weight == 0).double().mean()) < 0.01
    assert any("exact zeros, as after pruning" in message for message in said())


@pytest.mark.parametrize(
    "added",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        nn.utils.spectral_norm,
        parametrizations.orthogonal,
    ],
)
def test_computed_weights_are_skipped_until_parametrization_is_removed(added: Any) -> None:
    model = net()
    added(model[0])
    assert wc.Regularizer(model, LIMIT).names == ["2.weight"]
    if parametrize.is_parametrized(model[0]):
        parametrize.remove_parametrizations(model[0], "weight")
    else:
        nn.utils.remove_spectral_norm(model[0])
    reg = wc.Regularizer(model, LIMIT)
    assert reg.names == ["0.weight", "2.weight"]
    reg.enforce()
    assert obeys(model)


def test_kernel_limit_does_not_bound_the_convolution() -> None:
    """All taps are equal: sigma_1 of the operator is sqrt(k_h k_w) times that of the kernel."""
    layer = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(4, 4, 1, 1).expand(4, 4, 3, 3))
    wc.Regularizer(layer, wc.SingularValueLimit(upper=1.0)).enforce()
    kernel = layer.weight.detach().flatten(1)
    assert float(torch.linalg.matrix_norm(kernel, 2)) <= 1.0
    size = 24
    symbol = torch.fft.fft2(layer.weight.detach().double(), (size, size))
    acting = float(torch.linalg.matrix_norm(symbol.permute(2, 3, 0, 1), 2).max())
    assert 2.9 < acting <= 3.0 + 1e-5


def test_weight_unfrozen_later_is_skipped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = net()
    model[0].weight.requires_grad_(False)
    reg = wc.Regularizer(model, LIMIT)
    model[0].weight.requires_grad_(True)
    with caplog.at_level(logging.WARNING, "wellcond"):
        reg.enforce()
    assert reg.names == ["2.weight"]
    assert kappas(model)[0] > K >= kappas(model)[1]


def test_enforce_after_cast_holds_in_the_new_dtype() -> None:
    model = net()
    wc.Regularizer(model, LIMIT).enforce()
    model.bfloat16()
    assert max(kappas(model.float())) > K  # bfloat16 numbers are float32 numbers
    model.bfloat16()
    wc.enforce(model, LIMIT)
    assert max(kappas(model.float())) <= K
