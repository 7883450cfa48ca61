"""Test the data of pictures, their pages and images, what they refuse, and the menus of a page in a browser."""

import functools
import json
import re
import shutil
import sys

import matplotlib.image
import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, DistilBertConfig, DistilBertModel

import minibert
from helpers import edit_weights, read_weights, run_command, write_rows
from minibert import MiniBertConfig, MiniBertModel, plot, train_word_level, train_wordpiece
from minibert.inference.load import load
from minibert.plot import attention_maps as plot_attention
from minibert.plot.attention_maps import line_ends
from minibert.plot.page import image_figure, token_labels
from minibert.plot.training_curves import read_log
from minibert.plot.vector_maps import project

TEXTS = ["the cat sleeps on the sofa", "a dog sleeps on the mat", "stocks fell today", "gold rose after the news"]
EVIL = '$x^2$ <b>cat</b> </script><script>document.title="taken"</script> &amp; sleeps'
NAMES = ("attention", "embeddings", "training", "similarity")


def shape_of(tokenizer, **more):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return {"vocab_size": len(tokenizer), **sizes, "max_position_embeddings": 40, "initializer_range": 0.4, **more}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Save tiny models with the same tokenizer: two presets of this package, and two families of transformers."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_wordpiece([*TEXTS, EVIL] * 3, vocab_size=118)
    tokenizer.model_max_length = 40
    torch.manual_seed(0)
    shape = shape_of(tokenizer)
    made = {
        "minibert": MiniBertModel(MiniBertConfig.preset("search-8x768", **shape)),
        "nano": MiniBertModel(MiniBertConfig.preset("nano-1x3", vocab_size=len(tokenizer), initializer_range=1.0)),
        "bert": BertModel(BertConfig(**shape)),
        "distilbert": DistilBertModel(
            DistilBertConfig(
                vocab_size=len(tokenizer), dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=40
            )
        ),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """Write a run of two stages, the second of which has a log."""
    run = tmp_path_factory.mktemp("runs") / "toy"
    (run / "1-tokenizer").mkdir(parents=True)
    write_log(run / "2-classify" / "log.jsonl")
    return run


def write_log(path, offset=0.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in (10, 20, 30):
        more = {"learning_rate": 0.1 / step, "grad_norm": 1.0, "tokens_per_second": 1000.0 + step, "seconds": 6.0 * step}
        lines.append({"step": step, "epoch": step / 30, "loss": 3.0 - step / 20 + offset, **more})
    lines.append({"step": 30, "epoch": 1.0, "eval_loss": 1.75, "eval_accuracy": 0.5})
    write_rows(path, lines)


@pytest.fixture(scope="module")
def pictures(models, run_folder):
    """Draw each kind of picture, of texts that look like tags and formulas."""
    return {
        "attention": plot.attention(models / "minibert", EVIL, "a dog"),
        "embeddings": plot.embeddings(models / "minibert", [*TEXTS, EVIL], labels=["a", "a", "b", "b", "<b>cat</b>$"]),
        "similarity": plot.similarity(models / "minibert", [*TEXTS, EVIL, "<b>cat</b>", "<a href='x'>$x^2$</a>"]),
        "training": plot.training(run_folder),
    }


# Attention


def recorded(folder, *texts):
    """Return the attention weights of the model itself."""
    model = AutoModel.from_pretrained(folder, attn_implementation="eager")
    inputs = AutoTokenizer.from_pretrained(folder)(*texts, return_tensors="pt")
    with torch.inference_mode():
        return torch.cat(model(**inputs, output_attentions=True).attentions)


@pytest.mark.parametrize("name", ["minibert", "nano", "bert", "distilbert"])
def test_attention_is_what_the_model_returns(models, name):
    picture = plot.attention(models / name, TEXTS[0], TEXTS[1])
    expected = recorded(models / name, TEXTS[0], TEXTS[1])
    assert picture.weights.shape == ((1, 1) if name == "nano" else (2, 4)) + (len(picture.tokens),) * 2
    torch.testing.assert_close(torch.from_numpy(picture.weights), expected)
    assert sum(picture.second) > 0 and len(picture.second) == len(picture.tokens)


def test_menus_hold_the_weights_of_every_layer_and_head(models):
    picture = plot.attention(models / "minibert", TEXTS[0])
    figure = picture.interactive()
    layers, heads = (menu.buttons for menu in figure.layout.updatemenus)
    assert [button.label for button in layers] == ["layer 1", "layer 2"]
    assert [button.label for button in heads] == ["head 1", "head 2", "head 3", "head 4"]
    maps = [at for at, trace in enumerate(figure.data) if trace.type == "heatmap"]
    for layer, button in enumerate(layers):
        (change,) = button.args
        for head, at in enumerate(maps):
            np.testing.assert_array_equal(change["z"][at], picture.weights[layer, head])
            for ends, expected in zip(change["y"][at + 1 : at + 11], line_ends(picture.weights[layer, head])):
                np.testing.assert_array_equal(ends, expected)
    for head, button in enumerate(heads):
        shown = [at for at in maps if button.args[0]["visible"][at]]
        assert shown == [maps[head]]


def test_one_layer_and_head_can_be_chosen(models):
    whole = plot.attention(models / "minibert", TEXTS[0])
    one = plot.attention(models / "minibert", TEXTS[0], layer=2, head=3)
    np.testing.assert_array_equal(one.weights[0, 0], whole.weights[1, 2])
    assert (one.layers, one.heads) == ([2], ["head 3"])
    heat, _, lines = one.static().axes
    assert heat.get_xlim() == (-0.5, len(one.tokens) - 0.5) and len(lines.lines) == 10
    assert len(whole.static().axes) == 8


def test_long_texts_are_cut_averaged_and_thinned_and_say_so(models, monkeypatch):
    cut = plot.attention(models / "minibert", " ".join(TEXTS * 9))
    assert len(cut.tokens) == 40 and "only 40 are read" in cut.notes[0]
    lines = line_ends(cut.weights[0, 0])
    assert sum(len(ends) for ends in lines) / 3 <= plot_attention._LINES < 40**2
    assert "strongest" in cut.panels(0, 0)[1].title and not plot.attention(models / "nano", "the cat").panels(0, 0)[1].title
    strongest = cut.weights[0, 0].max()
    row, column = (int(end) for end in lines[-1][:2])
    assert cut.weights[0, 0][row, column] > 0.9 * strongest

    monkeypatch.setattr(plot_attention, "_PAGE_WEIGHTS", 500)
    mean = plot.attention(models / "minibert", TEXTS[0])
    np.testing.assert_allclose(mean.weights[:, 0], recorded(models / "minibert", TEXTS[0]).mean(1), atol=1e-6)
    assert mean.heads == ["mean of 4"] and "--layer" in mean.notes[0]


# Embeddings and similarity


def test_vectors_of_width_three_are_shown_as_they_are(models):
    picture = plot.embeddings(models / "nano", TEXTS, labels=[1, 1, 2, 2])
    (space,) = picture.spaces
    np.testing.assert_allclose(space.points, load(models / "nano", device="cpu").encode(TEXTS), atol=1e-6)
    ones, twos = picture.interactive().data
    assert (ones.name, twos.name) == ("1", "2") and list(twos.hovertext) == TEXTS[2:]
    np.testing.assert_allclose(twos.x, space.points[2:, 0], atol=1e-6)


def test_tokens_are_shown_before_and_after_the_encoder(models):
    picture = plot.embeddings(models / "nano", TEXTS[:2], tokens=True)
    model, tokenizer = AutoModel.from_pretrained(models / "nano"), AutoTokenizer.from_pretrained(models / "nano")
    found = [model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True) for text in TEXTS[:2]]
    before, after = picture.spaces
    np.testing.assert_allclose(before.points, torch.cat([x.hidden_states[0][0] for x in found]).detach(), atol=1e-6)
    np.testing.assert_allclose(after.points, torch.cat([x.last_hidden_state[0] for x in found]).detach(), atol=1e-6)
    assert not np.allclose(before.points, after.points)
    assert picture.names[:3] == ["[CLS]", "the", "cat"] and len(set(picture.labels)) == 2


def test_wide_vectors_are_projected():
    generator = np.random.default_rng(0)
    plane = generator.normal(size=(30, 2)) @ generator.normal(size=(2, 20))
    points, axes = project(plane)
    assert axes[2] == "component 3 (0%)" and np.allclose(points[:, 2], 0)
    between = np.linalg.norm(plane[:, None] - plane, axis=-1)
    np.testing.assert_allclose(np.linalg.norm(points[:, None] - points, axis=-1), between, atol=1e-9)
    assert project(np.ones((2, 8)))[0].shape == (2, 3) and np.isfinite(project(np.ones((2, 8)))[0]).all()
    clusters = np.repeat([[0.0] * 9, [50.0] * 9], 30, axis=0) + generator.normal(size=(60, 9))
    points, axes = project(clusters, "tsne")
    assert points.shape == (60, 3) and axes[0] == "t-SNE 1"
    nearest = np.linalg.norm(points[:, None] - points, axis=-1) + np.diag([np.inf] * 60)
    assert ((nearest.argmin(1) < 30) == (np.arange(60) < 30)).all()


def test_similarity_is_the_cosine(models):
    picture = plot.similarity(models / "minibert", TEXTS, TEXTS[:2])
    vectors = load(models / "minibert", device="cpu").encode(TEXTS)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(picture.values, unit @ unit[:2].T, atol=1e-6)
    assert picture.interactive().data[0].text.shape == (4, 2)


# Tokens


def test_tokens_words_and_unknowns(tmp_path):
    tokenizer = train_word_level(TEXTS, vocab_size=20)
    tokenizer.save_pretrained(tmp_path / "only-a-tokenizer")
    picture = plot.tokens(tmp_path / "only-a-tokenizer", "the zebra sleeps")
    assert [token.id for token in picture.tokens] == tokenizer("the zebra sleeps")["input_ids"]
    zebra = next(token for token in picture.tokens if token.text == "zebra")
    assert zebra.unknown and zebra.word == 2 and sum(token.unknown for token in picture.tokens) == 1
    assert "1 unknown" in str(picture) and "not in the vocabulary" in str(picture)
    assert picture.tokens[0].word is None


def test_pieces_of_a_word_share_its_number(models):
    picture = plot.tokens(models / "minibert", "sleeps sleepsnews")
    assert picture.tokens[1].word == 1 and picture.tokens[1].text == "sleeps"
    parts = [token.text for token in picture.tokens if token.word == 2]
    assert len(parts) > 1 and "".join(parts) == "sleepsnews"


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "tokenizer.json"])
def test_a_damaged_file_beside_a_tokenizer_is_named(models, tmp_path, file):
    folder = shutil.copytree(models / "minibert", tmp_path / "model")
    (folder / file).write_text('{"vocab', encoding="utf-8")
    with pytest.raises(ValueError, match=rf"^\S*model/{file} is damaged \(.*\); save or download the model again\.$"):
        plot.tokens(folder, "a word")


