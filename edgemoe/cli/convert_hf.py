"""``edgemoe convert hf``: a Hugging Face checkpoint to a GGUF."""

from __future__ import annotations

from pathlib import Path

import click

from edgemoe.cli import options
from edgemoe.cli.convert import writing

TYPES = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k", "q4_k", "q3_k", "q2_k")
"""Keys of `edgemoe.converters.quantize.FILE_TYPES`, written here so that the help imports nothing."""


@click.command("hf")
@click.argument("checkpoint", type=click.Path(path_type=Path, readable=False))
@options.OUTPUT
@click.option("--type", "type_", type=click.Choice(TYPES), required=True, help="What the matrices become.")
@options.FORCE
def command(checkpoint: Path, output: Path, type_: str, force: bool) -> None:
    """Make a GGUF of a Hugging Face checkpoint.

    CHECKPOINT is a folder with config.json, safetensors and a tokenizer, of a Mixture-of-Experts model. Norms, routers
    and biases stay float32. With a K-quant, token embeddings and the output are Q6_K, and matrices whose rows do not
    fit become the next larger type that does. MXFP4 experts (gpt-oss) stay as they are.
    """
    from edgemoe.cli import ui
    from edgemoe.converters.hf_to_gguf import convert_checkpoint
    from edgemoe.memory import format_bytes

    with writing() as progress:
        written = convert_checkpoint(checkpoint, output, type_, force=force, on_progress=progress)
    types = ", ".join(f"{count} {name}" for name, count in written.types.items())
    ui.note(f"{output}: {written.family} ({written.architecture}), {format_bytes(written.n_bytes)}, tensors {types}.")
    if written.resumed:
        ui.note(f"{written.resumed} of {written.n_tensors} tensors were there from an interrupted run.")
    for note in written.notes:
        ui.note(note)
