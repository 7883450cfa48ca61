"""What the README and the documentation show is true: their examples run, their tables are those of the code."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import torch

import minibert
from minibert import MiniBertConfig
from minibert.train.recipe import load_recipe

ROOT = Path(minibert.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_examples_of_the_readme_run(tmp_path, tiny):
    # The second example opens what `make quickstart` leaves; a tiny model stands in for it.
    tokenizer = minibert.train_wordpiece(["read a table from a file", "invert a matrix"] * 2, vocab_size=60)
    torch.manual_seed(0)
    config = MiniBertConfig.preset("modern-6x384", **{**tiny, "vocab_size": len(tokenizer)})
    folder = tmp_path / "runs" / "quickstart" / "2-embed"
    minibert.MiniBertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        for shown in re.findall(r"print\(.*\)  # (.*)", block):
            assert done.stdout.strip() == shown


def test_recipe_of_the_readme_is_a_recipe(tmp_path):
    (block,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    (tmp_path / "mine.yaml").write_text(block, encoding="utf-8")
    recipe = load_recipe(str(tmp_path / "mine.yaml"), ["embed.learning_rate=5e-4"])
    assert [stage.kind for stage in recipe.stages] == ["tokenizer", "embed", "evaluate"]


def test_links_lead_somewhere():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_page_of_recipe_fields_is_up_to_date():
    spec = importlib.util.spec_from_file_location("fields", ROOT / "docs" / "fields.py")
    fields = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fields)
    assert (ROOT / "docs" / "training.md").read_text(encoding="utf-8") == fields.page(), "run: python docs/fields.py"
