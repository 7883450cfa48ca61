"""Test recipes: every problem is reported in the user's words; finished stages are skipped, changed ones refused."""

import functools
import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel

from helpers import edit_json, write_recipe
from minibert import MiniBertConfig, MiniBertModel, train_word_level
from minibert.inference.load import open_tokenizer
from minibert.train import run as run_module
from minibert.train.arguments import ClassifyStage, EmbedStage, TokenizerStage
from minibert.train.checkpoint import exclusive_lock
from minibert.train.recipe import load_recipe
from minibert.train.run import read_metrics, run_recipe
from minibert.train.stage import StageContext, load_model, sequence_length

TOKENIZER = {"kind": "tokenizer", "data": "texts.csv"}
CLASSIFY = {"kind": "classify", "data": "pairs.csv", "model": {"preset": "nano-1x3"}}
EMBED = {"kind": "embed", "data": ["pairs.csv", {"path": "owner/set", "split": "test"}]}


@pytest.fixture
def write(tmp_path):
    return functools.partial(write_recipe, tmp_path)


@pytest.fixture
def calls(monkeypatch):
    """Run stages that only write a file; returns the list of what ran, with the resolved contexts."""
    ran = []

    def stage(args, context):
        ran.append((args.name, context))
        (context.output_dir / "model.safetensors").write_text("weights")
        return {"loss": float(len(ran))}

    monkeypatch.setattr(run_module, "_function", lambda args: stage)
    monkeypatch.setattr(run_module, "_check_data", lambda *_: None)
    return ran


def test_a_good_recipe_and_its_overrides(write):
    path = write(TOKENIZER, CLASSIFY, {**EMBED, "name": "search"})
    recipe = load_recipe(path, ["classify.learning_rate=2e-4", "search.max_length=9", "seed=7", "classify.model.hidden_size=6"])
    tokenizer, classify, search = recipe.stages
    assert (type(tokenizer), type(classify), type(search)) == (TokenizerStage, ClassifyStage, EmbedStage)
    assert classify.learning_rate == 2e-4
    assert search.max_length == 9
    assert recipe.seed == 7
    assert classify.model.config(vocab_size=50).hidden_size == 6
    assert (tokenizer.name, search.name) == ("tokenizer", "search")


def test_a_prompt_that_ends_in_a_colon_is_a_text(write):
    (stage,) = load_recipe(write({**EMBED, "model": "a"}), ["embed.query_prompt=query: "]).stages
    assert stage.query_prompt == "query: "


def test_bundled_recipes_load():
    tinybert = load_recipe("tinybert")
    assert [stage.kind for stage in tinybert.stages] == ["tokenizer", "classify", "embed"]
    config = tinybert.stages[1].model.config()
    assert (config.num_hidden_layers, config.hidden_size, config.max_position_embeddings) == (8, 768, 350)
    assert (tinybert.stages[1].epochs, tinybert.stages[2].epochs) == (3, 1)


def test_unknown_recipe_lists_the_bundled_ones():
    with pytest.raises(FileNotFoundError, match="bundled recipes: .*tinybert"):
        load_recipe("no-such-recipe")


def test_all_problems_are_reported_together(write):
    stages = [
        {"kind": "tokenizr", "data": "f.csv"},
        {"kind": "classify", "data": [{"pth": "x"}], "model": {"preset": "nano"}, "epochs": 0, "learning_rte": 1},
        {**EMBED, "learning_rate": "fast"},
    ]
    with pytest.raises(ValueError) as error:
        load_recipe(write(*stages, sed=1), ["classify.nothing", "absent.batch_size=3"])
    message = str(error.value)
    for part in (
        "10 problems",
        "override 'classify.nothing' does not have the form",
        "override 'absent.batch_size=3' names an unknown stage",
        "stage 1 (tokenizr): kind='tokenizr' is unknown; use one of tokenizer, pretrain, classify, tag, answer,",
        "stage 2 (classify): model: There is no preset 'nano'; use one of search-8x768",
        "stage 2 (classify): epochs=0 is not valid: input should be greater than 0",
        "stage 2 (classify): there is no field learning_rte; did you mean learning_rate?",
        "stage 2 (classify): there is no field data.0.pth; did you mean path?",
        "stage 2 (classify): the field data.0.path is missing",
        "stage 3 (embed): learning_rate='fast' is not valid: input should be a valid number",
        "there is no field sed; did you mean seed?",
    ):
        assert part in message