def test_byte_level_tokens_are_readable():
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    vocabulary = {name: number for number, name in enumerate(["Ġthe", "cafÃ©", "Ã", "<s>"])}
    backend = Tokenizer(BPE(vocabulary, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    assert token_labels(tokenizer, [0, 1, 2, 3]) == ["▁the", "café", "Ã", "<s>"]


# Training


def test_curves_are_the_lines_of_the_log(run_folder):
    picture = plot.training(run_folder)
    (run,) = picture.runs
    assert run.name == "toy/2-classify"
    assert run.curve("loss", "step") == ([10, 20, 30], [2.5, 2.0, 1.5])
    assert run.curve("loss", "minutes")[0] == [1.0, 2.0, 3.0]
    assert run.curve("eval_accuracy", "minutes") == ([3.0], [0.5])
    assert list(picture.metrics) == ["loss", "accuracy", "learning rate", "tokens per second", "grad norm"]
    assert picture.metrics["loss"] == ["loss", "eval_loss"]


def test_runs_are_overlaid_under_names_that_tell_them_apart(run_folder, tmp_path):
    write_log(tmp_path / "toy" / "2-classify" / "log.jsonl", offset=1.0)
    figure = plot.training([run_folder, tmp_path / "toy" / "2-classify"]).interactive()
    losses = [trace for trace in figure.data if trace.xaxis == "x" and trace.mode == "lines"]
    assert len(losses) == 2 and losses[0].name != losses[1].name
    assert [list(trace.y) for trace in losses] == [[2.5, 2.0, 1.5], [3.5, 3.0, 2.5]]
    assert losses[0].line.color != losses[1].line.color


def test_a_log_that_is_being_written_can_be_read(tmp_path):
    write_log(tmp_path / "log.jsonl")
    with (tmp_path / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"step": 40, "loss": NaN, "seconds": 9}\n{"step": 50, "lo')
    lines = read_log(tmp_path / "log.jsonl")
    assert len(lines) == 5 and np.isnan(lines[-1]["loss"])
    assert "NaN" not in re.sub(r"[A-Za-z]NaN|NaN[A-Za-z]|isNaN", "", plot.training(tmp_path).interactive().to_json())


# Pages and images


@pytest.mark.parametrize("name", NAMES)
def test_a_page_needs_no_network_and_holds_no_tags_of_texts(pictures, name):
    page = pictures[name].page()
    assert not re.findall(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="?\s*(?:https?:)?//', page)
    assert "<script>document.title" not in page and "</script><script>d" not in page
    assert "<b>cat" not in page[: page.find("<script")] + page[page.rfind("Plotly.newPlot(") :]


def test_names_of_metrics_and_runs_are_no_tags(tmp_path):
    run = tmp_path / "<b>cat<i>"
    run.mkdir()
    write_rows(run / "log.jsonl", [{"step": 1, f"eval_{EVIL}": 0.5, "%{x}<b>cat</b>": 1.0, "seconds": 1.0}])
    page = plot.training(run).page()
    shown = page[: page.find("<script")] + page[page.rfind("Plotly.newPlot(") :]
    assert "&lt;b&gt;cat" in shown and "<b>cat" not in shown and "\\u003cb\\u003ecat" not in shown


@pytest.mark.parametrize("name", NAMES)
def test_page_and_image_show_the_same_data(pictures, name):
    picture = pictures[name]
    shown = [trace for trace in picture.interactive().data if trace.type != "heatmap"]
    lines = [line for axes in image_figure(picture.panels(), (3, 3)).axes for line in axes.lines]
    for trace, line in zip(shown, lines):
        for letter, values in zip("xyz", getattr(line, "get_data_3d", line.get_data)()):
            np.testing.assert_allclose(values, trace[letter])
    assert len(lines) == (10 if name == "attention" else len(shown))


@pytest.mark.parametrize("name", NAMES)
def test_an_image_shows_texts_as_they_are(pictures, name):
    texts = pictures[name].static().findobj(matplotlib.text.Text)
    assert not any(text.get_parse_math() for text in texts if "$" in text.get_text())  # else $x^2$ would be a formula
    shown = [text.get_text() for text in texts]
    if name != "training":
        assert any("$" in text for text in shown) and any("<" in text for text in shown)


def test_names_below_a_heat_map_stand_upright_so_that_they_do_not_overlap(pictures):
    axes = pictures["similarity"].static().axes[0]
    assert {label.get_rotation() for label in axes.get_xticklabels()} == {90.0}


def test_a_file_is_complete_or_absent_and_never_replaced_by_accident(pictures, tmp_path, monkeypatch):
    picture = pictures["embeddings"]
    for name in ("a.html", "a.png"):
        written = picture.save(tmp_path / name)
        with pytest.raises(FileExistsError, match="--force"):
            picture.save(written)
        written.write_bytes(b"old")
        assert len(picture.save(written, force=True).read_bytes()) > 1000
    before = written.read_bytes()
    monkeypatch.setattr("minibert.files.disk.sync", lambda path: 1 / 0)
    for target in (written, tmp_path / "b.html"):
        with pytest.raises(ZeroDivisionError):
            picture.save(target, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "a.png"] and written.read_bytes() == before


def test_a_place_that_cannot_be_written_is_refused(pictures, tmp_path):
    with pytest.raises(ValueError, match=r"a.jpg cannot be written: its name must end in one of .html, .png\.$"):
        pictures["embeddings"].save(tmp_path / "a.jpg")
    with pytest.raises(FileNotFoundError, match="There is no folder .*nowhere"):
        pictures["embeddings"].save(tmp_path / "nowhere" / "a.html")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(FileExistsError):
        pictures["embeddings"].save(tmp_path / "folder.html")


# Refusals


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: plot.attention(m / "none", "the cat"), "no model folder"),
        (lambda m: plot.attention(m / "minibert", "  "), "The text is empty"),
        (lambda m: plot.attention(m / "minibert", "the cat", ""), "second text is empty"),
        (lambda m: plot.attention(m / "minibert", "the cat", layer=3), "no layer 3; its layers are 1 to 2"),
        (lambda m: plot.attention(m / "minibert", "the cat", head=0), "no head 0; its heads are 1 to 4"),
        (lambda m: plot.attention(m / "minibert", "the cat", max_tokens=2), "max_tokens must be at least 4.* got 2"),
        (lambda m: plot.embeddings(m / "minibert", []), "0 text.s. are too few"),
        (lambda m: plot.embeddings(m / "minibert", ["a", "", "b"]), "Text 2 is empty"),
        (lambda m: plot.embeddings(m / "minibert", TEXTS, labels=["a"]), "4 text.s. need as many labels, got 1"),
        (lambda m: plot.embeddings(m / "minibert", TEXTS, method="mds"), "must be one of pca, tsne, umap, got 'mds'"),
        (lambda m: plot.embeddings(m / "minibert", TEXTS[:2]), "three or more"),
        (lambda m: plot.embeddings(m / "minibert", TEXTS, method="tsne"), "use --method pca"),
        (lambda m: plot.similarity(m / "minibert", TEXTS, []), "second list of texts is empty"),
        (lambda m: plot.similarity(m / "minibert", ["\n"]), "Text 1 of the first list is empty"),
        (lambda m: plot.tokens(m / "minibert", "\t"), "The text is empty"),
        (lambda m: plot.tokens(m / "none", "the cat"), "no model folder"),
        (lambda m: plot.training([]), "No run is given"),
        (lambda m: plot.training(m / "none"), "The run .* does not exist"),
        (lambda m: plot.training(m / "bert"), "holds log.jsonl"),
        (lambda m: plot.training(m / "bert" / "config.json"), "Line 1 of .* is not a JSON object"),
    ],
)
def test_wrong_input_is_refused_in_words(models, call, message):
    with pytest.raises((ValueError, OSError), match=message):
        call(models)


def test_a_log_without_lines_or_with_a_damaged_one_is_refused(tmp_path):
    (tmp_path / "log.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="no lines yet"):
        plot.training(tmp_path)
    write_log(tmp_path / "log.jsonl")
    (tmp_path / "log.jsonl").write_text("[1]\n" + (tmp_path / "log.jsonl").read_text(), encoding="utf-8")
    with pytest.raises(ValueError, match="Line 1 of"):
        plot.training(tmp_path)


def test_umap_explains_itself_where_it_is_missing(models, monkeypatch):
    monkeypatch.setattr("minibert.plot.vector_maps.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install umap-learn"):
        plot.embeddings(models / "minibert", TEXTS, method="umap")


def test_attention_reads_as_many_tokens_as_asked(models):
    assert len(plot.attention(models / "minibert", " ".join(TEXTS), max_tokens=9).tokens) == 9


# The command


@pytest.mark.parametrize(
    "draw",
    [
        lambda model: plot.attention(model, TEXTS[0]),
        lambda model: plot.embeddings(model, TEXTS),
        lambda model: plot.embeddings(model, TEXTS, tokens=True),
        lambda model: plot.similarity(model, TEXTS),
    ],
)
def test_a_model_that_computes_nan_is_not_drawn(models, tmp_path, draw):
    model = shutil.copytree(models / "minibert", tmp_path / "model")
    name = next(name for name in read_weights(model) if name.endswith("word_embeddings.weight"))
    edit_weights(model, **{name: torch.full_like(read_weights(model)[name], float("nan"))})
    with pytest.raises(FloatingPointError, match="The model computes NaN"):
        draw(model)


@pytest.fixture
def command(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.csv").write_text(
        "body,label\n" + "".join(f"{text},{text[0]}\n" for text in TEXTS) + " ,x\n", encoding="utf-8"
    )
    return functools.partial(run_command, "plot")


def test_every_command_writes_a_file(command, models, run_folder, tmp_path):
    model = models / "minibert"
    for name, arguments in {
        "attention.html": ["attention", model, TEXTS[0], TEXTS[1]],
        "embeddings.html": ["embeddings", model, "texts.csv"],
        "tokens-in-space.png": ["embeddings", model, TEXTS[0], "--tokens"],
        "training.png": ["training", run_folder],
        "similarity.html": ["similarity", model, "texts.csv", "a cat"],
        "similarity.png": ["similarity", model, "texts.csv"],
    }.items():
        done = command(*arguments, "--out", name)
        assert done.exit_code == 0, done.output
        data = (tmp_path / name).read_bytes()
        assert data.startswith(b"<!doctype html>" if name.endswith(".html") else b"\x89PNG") and name in done.stderr
    image = matplotlib.image.imread(tmp_path / "training.png")
    assert min(image.shape[:2]) > 100 and image.std() > 0.01
    assert '"name":"s"' in (tmp_path / "embeddings.html").read_text(encoding="utf-8")  # a label of the file


def test_tokens_are_printed_as_a_table_or_as_json(command, models):
    done = command("tokens", models / "minibert", "the cat", "--json")
    assert [token["token"] for token in json.loads(done.stdout)["tokens"]] == ["[CLS]", "the", "cat", "[SEP]"]
    assert "4 tokens of 2 words, 0 unknown." in command("tokens", models / "minibert", "the cat").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attention", "none", "the cat", "--out", "x.html"], "no model folder none"),
        (["attention", "MODEL", "", "--out", "x.html"], "text is empty"),
        (["attention", "MODEL", "the cat", "--out", "texts.csv"], "must end in one of .html, .png"),
        (["attention", "MODEL", "the cat", "--out", "taken.png"], "--force"),
        (["embeddings", "MODEL", "nothing.csv", "--out", "x.png"], "nothing.csv"),
        (["embeddings", "MODEL", "texts.csv", "--label-column", "stars", "--out", "x.png"], "Column 'stars' is not there"),
        (["embeddings", "MODEL", "texts.csv", "--column", "stars", "--out", "x.png"], "(--column)"),
        (["embeddings", "MODEL", "a b", "c d", "e f", "--label", "a", "--out", "x.png"], "as many labels"),
        (["embeddings", "MODEL", "a b", "c d", "e f", "--column", "a", "--out", "x.png"], "no columns"),
        (["similarity", "MODEL", "texts.csv", "", "--out", "x.html"], "empty"),
        (["training", "none", "--out", "x.png"], "The run none does not exist"),
        (["training", "MODEL", "--out", "x.png"], "holds log.jsonl"),
        (["tokens", "MODEL", " "], "text is empty"),
    ],
)
def test_the_command_refuses_in_one_sentence(command, models, tmp_path, arguments, message):
    (tmp_path / "taken.png").write_text("mine", encoding="utf-8")
    done = command(*(models / "minibert" if argument == "MODEL" else argument for argument in arguments))
    assert done.exit_code == 2 and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not list(tmp_path.glob("x.*"))
    assert (tmp_path / "taken.png").read_text(encoding="utf-8") == "mine"


