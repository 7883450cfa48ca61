"""Use an installed minibert as its users do: commands, encoder, tokenizer, checkpoint, vectors; no source tree in sight."""

import importlib
import pkgutil
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

import torch
import transformers

import minibert

here = Path(minibert.__file__).parent
assert here.parent.name == "site-packages", here

for name in minibert.__all__:
    getattr(minibert, name)
assert list(files("minibert.recipes").glob("*.yaml")), "the recipes are missing from the wheel"

tokenizer = minibert.train_wordpiece(["the wheel works where it was made", "and where it was not"] * 9, vocab_size=50)
config = minibert.MiniBertConfig.preset("simple-4x256", vocab_size=len(tokenizer), num_hidden_layers=1)
model = minibert.MiniBertModel(config).eval()
inputs = tokenizer(["the wheel", "where it was made"], padding=True, return_tensors="pt")
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert (Path(folder) / "modeling_minibert.py").exists()
    again = transformers.AutoModel.from_pretrained(folder)
    torch.testing.assert_close(again(**inputs).last_hidden_state, model(**inputs).last_hidden_state)

    assert minibert.encode(folder, ["the wheel", "where it was made"]).shape == (2, config.hidden_size)
    notes, vectors, command = Path(folder, "notes.txt"), Path(folder, "vectors"), Path(sys.executable).parent / "minibert"
    notes.write_text("the wheel\nwhere it was made\n", encoding="utf-8")
    for line in (
        ["encode", folder, notes, vectors],
        ["search", folder, "--passages", notes, "made"],
        ["search", vectors, "made"],
    ):
        subprocess.run([command, *line], check=True, stdout=subprocess.DEVNULL)

if "--every-module" in sys.argv:
    modules = [module.name for module in pkgutil.walk_packages([str(here)], "minibert.") if module.name != "minibert.__main__"]
    for name in modules:
        importlib.import_module(name)
    print(f"  {len(modules)} modules import")
    import typer

    from minibert.cli import app

    for command in typer.main.get_command(app).commands:
        subprocess.run([Path(sys.executable).parent / "minibert", command, "--help"], check=True, stdout=subprocess.DEVNULL)
        print(f"  minibert {command} --help")
print(f"  minibert works with torch {torch.__version__} and transformers {transformers.__version__}")
