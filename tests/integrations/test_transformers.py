"""The callbacks for transformers: training equals a plain loop and resumes bit for bit.

The tests run the Trainer of transformers on small images on the CPU.
"""

import importlib
import logging
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from by_hand import (
    BATCH,
    BLOCK,
    EVERY,
    PENALTIES,
    RELATIVES,
    assert_same,
    images,
    net,
    optimizer_of,
    scheduler_of,
    train_by_hand,
    train_in_two_processes,
)
from safetensors import safe_open
from torch import Tensor, nn

import wellcond as wc
from foreign import ScheduleFree, Swapping

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from transformers import ViTConfig, ViTForImageClassification  # noqa: E402

from wellcond.integrations.transformers import FILE, MonitorCallback, RegularizerCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")

WAYS = ["proximal", "gradients"]


class Classifier(nn.Module):
    def __init__(self, fail_at: int = -1) -> None:
        super().__init__()
        self.net = net()
        self.calls, self.fail_at = 0, fail_at

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls == self.fail_at:
            raise ZeroDivisionError("on purpose")
        return {"loss": nn.functional.cross_entropy(self.net(x), labels)}


def vit() -> Any:
    """A model of the library, with dropout, which draws random numbers in every step."""
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    images = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 10}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = ViTConfig(num_hidden_layers=1, hidden_dropout_prob=0.1, **sizes, **images)
        return ViTForImageClassification(config)


def examples(count: int = 96, key: str = "x") -> list[dict[str, Tensor]]:
    x, y = images(count)
    x = x if key == "x" else x.reshape(-1, 1, 8, 8)
    return [{key: one, "labels": label} for one, label in zip(x, y, strict=True)]