def test_a_single_problem_is_one_line(write):
    with pytest.raises(ValueError) as error:
        load_recipe(write(TOKENIZER, {**CLASSIFY, "model": {"preset": "nano-1x3", "num_attention_heads": 2}}))
    assert "\n" not in str(error.value)
    assert "choose a hidden_size that is a multiple of the number of heads" in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("embed.data=[{path: a.csv, makepairs: true}]", "no field data.0.makepairs; did you mean make_pairs?"),
        ("tokenizer.data=[{path: a.csv, make_pairs: true}]", "no field data.0.make_pairs; the fields are path, config"),
    ],
)
def test_only_sources_of_pairs_say_what_they_hold(write, override, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        load_recipe(write(TOKENIZER, {**EMBED, "model": "a"}), [override])


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([TOKENIZER, EMBED], "stage 2 .embed. has no model;"),
        ([CLASSIFY], "has new weights but no tokenizer"),
        ([TOKENIZER, TOKENIZER], "stage 2 .tokenizer. has the same name as an earlier stage"),
        ([TOKENIZER, {**CLASSIFY, "warmup_steps": 5, "warmup_ratio": 0.1}], "warmup_steps and warmup_ratio are both set"),
        ([TOKENIZER, {**CLASSIFY, "model": {"preset": "nano-1x3", "hiden_size": 4}}], "no field 'hiden_size'"),
        ([TOKENIZER, {**CLASSIFY, "patience": 2}], "patience needs eval_data and metric_for_best"),
        (
            [TOKENIZER, {**CLASSIFY, "kind": "pretrain", "eval_data": "a.txt", "patience": 2}],
            "patience needs eval_data and metric_for",
        ),
        ([{**EMBED, "model": "a", "patience": 2, "eval_data": "a.csv", "metric_for_best": None}], "patience needs eval_data"),
        ([TOKENIZER, {**CLASSIFY, "model": {"preset": "nano-1x3", "hidden_size": "4"}}], "hidden_size.*expected int"),
    ],
)
def test_stages_that_do_not_fit(write, stages, message):
    with pytest.raises(ValueError, match=f"(?i){message}"):
        load_recipe(write(*stages))


@pytest.mark.parametrize("text", ["", "- a", "name: [", "just words"])
def test_not_a_recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="not (a recipe|YAML)"):
        load_recipe(path)


def test_stages_run_in_order_and_hand_on_their_models(write, calls, tmp_path):
    again = {**EMBED, "name": "again", "model": "classify", "loss": "gist", "guide": "embed"}
    recipe = load_recipe(write(TOKENIZER, CLASSIFY, {**EMBED, "seed": 5}, again))
    run_dir = run_recipe(recipe, output_dir=tmp_path / "run")
    contexts = dict(calls)
    assert [name for name, _ in calls] == ["tokenizer", "classify", "embed", "again"]
    assert contexts["classify"].model is None
    assert contexts["classify"].tokenizer == str(run_dir / "1-tokenizer")
    assert contexts["embed"].model == contexts["embed"].tokenizer == contexts["again"].model == str(run_dir / "2-classify")
    assert (contexts["embed"].guide, contexts["again"].guide) == (None, str(run_dir / "3-embed"))
    assert (contexts["classify"].seed, contexts["embed"].seed) == (42, 5)
    assert read_metrics(run_dir)["embed"] == {"loss": 3.0}
    assert json.loads((run_dir / "3-embed" / "stage.json").read_text())["seed"] == 5


def test_finished_stages_are_skipped_and_an_interrupted_one_runs(write, calls, tmp_path):
    recipe = load_recipe(write(TOKENIZER, CLASSIFY, EMBED))
    run_dir = run_recipe(recipe, output_dir=tmp_path / "run")
    (run_dir / "3-embed" / "stage.json").unlink()
    calls.clear()
    run_recipe(recipe, output_dir=run_dir)
    assert [name for name, _ in calls] == ["embed"]


@pytest.mark.parametrize("content", ["name: [", "just words", "name: toy", "name: toy\nstages: [classify]", "\xff\xfe"])
def test_a_damaged_record_of_a_run_is_one_sentence(write, calls, tmp_path, content):
    recipe = load_recipe(write(TOKENIZER, CLASSIFY))
    run_dir = run_recipe(recipe, output_dir=tmp_path / "run")
    (run_dir / "recipe.yaml").write_bytes(content.encode("latin-1"))
    for use in (lambda: run_recipe(recipe, output_dir=run_dir, force=True), lambda: read_metrics(run_dir)):
        with pytest.raises(ValueError, match=r"recipe\.yaml is damaged.*choose another --output-dir"):
            use()
    assert (run_dir / "2-classify" / "stage.json").exists()


