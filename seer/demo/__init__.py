"""`seer demo`: the whole method on two CPU cores in about a minute and a half, without a download."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from seer.command_line import Parser
from seer.errors import InputError

_DESCRIPTION = """\
See SEER at work, from nothing, in about a minute and a half on two CPU cores. No download, no file needed.

  1  read 708 short texts on six subjects (the concepts), and put one in five aside
  2  train a language model of a million parameters on the rest
  3  train it further with SEER, exactly as `seer train` would, so that its hidden states gather by concept
  4  show the texts that were put aside, before and after: a table and a picture

The model of step 2 already knows the subjects a little, as every language model does. Step 3 pulls texts of one concept
together and apart from the others in one layer, while the KL term holds the model's predictions where they were.
"""

_EPILOG = """\
What to look for: the cosine of texts of one concept stays well above that of different concepts, the nearest prototype
is more often the right one, and the KL to the base model is small. Everything is decided by the seed.

The folder then holds model/ (the base model), seer/ (adapter, prototypes, options, figures) and before_after.png. The
options are in seer/config.yaml: change one and train again with

  seer train seer-demo/seer/config.yaml --same_label positive --output_dir again
"""

# Chosen on the texts put aside, accuracy and KL together: a model this small wants larger steps than a real one.
_OPTIONS: dict[str, Any] = {
    "target_layers": [3],
    "same_label": "positive",
    "learning_rate": 2e-3,
    "per_device_train_batch_size": 16,
    "num_train_epochs": 3,
}
_MARK = "made-by-seer-demo.txt"


def run_demo(argv: Sequence[str]) -> int:
    """Run the demo.

    Args:
        argv: the arguments after `seer demo`.

    Returns:
        0, the exit code.

    Raises:
        InputError: bad arguments, or an output folder that holds something else.
        SystemExit: after `--help`.
    """
    parser = Parser("seer demo", _DESCRIPTION, _EPILOG)
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("seer-demo"),
        metavar="DIR",
        help="folder for what the demo makes; it must be new, empty, or from an earlier demo, whose files are then "
        "replaced (default: seer-demo)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="which texts are put aside, the first weights, the order of everything (default: 0)",
    )
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.seed < 2**32:  # before anything is written
        parser.error(f"--seed: expected a whole number from 0 to {2**32 - 1}, got {arguments.seed}")
    _claim(arguments.output_dir)
    with as_file(files("seer.demo") / "concepts.csv") as concepts:
        _run(concepts, arguments.output_dir, arguments.seed)
    return 0


def _claim(output_dir: Path) -> None:
    """Make the output folder and mark it, unless it holds files that are not a demo's."""
    mark = output_dir / _MARK
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        strangers = [] if mark.is_file() else sorted(path.name for path in output_dir.iterdir())
        if strangers:
            raise InputError(
                f"--output_dir: expected a new or empty folder or that of an earlier demo, got {output_dir}, which "
                f"holds {strangers[0]!r}"
            )
        mark.write_text("Made by `seer demo`, which replaces its files in this folder when it is run again.\n")
    except OSError as error:
        raise InputError(f"--output_dir: expected a folder to write to, got {output_dir}; {error}") from error


def _run(concepts: Path, output_dir: Path, seed: int) -> None:
    # Only now, so that --help and a wrong argument are answered at once.
    from rich.console import Console

    from seer.config import SeerConfig
    from seer.data import ConceptDataset
    from seer.demo.language_model import build_model, build_tokenizer, train_language_model
    from seer.plots import plot_representations
    from seer.train import run_training

    console = Console(highlight=False)
    model_dir, run_dir, picture = output_dir / "model", output_dir / "seer", output_dir / "before_after.png"
    config = SeerConfig(
        model=str(model_dir),
        data=str(concepts),
        output_dir=str(run_dir),
        overwrite_output_dir=True,
        seed=seed,
        save_strategy="no",
        use_cpu=True,  # so small a model gains nothing from an accelerator
        **_OPTIONS,
    )

    dataset = ConceptDataset.load(str(concepts))
    # The same call as in the run below: the language model must not read what is measured there.
    training, held_out = dataset.split(config.held_out_share, seed)
    console.print(
        f"[bold]1/4  Texts.[/] {len(dataset)} on {', '.join(dataset.names)}; {len(held_out or ())} put aside."
    )

    tokenizer = build_tokenizer([part for text in training.texts for part in (text.prompt, text.response) if part])
    model = build_model(tokenizer, seed)
    console.print(f"[bold]2/4  Language model.[/] {model.num_parameters():,} parameters learn to write such texts.")
    train_language_model(model, tokenizer, training, seed=seed)
    model.save_pretrained(model_dir)
    tokenizer.save_pretrained(model_dir)

    console.print("[bold]3/4  SEER.[/] Texts of one concept are pulled together, different ones apart.")
    result = run_training(config)

    (layer,) = result.representations_before
    plot_representations(
        result.representations_before[layer],
        result.representations_after[layer],
        result.concepts,
        picture,
        title=f"{len(result.concepts)} held-out texts at layer {layer} of {model.config.num_hidden_layers}, by t-SNE",
    )
    console.print(f"[bold]4/4  Picture[/] of the texts put aside, before and after: {picture}", soft_wrap=True)
    console.print(f"Try other options: seer train {shlex.quote(str(run_dir / 'config.yaml'))} --output_dir another-run")