def test_a_missing_extra_explains_itself(command, models, monkeypatch):
    monkeypatch.delattr(minibert, "plot", raising=False)
    for name in [name for name in sys.modules if name.startswith("minibert.plot")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    done = command("tokens", models / "minibert", "the cat")
    assert done.exit_code == 2 and "needs plotly, which the extra plot brings: pip install" in done.stderr


def test_every_plot_command_has_an_example():
    for name in (*NAMES, "tokens"):
        assert f"minibert plot {name}" in run_command("plot", name, "--help").stdout


# In a browser


@pytest.fixture(scope="module")
def browser():
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("Chromium and Chrome are missing")
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright, which drives a browser, is not installed")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def opened(browser, pictures, tmp_path):
    """Open the page of a picture in a window; errors, dialogs and network requests fail the test."""
    wrong, tabs = [], []

    def opened(name, width=1400):
        tab = browser.new_page(viewport={"width": width, "height": 900})
        tab.set_default_timeout(120_000)  # on a busy machine Chromium takes its time
        tabs.append(tab)
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("dialog", lambda dialog: wrong.append(dialog.message))
        tab.on("request", lambda request: wrong.append(request.url) if request.url.startswith("http") else None)
        tab.goto(pictures[name].save(tmp_path / f"{name}-{width}.html", force=True).as_uri())
        tab.wait_for_function("document.querySelector('.js-plotly-plot .main-svg') !== null")
        tab.evaluate("window.figure = document.querySelector('.js-plotly-plot')")
        return tab

    yield opened
    for tab in tabs:
        tab.close()
    assert wrong == []


def choose(tab, menu, item):
    tab.locator(".updatemenu-header").nth(menu).click()
    tab.locator(".updatemenu-dropdown-button", has_text=re.compile(f"^{item}$")).click()
    tab.wait_for_timeout(100)


SHOWN = """() => {
    const heat = figure._fullData.filter((trace) => trace.type === "heatmap" && trace.visible === true);
    return heat.map((trace) => Array.from(trace.z, (row) => Array.from(row)));
}"""
LINES = "() => Array.from(document.querySelectorAll('.x2y2 .js-line'), (line) => line.getAttribute('d')).join()"


@pytest.mark.slow
def test_menus_choose_layer_and_head(opened, pictures):
    tab, weights = opened("attention"), pictures["attention"].weights
    drawn = set()
    for menu, item, layer, head in [(None, "", 0, 0), (0, "layer 2", 1, 0), (1, "head 3", 1, 2), (0, "layer 1", 0, 2)]:
        if menu is not None:
            choose(tab, menu, item)
        (shown,) = tab.evaluate(SHOWN)
        np.testing.assert_allclose(shown, weights[layer, head], atol=1e-7)
        drawn.add(tab.evaluate(LINES))
    assert len(drawn) == 4 and "" not in drawn


@pytest.mark.slow
def test_a_page_fits_into_the_window(opened):
    for name in NAMES:
        tab = opened(name)
        tab.set_viewport_size({"width": 700, "height": 900})
        tab.wait_for_function("document.documentElement.scrollWidth <= 700", timeout=5000)


@pytest.mark.slow
def test_pointing_at_a_cell_shows_its_tokens_and_weight(opened, pictures):
    tab, picture = opened("attention"), pictures["attention"]
    box = tab.locator(".xy .heatmaplayer image, .xy .hm image").first.bounding_box()
    tab.mouse.move(box["x"] + 2, box["y"] + 2)
    tab.wait_for_selector(".hoverlayer .hovertext")
    shown = tab.locator(".hoverlayer .hovertext").text_content()
    assert "1 [CLS]" in shown and f"{picture.weights[0, 0, 0, 0]:.4f}" in shown


@pytest.mark.slow
def test_texts_are_shown_as_they_were_written(opened):
    tab = opened("attention")
    assert EVIL[:40] in tab.locator("h1").inner_text() and tab.title() != "taken"
    labels = opened("similarity").locator(".ytick").all_text_contents()
    assert "<b>cat</b>" in labels and "<a href='x'>$x^2$</a>" in labels


@pytest.mark.slow
def test_a_menu_changes_what_the_axis_of_training_counts(opened):
    tab = opened("training")
    first = "Array.from(figure._fullData[0].x)"
    assert tab.evaluate(first) == [10, 20, 30]
    choose(tab, 0, "minutes")
    assert tab.evaluate(first) == [1, 2, 3]
    choose(tab, 0, "epoch")
    assert tab.evaluate(first) == pytest.approx([1 / 3, 2 / 3, 1])


@pytest.mark.slow
def test_points_in_space_are_drawn(opened, pictures):
    tab = opened("embeddings")
    assert tab.evaluate("figure._fullData.map((trace) => trace.type)") == ["scatter3d"] * 3
    names = tab.locator(".scene .annotation-text, .annotation-text").all_text_contents()
    assert any("$ <b>cat</b>" in name for name in names)