@pytest.mark.parametrize("content", [None, "", "{", "7", "\xff"])
def test_damaged_figures_of_a_stage_are_one_sentence(write, calls, tmp_path, content):
    run_dir = run_recipe(load_recipe(write(TOKENIZER)), output_dir=tmp_path / "run")
    file = run_dir / "1-tokenizer" / "metrics.json"
    file.unlink() if content is None else file.write_bytes(content.encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"metrics\.json is missing or damaged; restore this file, or delete .*1-tokenizer and"
    ):
        read_metrics(run_dir)


def test_a_changed_recipe_is_refused_unless_forced(write, calls, tmp_path):
    run_dir = run_recipe(load_recipe(write(TOKENIZER, CLASSIFY, EMBED)), output_dir=tmp_path / "run")
    calls.clear()
    changed = load_recipe(write(TOKENIZER, CLASSIFY, EMBED), ["classify.learning_rate=3e-4", "seed=1"])
    with pytest.raises(
        ValueError, match=r"stage 2 \(classify\) learning_rate was 0.0001 and is now 0.0003; stage 2 .* seed was 42"
    ):
        run_recipe(changed, output_dir=run_dir)
    assert not calls
    assert (run_dir / "2-classify" / "stage.json").exists()
    run_recipe(changed, output_dir=run_dir, force=True)
    assert [name for name, _ in calls] == ["classify", "embed"]


def test_a_finished_result_is_kept_until_its_successor_is_there(write, calls, tmp_path, monkeypatch):
    recipe = load_recipe(write(TOKENIZER, CLASSIFY))
    run_dir = run_recipe(recipe, output_dir=tmp_path / "run")
    changed = load_recipe(write(TOKENIZER, CLASSIFY), ["classify.learning_rate=3e-4"])
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_function", lambda args: lambda args, context: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_recipe(changed, output_dir=run_dir, force=True)
    assert (run_dir / "2-classify.replaced" / "model.safetensors").exists()
    run_recipe(changed, output_dir=run_dir)
    assert sorted(path.name for path in run_dir.iterdir()) == ["1-tokenizer", "2-classify", "recipe.yaml"]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="which computes in fp16")
