"""export(): a trained model out of a training checkpoint, in a form to use or to publish."""

from pathlib import Path
from typing import Literal

from fvar_lightning.checkpoints import Weights, load_fvar_checkpoint
from fvar_lightning.official import export_var_checkpoint
from fvar_lightning.pretrained import save_pretrained, save_safetensors


def export(
    ckpt_path: str,
    output: str,
    format: Literal["pretrained", "safetensors", "var"] = "pretrained",
    weights: Weights = "ema",
) -> None:
    """Write the student and its structure tokenizer from a checkpoint of stage 2.

    Args:
        ckpt_path: checkpoint of a FVARTask.
        output: folder to write into (pretrained, var), or file to write (safetensors).
        format: 'pretrained': a folder with config.json and model.safetensors, as on the Hugging Face hub;
            'safetensors': one file with the configuration inside; 'var': two files for official VAR's code.
        weights: 'ema': averaged weights where training kept them; 'raw': those of the last step.

    Raises:
        ValueError: if the checkpoint is not of a FVARTask, or an argument is none of the above.
    """
    var, vae, info = load_fvar_checkpoint(ckpt_path, weights)
    folder = Path(output)
    if format == "pretrained":
        save_pretrained(folder, var, vae, **info._asdict())
        written = [folder]
    elif format == "safetensors":
        if folder.suffix != ".safetensors":
            raise ValueError(f"output must end in .safetensors in this format, got {output!r}")
        save_safetensors(folder, var, vae, **info._asdict())
        written = [folder]
    elif format == "var":
        ch = vae.encoder.conv_in.out_channels
        written = [folder / f"vae_ch{ch}v{vae.vocab_size}z{vae.z_channels}.pth", folder / f"var_d{var.depth}.pth"]
        export_var_checkpoint(vae, var, *written)
    else:
        raise ValueError(f"format must be 'pretrained', 'safetensors' or 'var', got {format!r}")
    for path in written:
        print(f"wrote {path}")
