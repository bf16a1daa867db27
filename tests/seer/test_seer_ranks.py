"""Two processes over gloo train what one process trains on the same batches, stop together and go on together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from deepspeed_across_ranks import train_from_folder
from safetensors.torch import load_file
from training_across_ranks import SIGTERM_AT, STEPS, make_trainer

from seer import InputError

TESTS = Path(__file__).parent
CONFIGS = TESTS.parents[1] / "configs"
LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "fsdp2": [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "fsdp2.yaml")),
        *("--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"),
    ],
}


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory):
    """Batches that two ranks would share, one after the other in one step."""
    trainer = make_trainer(tmp_path_factory.mktemp("one"), gradient_accumulation_steps=2)
    trainer.train()
    trainer.save_model(trainer.args.output_dir)
    return trainer


@pytest.mark.parametrize("launcher", list(LAUNCHERS))
def test_two_ranks_train_what_one_process_trains(
    one_process, launcher, tmp_path, model_folder, data_file, monkeypatch
) -> None:
    command = [
        *LAUNCHERS[launcher],
        str(TESTS / "training_across_ranks.py"),
        str(tmp_path),
        str(model_folder),
        str(data_file),
    ]
    outcome = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["processes"] == 2
    assert ("FSDP" in facts["wrapper"]) == (launcher == "fsdp2")

    # Rounding: the mean over ranks adds in another order than the accumulation does.
    expected = adapter(Path(one_process.args.output_dir))
    start = {name: value for name, value in make_trainer(tmp_path).model.named_parameters() if "lora_" in name}
    for kind in ("exact", "chunks") if launcher == "torchrun" else ("exact",):
        trained = adapter(tmp_path / kind / "adapter")
        assert trained.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(trained[name], value, rtol=1e-3, atol=1e-5)
    for name, value in expected.items():
        before = start[name.replace(".weight", ".default.weight")]
        assert (value - before).abs().max() > 1e-3  # a hundred times what is tolerated
    history = [
        [entry for entry in each if "loss" in entry] for each in (facts["history"], one_process.state.log_history)
    ]
    assert len(history[0]) == len(history[1]) == STEPS
    for ours, theirs in zip(*history, strict=True):
        for name in ("loss", "L_d", "L_r", "L_kl", "grad_norm", "positive_similarity"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=2e-4), (ours["step"], name)

    # One rank got SIGTERM: both stopped, and went on as if nothing had happened, dropout and memory banks included.
    assert facts["stopped_after"] == SIGTERM_AT + 1
    assert [path.name for path in (tmp_path / "stopped").glob("checkpoint-*")] == [f"checkpoint-{SIGTERM_AT + 1}"]
    whole, stopped = (adapter(tmp_path / name / "adapter") for name in ("whole", "stopped"))
    for name, value in whole.items():
        assert torch.equal(stopped[name], value), name

    # A frozen model in bfloat16 under an adapter in float32, which is how models are loaded on GPUs.
    assert facts["dtypes"] == ["torch.float32"]
    for ours, theirs in zip(facts["bfloat16"][:4], history[1], strict=False):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.1, abs=0.1)

    if launcher == "fsdp2":
        return  # the command was refused, which the script has seen to
    written = adapter(tmp_path / "command")
    assert {name: value.shape for name, value in written.items()} == {n: v.shape for n, v in expected.items()}
    assert json.loads((tmp_path / "command" / "metrics.json").read_text())["training"]["steps"] == STEPS


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize(("stage", "tolerance"), [(2, 1e-5), (3, 1e-3)])
def test_deepspeed_trains_what_one_process_trains(stage, tolerance, tmp_path, model_folder) -> None:
    """ZeRO-3 rounds otherwise; where nothing moved yet, L_r has the direction of the rounding, which Adam enlarges."""
    alone = train_from_folder(tmp_path / "alone", model_folder, gradient_accumulation_steps=2)
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"zero{stage}.yaml")),
        *("--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"),
        *(str(TESTS / "deepspeed_across_ranks.py"), str(tmp_path / "two"), str(model_folder)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    outcome = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    facts = json.loads((tmp_path / "two" / "facts.json").read_text())
    assert (facts["engine"], facts["stage"]) == ("DeepSpeedEngine", stage)
    trained, expected = adapter(tmp_path / "two"), adapter(tmp_path / "alone")
    assert trained.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(trained[name], value, rtol=1e-3, atol=tolerance)
        if "lora_B" in name:  # begins at 0
            assert value.abs().max() > 5e-3
    logs = [[entry for entry in each if "loss" in entry] for each in (facts["history"], alone.state.log_history)]
    assert len(logs[0]) == len(logs[1]) == 6
    for ours, theirs in zip(*logs, strict=True):
        for name in ("loss", "L_d", "L_r", "L_kl", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=2e-4), (ours["step"], name)


@pytest.mark.parametrize("option", [{"cache_reference": True}, {"adapter": "none"}])
def test_zero_3_has_no_whole_weights_before_training(option, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("seer.trainer.is_deepspeed_zero3_enabled", lambda: True)
    (name,) = option
    with pytest.raises(InputError, match=f"--{name}: expected .* with ZeRO-3, which has no whole weights before"):
        make_trainer(tmp_path, **option)


def test_negatives_of_two_ranks_give_the_loss_of_the_whole_batch(tmp_path) -> None:
    command = [*LAUNCHERS["torchrun"], str(TESTS / "negatives_across_ranks.py"), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    outcome = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert outcome.returncode == 0, outcome.stderr[-3000:]


def test_the_launchers_know_every_setting() -> None:
    """accelerate reads what is in `configs/`; an unknown setting would be an error there."""
    from accelerate.commands.config.config_args import ClusterConfig

    names = {path.stem: ClusterConfig.from_yaml_file(str(path)) for path in CONFIGS.glob("*.yaml")}
    assert {name: str(config.distributed_type).rsplit(".", 1)[-1] for name, config in names.items()} == {
        "ddp": "MULTI_GPU",
        "fsdp2": "FSDP",
        "zero2": "DEEPSPEED",
        "zero3": "DEEPSPEED",
    }
    for name, stage in (("zero2", 2), ("zero3", 3)):
        assert yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["deepspeed_config"]["zero_stage"] == stage