def test_precision_that_cannot_be_had_is_refused_before_anything_is_replaced(write, calls, tmp_path, monkeypatch):
    half = load_recipe(write(TOKENIZER, CLASSIFY), ["classify.precision=fp16"])
    with pytest.raises(ValueError, match="precision: fp16 needs a GPU; use bf16 or fp32 on this machine"):
        run_recipe(half, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists() and not calls
    run_dir = run_recipe(load_recipe(write(TOKENIZER, CLASSIFY)), output_dir=tmp_path / "run")
    with pytest.raises(ValueError, match="precision: fp16 needs a GPU"):
        run_recipe(half, output_dir=run_dir, force=True)
    assert sorted(path.name for path in run_dir.iterdir()) == ["1-tokenizer", "2-classify", "recipe.yaml"]
    assert (run_dir / "2-classify" / "stage.json").exists()
    with monkeypatch.context() as patch:  # finished where there is a GPU
        patch.setattr(run_module, "check_precision", lambda arguments: None)
        run_recipe(half, output_dir=run_dir, force=True)
    calls.clear()
    run_recipe(half, output_dir=run_dir)
    assert not calls


def test_force_does_not_take_the_folder_of_a_run_that_is_at_work(write, calls, tmp_path):
    run_dir = run_recipe(load_recipe(write(TOKENIZER, CLASSIFY)), output_dir=tmp_path / "run")
    changed = load_recipe(write(TOKENIZER, CLASSIFY), ["classify.learning_rate=3e-4"])
    with exclusive_lock(run_dir / "2-classify"), pytest.raises(ValueError, match="is training in .*2-classify"):
        run_recipe(changed, output_dir=run_dir, force=True)
    assert (run_dir / "2-classify" / "stage.json").exists()


def test_a_stage_of_any_kind_locks_its_folder(write, calls, tmp_path, monkeypatch):
    def stage(args, context):
        with pytest.raises(ValueError, match="is training in"), exclusive_lock(context.output_dir):
            pass
        calls.append(args.name)
        return {}

    monkeypatch.setattr(run_module, "_function", lambda args: stage)
    run_recipe(load_recipe(write(TOKENIZER, CLASSIFY, EMBED)), output_dir=tmp_path / "run")
    assert len(calls) == 3 and not list(tmp_path.rglob(".lock"))


def test_a_home_folder_is_understood_everywhere(write, calls, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "vocabulary").mkdir()
    (tmp_path / "encoder").mkdir()
    save_file({"weight": torch.zeros(1)}, tmp_path / "encoder" / "model.safetensors")
    recipe = load_recipe(write({**CLASSIFY, "model": "~/encoder", "tokenizer": "~/vocabulary"}, output_dir="~/runs/toy"))
    assert run_recipe(recipe) == tmp_path / "runs" / "toy"
    ((_, context),) = calls
    assert (context.model, context.tokenizer) == (str(tmp_path / "encoder"), str(tmp_path / "vocabulary"))
    with pytest.raises(FileNotFoundError, match="no model folder ~/nosuch"):
        run_recipe(load_recipe(write({**CLASSIFY, "tokenizer": "~/nosuch"}, name="other")))


def test_fields_that_do_not_change_the_result_may_change(write, calls, tmp_path):
    run_dir = run_recipe(load_recipe(write(TOKENIZER, CLASSIFY)), output_dir=tmp_path / "run")
    calls.clear()
    run_recipe(load_recipe(write(TOKENIZER, CLASSIFY, EMBED), ["classify.num_workers=2"]), output_dir=run_dir)
    assert [name for name, _ in calls] == ["embed"]  # the other stages were not changed


def test_other_folders_are_left_alone(write, calls, tmp_path):
    recipe = load_recipe(write(TOKENIZER, CLASSIFY))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not a run of a recipe; choose another --output-dir"):
        run_recipe(recipe, output_dir=tmp_path / "full", force=True)
    run_recipe(recipe, output_dir=tmp_path / "run")
    with pytest.raises(ValueError, match="is a run of recipe 'toy'; choose another --output-dir"):
        run_recipe(load_recipe(write(TOKENIZER, CLASSIFY, name="other")), output_dir=tmp_path / "run", force=True)
    assert (tmp_path / "full" / "thesis.tex").exists()


def test_the_tokenizer_stage_reads_every_text(write, tmp_path):
    (tmp_path / "one.csv").write_text("text,label\nred apples,0\ngreen pears,1\n", encoding="utf-8")
    (tmp_path / "two.jsonl").write_text('{"query": "blue plums"}\n', encoding="utf-8")
    stage = {
        "kind": "tokenizer",
        "data": [str(tmp_path / "one.csv"), str(tmp_path / "two.jsonl")],
        "method": "word_level",
        "vocab_size": 11,
        "max_length": 9,
    }
    run_dir = run_recipe(load_recipe(write(stage)), output_dir=tmp_path / "run")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run_dir / "1-tokenizer", trust_remote_code=False)
    assert {"red", "apples", "green", "pears", "blue", "plums"} <= set(tokenizer.get_vocab())
    assert tokenizer.model_max_length == 9
    metrics = read_metrics(run_dir)["tokenizer"]
    assert (metrics["rows"], metrics["vocab_size"]) == (3, 11)
    assert metrics["data"][0]["columns"] == {"text": "text"} and metrics["data"][0]["first_row"] == {"text": "red apples"}


def test_starts_that_cannot_be_used_are_refused_in_one_sentence(tmp_path):
    tokenizer = train_word_level(["red apples green pears"], vocab_size=9)
    config = MiniBertConfig.preset("nano-1x3", vocab_size=len(tokenizer))
    with pytest.raises(ValueError, match="max_length must be at least 3, .* 2 special tokens and a token of text; got 2"):
        sequence_length(2, config, tokenizer)
    assert sequence_length(3, config, tokenizer) == 3
    tokenizer.save_pretrained(tmp_path)
    MiniBertModel(config).save_pretrained(tmp_path)
    context = StageContext(tmp_path / "out", 0, str(tmp_path), str(tmp_path))
    stage = ClassifyStage(kind="classify", data="texts.csv")
    load_model(AutoModel, stage, context, open_tokenizer(tmp_path))
    edit_json(tmp_path / "config.json", intermediate_size=7)
    with pytest.raises(ValueError, match="do not have the shapes in config.json"):
        load_model(AutoModel, stage, context, tokenizer)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json is not the file of a tokenizer"):
        open_tokenizer(tmp_path)