class InOrder(transformers.Trainer):  # type: ignore[misc]
    """Uses the examples in order, for which not all versions have an option."""

    def _get_train_sampler(self, *arguments: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer(
    tmp_path: Path,
    model: Any,
    *callbacks: Any,
    count: int = 96,
    eval_dataset: Any = None,
    kind: Any = InOrder,
    **options: Any,
) -> Any:
    quiet = {"report_to": "none", "disable_tqdm": True, "logging_strategy": "no"}
    defaults = {
        "use_cpu": True,
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 2,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
    }
    optimizer = optimizer_of(model)
    return kind(
        model,
        transformers.TrainingArguments(str(tmp_path), **{**quiet, **defaults, **options}),
        eval_dataset=eval_dataset,
        train_dataset=examples(count, "x" if hasattr(model, "net") else "pixel_values"),
        optimizers=(optimizer, scheduler_of(optimizer)),
        callbacks=list(callbacks),
    )


def callback(way: str, every: int = EVERY) -> RegularizerCallback:
    return RegularizerCallback(PENALTIES[way], mode=way, every=every, block_size=BLOCK)


def vit_callback(way: str = "proximal") -> RegularizerCallback:
    penalties = {"*.0.*.weight": wc.ConditionPenalty(20.0 if way == "proximal" else 0.1), "*": None}
    return RegularizerCallback(penalties, mode=way, every=4, block_size=BLOCK)


def check_all_obey(used: Any, path: Path) -> None:
    """Checks every checkpoint and the final model, which it saves in `end`."""
    saved = sorted(path.glob("checkpoint-*"))
    assert saved
    used.save_model(str(path / "end"))
    for folder in (*saved, path / "end"):
        assert max(kappas(folder)) <= 3.0, folder.name


def hooks(used: Any) -> int:
    return len(used.optimizer.optimizer._optimizer_step_post_hooks)


def steps(added: RegularizerCallback) -> set[int]:
    return {estimate.step for estimate in added.regularizer.measure().values()}


# --- behaviour of the Trainer itself, which differs between versions ------------------------------


def equal(model: nn.Module, other: nn.Module) -> bool:
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


@pytest.fixture(scope="module")
def short_cycle_is_a_mean(tmp_path_factory: pytest.TempPathFactory) -> bool:
    """Whether a short last cycle of an epoch is one step with the mean of its batches."""
    model, expected = Classifier(), Classifier()
    path = tmp_path_factory.mktemp("short")
    trainer(path, model, count=48, gradient_accumulation_steps=4).train()
    train_by_hand(expected.net, None, count=48, accumulate=4, short_cycle_is_a_mean=True)
    return equal(model, expected)


@pytest.fixture(scope="module")
def _resumes_exactly(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("alone")
    expected = whole(path)
    if not equal(resumed(path / "checkpoint-10"), expected):
        pytest.skip("this Trainer itself does not resume exactly after the first epoch")


# --- training equals the plain loop ---------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("clip", [0.0, 0.2], ids=["unclipped", "clipped"])
@pytest.mark.parametrize(
    "accumulate",
    # With 4 of 6 batches the last cycle is short.
    [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow), 4],
)
@pytest.mark.parametrize("way", WAYS)
def test_training_equals_plain_loop(
    tmp_path: Path,
    way: str,
    accumulate: int,
    clip: float,
    bf16: bool,
    short_cycle_is_a_mean: bool,
) -> None:
    """In mode "gradients", the penalty is added after clipping. Short cycles are means."""
    if accumulate == 4 and not short_cycle_is_a_mean:
        pytest.skip("this Trainer handles short cycles differently")
    model, added = Classifier(), callback(way)
    used = trainer(
        tmp_path,
        model,
        added,
        count=48,
        gradient_accumulation_steps=accumulate,
        max_grad_norm=clip,
        bf16=bf16,
    )
    used.train()
    expected = Classifier()
    reg = train_by_hand(
        expected.net,
        way,
        count=48,
        accumulate=accumulate,
        short_cycle_is_a_mean=True,
        clip=clip,
        bf16=bf16,
        named=expected,
    )
    assert_same(model.state_dict(), expected.state_dict())
    assert_same(added.regularizer.state_dict(), reg.state_dict())
    assert hooks(used) == 0


@pytest.mark.parametrize("way", WAYS)
def test_training_with_other_rules_equals_plain_loop(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PENALTIES, way, RELATIVES[way])
    test_training_equals_plain_loop(tmp_path, way, 1, 0.0, False, True)


def test_names_have_no_wrapper_prefix(tmp_path: Path) -> None:
    """The Trainer passes on the model that it was given, which might already be compiled."""
    added = callback("proximal")
    options = {"max_steps": 2, "torch_compile": True, "torch_compile_backend": "eager"}
    trainer(tmp_path, Classifier(), added, **options).train()
    assert added.regularizer.names == ["net.0.weight", "net.2.weight"]
    assert steps(added) == {2}
    model = Classifier()
    args: Any = transformers.TrainingArguments(str(tmp_path), use_cpu=True)
    for wrapped in (torch.compile(model), nn.DataParallel(torch.compile(model))):
        state: Any = SimpleNamespace(global_step=0, stateful_callbacks={})
        added.on_train_begin(args, state, None, model=wrapped, optimizer=optimizer_of(model))
        assert added.regularizer.names == ["net.0.weight", "net.2.weight"]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_the_same_weights(tmp_path: Path) -> None:
    """With DistributedDataParallel, in both modes. Both resume from the file of one process."""
    written = train_in_two_processes("transformers", tmp_path)
    assert written.count("['net.0.weight', 'net.2.weight']") == 4


# --- resuming -------------------------------------------------------------------------------------

# Five of six steps in the first epoch, in cycles of two batches. With every=4, one is pending.
RESUMABLE = {
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "save_steps": 5,
    "kind": transformers.Trainer,
    "max_grad_norm": 1.0,
}


def whole(path: Path, *callbacks: Any) -> Any:
    """The model after complete training, which leaves checkpoint-5, -10 and -12 in path."""
    used = trainer(path, vit(), *callbacks, **RESUMABLE)
    used.train()
    return used.model


def resumed(checkpoint: Path, *callbacks: Any, output: Path | None = None) -> Any:
    """The model after training that resumes from a checkpoint.

    The weights are loaded first because the Trainer of transformers 5 does not restore a ViT: it
    saves the model under names of an older version.
    """
    model = ViTForImageClassification.from_pretrained(checkpoint)
    used = trainer(output or checkpoint.parent, model, *callbacks, **RESUMABLE)
    used.train(resume_from_checkpoint=str(checkpoint))
    return used.model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the checkpoints of training in mode "proximal"; copy it to change it."""
    path = tmp_path_factory.mktemp("saved")
    whole(path, vit_callback())
    return path


@pytest.mark.usefixtures("_resumes_exactly")
@pytest.mark.parametrize("step", [5, 10])
@pytest.mark.parametrize("way", WAYS)
def test_resumed_training_equals_uninterrupted_training(
    tmp_path: Path, way: str, step: int
) -> None:
    added, again = vit_callback(way), vit_callback(way)
    expected = whole(tmp_path, added)
    model = resumed(tmp_path / f"checkpoint-{step}", again)
    assert_same(model.state_dict(), expected.state_dict())
    assert_same(again.regularizer.state_dict(), added.regularizer.state_dict())
    assert steps(again) == {12}


@pytest.mark.usefixtures("_resumes_exactly")
def test_training_resumes_twice(tmp_path: Path) -> None:
    """Each run stores its own identifier in its checkpoints."""
    expected = whole(tmp_path, vit_callback())
    resumed(tmp_path / "checkpoint-5", vit_callback())
    model = resumed(tmp_path / "checkpoint-10", vit_callback())
    assert_same(model.state_dict(), expected.state_dict())


@pytest.mark.usefixtures("_resumes_exactly")
def test_custom_model_resumes_without_loading_it_first(tmp_path: Path) -> None:
    options = {**RESUMABLE, "save_steps": 4}
    expected, model, again = Classifier(), Classifier(), callback("proximal")
    trainer(tmp_path, expected, callback("proximal"), **options).train()
    trainer(tmp_path, model, again, **options).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-8")
    )
    assert_same(model.state_dict(), expected.state_dict())
    assert steps(again) == {12}


def test_error_names_weights_that_were_not_restored(saved: Path, tmp_path: Path) -> None:
    """The Trainer itself only warns, and trains from random weights."""
    with safe_open(saved / "checkpoint-5" / "model.safetensors", "pt") as file:
        if set(file.keys()) == vit().state_dict().keys():
            pytest.skip("this Trainer saves a ViT under its own names, and restores it")
    used = trainer(tmp_path, vit(), vit_callback(), **RESUMABLE)
    used.args.resume_from_checkpoint = str(saved / "checkpoint-5")
    with pytest.raises(ValueError, match=r"6 differ from the saved .* vit\.layers\.0"):
        used.train(resume_from_checkpoint=used.args.resume_from_checkpoint)


def test_checkpoint_outside_output_dir_is_found_by_argument(tmp_path: Path, saved: Path) -> None:
    moved, output = tmp_path / "elsewhere", tmp_path / "output"
    shutil.copytree(saved / "checkpoint-5", moved)
    with pytest.raises(ValueError, match=r"outside output_dir, also pass its directory as Tra"):
        resumed(moved, vit_callback(), output=output)
    added = vit_callback()
    model = ViTForImageClassification.from_pretrained(moved)
    options = {**RESUMABLE, "resume_from_checkpoint": str(moved)}
    trainer(output, model, added, **options).train(resume_from_checkpoint=str(moved))
    assert steps(added) == {12}


def test_file_of_another_step_is_not_used(tmp_path: Path, saved: Path) -> None:
    """A wrong directory in the arguments does not hide the right one."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    added, checkpoint = vit_callback(), tmp_path / "checkpoint-10"
    model = ViTForImageClassification.from_pretrained(checkpoint)
    options = {**RESUMABLE, "resume_from_checkpoint": str(tmp_path / "checkpoint-5")}
    trainer(tmp_path, model, added, **options).train(resume_from_checkpoint=str(checkpoint))
    assert steps(added) == {12}


def test_file_of_another_run_is_not_used(tmp_path: Path, saved: Path) -> None:
    """output_dir can contain a checkpoint of the same step from another run."""
    whole(tmp_path, vit_callback())
    with pytest.raises(ValueError, match="is missing or belongs to another checkpoint"):
        resumed(saved / "checkpoint-5", vit_callback(), output=tmp_path)


def test_error_names_missing_or_damaged_file(tmp_path: Path, saved: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "checkpoint-5" / FILE
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=f"{path} is damaged.*Resume from the previous checkpoint"):
        resumed(path.parent, vit_callback())
    path.unlink()
    with pytest.raises(ValueError, match=f"{path} is missing.*resume from the previous checkpoint"):
        resumed(path.parent, vit_callback())


def test_checkpoint_saved_without_callback_is_refused(tmp_path: Path) -> None:
    whole(tmp_path)
    with pytest.raises(ValueError, match="was saved without this callback"):
        resumed(tmp_path / "checkpoint-5", vit_callback())


def test_only_saving_process_writes_and_search_does_not(tmp_path: Path, caplog) -> None:
    model = net()
    added = callback("proximal")
    added.regularizer = wc.Regularizer(model, wc.ConditionPenalty(1.0))
    cases = [(False, False, True), (True, True, True), (True, False, False)]
    for saves, searches, present in cases:
        directory = tmp_path / f"{saves}-{searches}"
        args: Any = SimpleNamespace(should_save=saves, output_dir=str(directory))
        state: Any = SimpleNamespace(global_step=7, is_hyper_param_search=searches)
        if present:
            (directory / "checkpoint-7").mkdir(parents=True)
        with caplog.at_level(logging.WARNING, "wellcond"):
            added.on_save(args, state, None, model=model)
        assert not list(tmp_path.rglob(f"{FILE}*"))
        assert ("was not saved" in caplog.text) == (not present)


# --- state after training -------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_second_training_starts_with_new_state(tmp_path: Path, way: str) -> None:
    added = callback(way)
    for _ in range(2):
        model = Classifier()
        trainer(tmp_path, model, added).train()
        expected = Classifier()
        reg = train_by_hand(expected.net, way, named=expected)
        assert_same(model.state_dict(), expected.state_dict())
        assert_same(added.regularizer.state_dict(), reg.state_dict())
        assert added.regularizer.attachments == []


def test_trainer_trains_again_after_exception(tmp_path: Path) -> None:
    """The optimizer is the same, and has only one regulariser at a time."""
    added = callback("proximal")
    used = trainer(tmp_path, Classifier(fail_at=6), added, num_train_epochs=1)
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        used.train()
    assert steps(added) == {5}
    assert hooks(used) == 1
    for _ in range(2):
        used.train()
        assert steps(added) == {12}
        assert hooks(used) == 0


@pytest.mark.parametrize("way", WAYS)
def test_only_weights_change(tmp_path: Path, way: str) -> None:
    """Keys, modes, hooks, random numbers and files equal those without the callback."""
    seen = []
    for index, callbacks in enumerate(([], [vit_callback(way)])):
        path = tmp_path / str(index)
        with torch.random.fork_rng(devices=[]):
            used = trainer(path, vit(), *callbacks, **RESUMABLE)
            used.train()
            state = torch.get_rng_state()
        model = used.model
        of_modules = [(m.training, m._forward_hooks, m._forward_pre_hooks) for m in model.modules()]
        files = {str(file.relative_to(path)) for file in path.rglob("*")}
        seen.append((list(model.state_dict()), of_modules, state.tolist(), files))
    assert seen[0][:3] == seen[1][:3]
    assert seen[1][3] - seen[0][3] == {f"checkpoint-{step}/{FILE}" for step in (5, 10, 12)}


# --- errors ---------------------------------------------------------------------------------------


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match='`mode` must be "proximal" or "gradients", got None'):
        RegularizerCallback(wc.ConditionPenalty(1.0), mode=None)  # type: ignore[arg-type]
    for limit in (
        wc.ConditionLimit(10),
        {"*weight": wc.ConditionPenalty(1.0), "*": wc.IsometryStep()},
    ):
        with pytest.raises(ValueError, match=r'`mode` must be "proximal" for .*no gradient'):
            RegularizerCallback(limit, mode="gradients")


