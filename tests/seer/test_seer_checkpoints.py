"""Runs that are killed, that run out of disk or into NaN, that are told to stop, or are continued by another run."""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from seer import InputError, RunStopped, SeerConfig, SeerTrainer, run_training
from seer.checkpoints import UNFINISHED
from seer.cli import main

STEPS, SAVE_STEPS = 14, 3
ELSEWHERE = tempfile.mkdtemp()
"""An empty folder: here Python finds packages as they are installed, not our sources or what else lies about."""
KILLED = -signal.SIGKILL


@pytest.fixture
def flags(model_folder: Path, data_file: Path, tmp_path: Path) -> list[str]:
    """Steps in four epochs: 15 samples in batches of four. Everything that has a state of its own takes part."""
    options = {
        "model": model_folder,
        "data": data_file,
        "output_dir": tmp_path / "out",
        "max_steps": STEPS,
        "save_steps": SAVE_STEPS,
        "per_device_train_batch_size": 4,
        "lora_dropout": 0.2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 4,
        "memory_bank_size": 10,
        "disable_tqdm": "true",
        "use_cpu": "true",
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def run_to_the_end(flags: list[str]) -> None:
    """`seer train` in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "seer", "train", *flags]
    subprocess.run(command, check=True, capture_output=True, env=environment, cwd=ELSEWHERE)


def run_and_die(flags: list[str], when: str) -> None:
    """`seer train` in a process of its own that kills itself as `when`, a statement, says."""
    program = textwrap.dedent(
        """
        import os, signal, sys
        import torch
        from transformers import TrainerCallback
        from seer import SeerTrainer
        from seer.cli import main

        def die():
            os.kill(os.getpid(), signal.SIGKILL)

        def before(owner, name, action):
            original = getattr(owner, name)
            def replacement(*args, **kwargs):
                action(*args, **kwargs)
                return original(*args, **kwargs)
            setattr(owner, name, replacement)
        """
    )
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", f"{program}\n{when}\nsys.exit(main(['train', *sys.argv[1:]]))", *flags]
    outcome = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=ELSEWHERE)
    assert outcome.returncode == KILLED, outcome.stderr


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_a_run_killed_twice_ends_with_the_adapter_of_one_left_alone(flags, tmp_path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    step = random.randrange(SAVE_STEPS + 1, 2 * SAVE_STEPS)  # which one must not matter
    run_and_die(
        flags, f"before(SeerTrainer, 'training_step', lambda self, *a, **k: self.state.global_step == {step} and die())"
    )
    assert [path.name for path in out.glob("checkpoint-*")] == [f"checkpoint-{SAVE_STEPS}"]

    # In the middle of the next checkpoint but one: the adapter and a half of the optimiser are written.
    torn = f"""
        def tear(state, file, *_, **__):
            if "checkpoint-{3 * SAVE_STEPS}" in str(file):
                open(file, "wb").write(b"half")
                die()
        before(torch, "save", tear)
    """
    run_and_die([*flags, "--resume_from_checkpoint", "true"], textwrap.dedent(torn))
    assert (out / UNFINISHED / f"checkpoint-{3 * SAVE_STEPS}" / "adapter_model.safetensors").exists()
    expected = {f"checkpoint-{SAVE_STEPS}", f"checkpoint-{2 * SAVE_STEPS}"}
    assert {path.name for path in out.glob("checkpoint-*")} == expected

    # Not in this process, where other tests may have left another number of threads or instruction set.
    run_to_the_end([*flags, "--resume_from_checkpoint", "true"])
    assert not (out / UNFINISHED).exists()
    run_to_the_end([*flags, "--output_dir", str(whole)])
    resumed, left_alone = adapter(out), adapter(whole)
    assert resumed.keys() == left_alone.keys()
    assert all(torch.equal(resumed[name], left_alone[name]) for name in left_alone)
    last = {folder: folder / f"checkpoint-{STEPS}" for folder in (out, whole)}
    optimisers = [torch.load(path / "optimizer.pt")["state"] for path in last.values()]
    for index, state in optimisers[0].items():
        assert all(torch.equal(value, optimisers[1][index][name]) for name, value in state.items())
    assert torch.equal(*(torch.load(path / "rng_state.pth", weights_only=False)["cpu"] for path in last.values()))


def test_sigterm_writes_a_checkpoint_and_ends(flags, tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "out"
    original = SeerTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(SeerTrainer, "training_step", training_step)
        assert main(["train", *flags, "--save_strategy", "no"]) == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == handler
    assert f"seer: stopped: SIGTERM after step 8. The last good checkpoint is {out}/checkpoint-8: continue with" in (
        capsys.readouterr().err
    )
    assert not (out / "metrics.json").exists()
    assert main(["train", *flags, "--resume_from_checkpoint", "true"]) == 0
    assert main(["train", *flags, "--output_dir", str(tmp_path / "whole")]) == 0
    resumed, left_alone = adapter(out), adapter(tmp_path / "whole")
    assert all(torch.equal(resumed[name], left_alone[name]) for name in left_alone)


def test_a_full_disk_names_the_last_good_checkpoint(flags, tmp_path, monkeypatch, capsys) -> None:
    """No file may grow beyond a kilobyte after the first checkpoint: what the libraries meet on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    original = SeerTrainer._save_checkpoint

    def on_a_full_disk(self, *args) -> None:
        if self.state.global_step > SAVE_STEPS:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
        try:
            original(self, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(SeerTrainer, "_save_checkpoint", on_a_full_disk)
    out = tmp_path / "out"
    assert main(["train", *flags]) == 1
    error = capsys.readouterr().err
    assert f"seer: stopped: {out}/checkpoint-{2 * SAVE_STEPS} cannot be written: " in error
    assert f"The last good checkpoint is {out}/checkpoint-{SAVE_STEPS}: continue with" in error
    assert {path.name for path in out.iterdir()} == {"config.yaml", f"checkpoint-{SAVE_STEPS}"}


def test_results_that_cannot_be_written(flags, tmp_path, monkeypatch, capsys) -> None:
    def full(*_, **__) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("seer.prototypes.save_file", full)
    assert main(["train", *flags, "--max_steps", "3"]) == 1
    error = capsys.readouterr().err
    assert f"the results cannot be written to {tmp_path / 'out'}: [Errno 28] No space left on device" in error
    assert f"The last good checkpoint is {tmp_path / 'out'}/checkpoint-3" in error


@pytest.mark.parametrize(
    ("what", "message"), [("loss", "the loss is nan"), ("gradient", "the norm of the gradient is")]
)
def test_nan_stops_before_it_reaches_the_weights(
    make_model, make_config, dataset, tokenizer, monkeypatch, tmp_path, what, message
) -> None:
    trainer = SeerTrainer(
        make_model("llama"), make_config(max_steps=9, save_strategy="steps", save_steps=2), dataset, tokenizer
    )
    original = SeerTrainer.compute_loss

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("inf")

    def compute_loss(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        if self.state.global_step < 4:
            return loss
        return loss * float("nan") if what == "loss" else Spoil.apply(loss)

    monkeypatch.setattr(SeerTrainer, "compute_loss", compute_loss)
    with pytest.raises(RunStopped, match=rf"step 5: {message}.* last good checkpoint is .*checkpoint-4: ") as stop:
        trainer.train()
    assert stop.value.exit_code == 1
    saved = adapter(tmp_path / "out" / "checkpoint-4")
    for name, value in saved.items():
        trained = trainer.model.get_parameter(name.replace(".weight", ".default.weight"))
        assert torch.equal(trained, value)


def test_stopped_before_the_first_checkpoint(make_model, make_config, dataset, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(SeerTrainer, "compute_loss", lambda self, *a, **k: torch.tensor(torch.inf, requires_grad=True))
    trainer = SeerTrainer(make_model("llama"), make_config(max_steps=9), dataset, tokenizer)
    with pytest.raises(RunStopped, match=r"step 1: the loss is inf\. No checkpoint had been written\."):
        trainer.train()


def test_a_checkpoint_of_another_run_is_refused_and_what_differs_is_named(
    flags, data_file, tmp_path, capsys, caplog
) -> None:
    assert main(["train", *flags, "--max_steps", "6"]) == 0
    checkpoint = tmp_path / "out" / "checkpoint-6"
    resume = ["train", *flags, "--resume_from_checkpoint", str(checkpoint), "--output_dir", str(tmp_path / "other")]
    capsys.readouterr()

    assert main([*resume, "--seed", "5", "--target_layers", "0", "--gradient_accumulation_steps", "2"]) == 2
    error = capsys.readouterr().err
    assert f"--resume_from_checkpoint: expected the run of {checkpoint}, which had" in error
    for difference in ("--seed 42, now 5", "--target_layers None, now [0]", "--gradient_accumulation_steps 1, now 2"):
        assert difference in error

    lines = data_file.read_text().splitlines()
    moved, changed = tmp_path / "moved.csv", tmp_path / "changed.csv"
    shutil.copy(data_file, moved)
    changed.write_text("\n".join([*lines[:-1], lines[-1].replace("cat", "dog", 1)]))
    assert main([*resume, "--data", str(changed)]) == 2
    assert "training texts" in capsys.readouterr().err

    with caplog.at_level(logging.WARNING):
        assert main([*resume, "--data", str(moved), "--learning_rate", "1e-3", "--lora_dropout", "0"]) == 0
    assert "goes on with other options: it had --learning_rate 0.01, now 0.001; --lora_dropout 0.2, now 0.0." in (
        caplog.text
    )
    assert json.loads((tmp_path / "other" / "metrics.json").read_text())["training"]["steps"] == STEPS

    (checkpoint / "run.json").write_text("{")
    assert main(resume) == 2
    assert f"expected a whole checkpoint of a SEER run, got {checkpoint}" in capsys.readouterr().err


def test_another_number_of_processes_is_another_run(make_model, make_config, dataset, tokenizer, tmp_path) -> None:
    config = make_config(max_steps=2, save_strategy="steps", save_steps=2)
    SeerTrainer(make_model("llama"), config, dataset, tokenizer).train()
    file = tmp_path / "out" / "checkpoint-2" / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "processes": 4}))
    with pytest.raises(InputError, match=r"which had processes 4, now 1"):
        SeerTrainer(make_model("llama"), config, dataset, tokenizer).train(resume_from_checkpoint=True)


def test_a_memory_bank_goes_on_with_what_it_held(make_model, make_config, dataset, tokenizer, tmp_path) -> None:
    def trainer(**options) -> SeerTrainer:
        config = make_config(max_steps=4, save_strategy="steps", save_steps=2, **options)
        return SeerTrainer(make_model("llama"), config, dataset, tokenizer)

    trainer(memory_bank_size=6).train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    saved = load_file(checkpoint / "memory_bank_0.safetensors")
    assert saved["keys"].shape == (6, 32)

    smaller = trainer(memory_bank_size=4)
    smaller.load_own_state(checkpoint)
    keys, labels = smaller.objective.bank.content()
    assert torch.equal(keys, saved["keys"][2:])  # the latest
    assert torch.equal(labels, saved["labels"][2:])

    trainer().train(resume_from_checkpoint=str(checkpoint))
    other = trainer(memory_bank_size=6, positions=["last", "response_mean"])
    with pytest.raises(InputError, match=r"--positions: expected those of the checkpoint, whose .* keys of 32 numbers"):
        other.train(resume_from_checkpoint=str(checkpoint))


def test_the_best_checkpoint_is_kept_and_loaded(make_model, make_config, dataset, tokenizer, tmp_path) -> None:
    class Worsen(TrainerCallback):
        """Later figures are worse, so that the first checkpoint stays the best."""

        def on_evaluate(self, args, state, control, metrics, **kwargs) -> None:
            metrics["eval_figure"] = float(state.global_step)

    config = make_config(
        max_steps=6,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=2,
        eval_steps=2,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="figure",
        greater_is_better=False,
        learning_rate=1e-2,
    )
    trainer = SeerTrainer(make_model("llama"), config, dataset, tokenizer, dataset, callbacks=[Worsen()])
    trainer.train()
    best = tmp_path / "out" / "checkpoint-2"
    assert trainer.state.best_model_checkpoint == str(best)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"checkpoint-2", "checkpoint-6"}
    state = json.loads((best / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)
    for name, value in adapter(best).items():
        assert torch.equal(trainer.model.get_parameter(name.replace(".weight", ".default.weight")), value)


def test_saving_over_an_earlier_checkpoint_of_the_same_step(flags, tmp_path) -> None:
    """Continued from an older checkpoint, a run writes later ones anew."""
    assert main(["train", *flags, "--max_steps", "6"]) == 0
    out = tmp_path / "out"
    (out / "checkpoint-6" / "left-over").touch()
    first = adapter(out / "checkpoint-6")
    config = SeerConfig(
        **{
            "output_dir": str(out),
            "resume_from_checkpoint": str(out / "checkpoint-3"),
            **json.loads((out / "checkpoint-3" / "run.json").read_text())["options"],
        }
    )
    run_training(config)
    assert not (out / "checkpoint-6" / "left-over").exists()
    assert all(torch.equal(value, first[name]) for name, value in adapter(out / "checkpoint-6").items())