def test_a_second_callback_is_refused(tmp_path: Path) -> None:
    used = trainer(tmp_path, Classifier(), callback("proximal"), callback("gradients"))
    with pytest.raises(ValueError, match="`callbacks` must contain only one RegularizerCallback"):
        used.train()


def test_error_of_regularizer_stops_training(tmp_path: Path) -> None:
    added = RegularizerCallback({"head.*": wc.ConditionPenalty(1.0), "*": None})
    with pytest.raises(ValueError, match=r'the pattern "head\.\*" matches no parameter'):
        trainer(tmp_path, Classifier(), added).train()


def test_deepspeed_and_scaled_gradients_are_refused() -> None:
    """Both need a GPU, so the test calls the hook instead of the Trainer."""
    args: Any = SimpleNamespace(deepspeed_plugin=object(), fp16=False, max_grad_norm=1.0)
    with pytest.raises(ValueError, match="`deepspeed` must be off"):
        callback("proximal").on_train_begin(args, None, None)
    args = SimpleNamespace(deepspeed_plugin=None, fp16=True, max_grad_norm=0.0)
    with pytest.raises(ValueError, match=r"with fp16 and max_grad_norm=0\.0 they may still be"):
        callback("gradients").on_train_begin(args, None, None)


def test_import_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if re.match(r"transformers(\.|$)|wellcond\.integrations\.transformers$", name):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'wellcond\[transformers\]'"):
        importlib.import_module("wellcond.integrations.transformers")


# --- hard limits, logs ----------------------------------------------------------------------------


def kappas(folder: Path) -> list[float]:
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    found = [float(wc.condition_number(w)) for name, w in state.items() if name.endswith("weight")]
    assert len(found) == 2
    return found


@pytest.mark.parametrize(
    "when",
    [
        {"save_strategy": "steps", "save_steps": 5},
        {"save_strategy": "epoch"},
        {
            "save_strategy": "best",
            "eval_strategy": "epoch",
            "metric_for_best_model": "loss",
            "load_best_model_at_end": False,
        },
    ],
    ids=["steps", "epochs", "best"],
)
def test_hard_limits_hold_in_every_checkpoint_and_at_the_end(
    when: dict[str, Any], tmp_path: Path
) -> None:
    model = Classifier()
    added = RegularizerCallback(wc.ConditionLimit(3.0), every=10**6)
    used = trainer(tmp_path, model, added, eval_dataset=examples(16), **when)
    used.train()
    check_all_obey(used, tmp_path)


def schedulefree(name: str) -> Any:
    package = pytest.importorskip("schedulefree", reason="schedulefree is not installed")
    return getattr(package, f"{name}ScheduleFree")


MODES = [
    pytest.param(lambda: ScheduleFree, id="ScheduleFree"),
    pytest.param(lambda: Swapping, id="Swapping"),
    pytest.param(lambda: schedulefree("AdamW"), id="AdamW"),
    pytest.param(lambda: schedulefree("SGD"), id="SGD", marks=pytest.mark.slow),
    pytest.param(lambda: schedulefree("RAdam"), id="RAdam", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("kind", MODES)
@pytest.mark.parametrize("evaluate", [False, True])
def test_limits_hold_for_weights_in_eval_mode_of_optimizer(
    kind: Any, evaluate: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The optimizers of schedulefree and heavyball evaluate other weights than they step."""

    class Looking(InOrder):
        seen: ClassVar[list[float]] = []

        def evaluation_loop(self, *arguments: Any, **options: Any) -> Any:
            result = super().evaluation_loop(*arguments, **options)
            assert not self.optimizer.param_groups[0]["train_mode"]
            self.seen += [float(wc.condition_number(self.model.net[i].weight)) for i in (0, 2)]
            return result

    model = Classifier()
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 5}
    if evaluate:
        options |= {"eval_strategy": "steps", "eval_steps": 5, "load_best_model_at_end": True}
    used = trainer(
        tmp_path,
        model,
        RegularizerCallback(wc.ConditionLimit(3.0), every=10**6),
        kind=Looking,
        eval_dataset=examples(16),
        **options,
    )
    used.optimizer = kind()(model.parameters(), lr=0.1)
    used.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(used.optimizer, 1.0)
    used.train()
    check_all_obey(used, tmp_path)
    assert len(Looking.seen) == 10 * evaluate
    assert all(one <= 3.0 for one in Looking.seen)
    if evaluate:
        best = Path(used.state.best_model_checkpoint)
        assert kappas(best) == kappas(tmp_path / "end")
    assert "train mode" not in caplog.text


@pytest.mark.usefixtures("_resumes_exactly")
def test_training_with_schedulefree_option_of_trainer_resumes(tmp_path: Path) -> None:
    """Training that was saved in eval mode resumes in train mode, bit for bit."""
    schedulefree("AdamW")

    def run(folder: str, **options: Any) -> nn.Module:
        model = Classifier()
        added = RegularizerCallback(wc.ConditionLimit(3.0))
        saving = {"save_strategy": "steps", "save_steps": 5, "optim": "schedule_free_adamw"}
        used = trainer(tmp_path / folder, model, added, lr_scheduler_type="constant", **saving)
        used.optimizer = used.lr_scheduler = None
        used.train(**options)
        assert type(used.optimizer.optimizer).__name__ == "AdamWScheduleFree"
        check_all_obey(used, tmp_path / folder)
        return model

    whole = run("one")
    shutil.rmtree(tmp_path / "one" / "end")
    for later in (tmp_path / "one").glob("checkpoint-1*"):
        shutil.rmtree(later)
    resumed = run("one", resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-5"))
    assert_same(whole.state_dict(), resumed.state_dict())


def test_invalid_rules_are_refused_in_constructor() -> None:
    for nothing in (None, 10, "*"):
        with pytest.raises(TypeError, match=r"`rules` must be a rule or map.*MonitorCallback"):
            RegularizerCallback(nothing)  # type: ignore[arg-type]


def test_warning_if_later_callback_requests_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Late(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_save = state.global_step == 3

    added = RegularizerCallback(wc.ConditionLimit(3.0), every=10**6)
    for callbacks, warned in (([Late(), added], 0), ([added, Late()], 1)):
        caplog.clear()
        trainer(tmp_path / str(warned), Classifier(), *callbacks).train()
        said = [
            r for r in caplog.records if "before the hard limits were applied" in r.getMessage()
        ]
        assert len(said) == warned


@pytest.mark.parametrize("target", ["logs", "callable", "nothing"])
def test_logs_contain_aggregates_and_worst_weights(target: str, tmp_path: Path) -> None:
    sent: list[tuple[int, dict[str, float]]] = []
    log: Any = {"logs": True, "nothing": False}.get(target, lambda v, step: sent.append((step, v)))
    added = RegularizerCallback(PENALTIES["proximal"], every=EVERY, block_size=BLOCK, log=log)
    used = trainer(tmp_path, Classifier(), added, logging_strategy="steps", logging_steps=4)
    used.train()
    history = [one for one in used.state.log_history if "loss" in one]
    assert [one["step"] for one in history] == [4, 8, 12, 16, 20, 24]
    for one in history:
        assert ("wellcond/worst/net.0.weight/stable_rank_share" in one) == (target != "nothing")
    assert [step for step, _ in sent] == ([4, 8, 12, 16, 20, 24] if target == "callable" else [])


# --- integrations of the Trainer for reports ------------------------------------------------------


@pytest.mark.parametrize("kind", ["regularizer", "monitor"])
def test_tensorboard_of_trainer_receives_values(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    sent: list[int] = []
    if kind == "regularizer":
        added: Any = RegularizerCallback(PENALTIES["proximal"], every=EVERY, block_size=BLOCK)
    else:
        added = MonitorCallback(condition_numbers=True, log=lambda values, step: sent.append(step))
    options = {"logging_strategy": "steps", "logging_steps": 4, "report_to": ["tensorboard"]}
    used = trainer(tmp_path, Classifier(), added, **options)
    used.train()
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    logged = events.Scalars("train/wellcond/sigma_max/largest")
    assert [one.step for one in logged] == [4, 8, 12, 16, 20, 24]
    history = [one for one in used.state.log_history if "loss" in one]
    assert [one.value for one in logged] == pytest.approx(
        [one["wellcond/sigma_max/largest"] for one in history]
    )
    if kind == "monitor":
        assert sent == [4, 8, 12, 16, 20, 24]
        assert "train/wellcond/condition_number/largest" in events.Tags()["scalars"]


def test_reporting_callbacks_receive_each_value_once(tmp_path: Path) -> None:
    """A callback that precedes those of the user, as that of wandb does."""
    seen: list[dict[str, Any]] = []

    class Reporting(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
            seen.append(dict(logs))

    counted: list[int] = []
    added = MonitorCallback(log=lambda values, step: counted.append(step))
    used = trainer(
        tmp_path, Classifier(), Reporting(), added, logging_strategy="steps", logging_steps=8
    )
    for _ in range(2):
        used.train()
    assert counted == [8, 16, 24] * 2
    assert [("wellcond/sigma_max/largest" in one) for one in seen] == [
        "loss" in one for one in seen
    ]
    assert len(used.callback_handler.callbacks) == len({*map(id, used.callback_handler.callbacks)})
    assert sum(type(one).__name__ == "_First" for one in used.callback_handler.callbacks) == 1


def test_monitor_changes_nothing(tmp_path: Path) -> None:
    models = [Classifier(), Classifier()]
    models[1].load_state_dict(models[0].state_dict())
    trainer(tmp_path / "0", models[0], logging_strategy="steps", logging_steps=4).train()
    watched = MonitorCallback("*.weight", layers=True)
    used = trainer(tmp_path / "1", models[1], watched, logging_strategy="steps", logging_steps=4)
    used.train()
    assert equal(*models)
    assert watched.monitor is not None
    (last, *_) = [one for one in reversed(used.state.log_history) if "loss" in one]
    sigma = torch.linalg.matrix_norm(models[1].get_parameter(watched.monitor.names[0]).detach(), 2)
    assert last[f"wellcond/weights/{watched.monitor.names[0]}/sigma_max"] == pytest.approx(
        float(sigma), rel=1e-3
    )
