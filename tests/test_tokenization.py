"""Test the tokenizers: BERT's conventions, reloading without this package, one vocabulary per corpus, and refusals."""

import functools
import hashlib
import json
import logging
import os
import unicodedata
import warnings
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast

from helpers import run_python
from minibert import tokenization_minibert
from minibert.files import tokenizer_files
from minibert.tokenization_minibert import SPECIAL_TOKENS, train_word_level, train_wordpiece

CORPUS = [
    "The encoder reads a sentence and writes a vector.",
    "Encoders are trained on sentences; decoders write them.",
    "A trained encoder encodes unseen words from pieces: reading, writing, trained, training.",
    "Ünïcode is fine, and so are 中文 and ελληνικά.",
] * 3
LANGUAGES = {
    "Hindi": """
        आज सुबह बहुत ठंड थी।
        मेरी बहन हर शाम किताब पढ़ती है।
        बच्चे मैदान में क्रिकेट खेल रहे हैं।
        हमने बाज़ार से ताज़े फल ख़रीदे।
        क्या आप मुझे रास्ता दिखा सकते हैं?
        ट्रेन बीस मिनट देर से आई।
        दादी ने कहानी सुनाई और सब हँसने लगे।
        इस शहर में तीन पुराने पुल हैं।
        मुझे चाय में थोड़ी अदरक पसंद है।
        वह अंग्रेज़ी और हिंदी दोनों बोलता है।
        खिड़की खोल दो, हवा अच्छी चल रही है।
        कल रात ज़ोर की बारिश हुई।
        विद्यार्थियों ने प्रश्न पूछे।
        यह नक़्शा १९५० में छपा था।
        किसान ने खेत में गेहूँ बोया।
        दूध ठंडा हो गया, फिर से गरम करो।
        नदी के किनारे एक छोटा मंदिर है।
        डॉक्टर ने मुझे आराम करने को कहा।
        हम अगले महीने पहाड़ों पर जाएँगे।
        लड़के ने गेंद ऊपर फेंकी।""",
    "Thai": """
        วันนี้อากาศดีมาก
        แม่ไปซื้อผักที่ตลาดเช้า
        น้องชายของฉันชอบเล่นฟุตบอล
        ร้านนี้ทำก๋วยเตี๋ยวอร่อยที่สุด
        คุณจะไปเชียงใหม่เมื่อไร
        ฝนตกหนักทั้งคืน ถนนจึงมีน้ำท่วม
        ครูเขียนคำตอบบนกระดาน
        หนังสือเล่มนี้หนากว่าเล่มนั้น
        เราขึ้นรถไฟตอนหกโมงเช้า
        แมวสองตัวนอนอยู่ใต้โต๊ะ
        ช่วยปิดประตูด้วยนะครับ
        ปู่ปลูกต้นมะม่วงไว้หลังบ้าน
        พรุ่งนี้มีสอบวิชาคณิตศาสตร์
        เด็กๆ วิ่งเล่นริมทะเล
        กาแฟแก้วนี้ร้อนเกินไป
        หมอบอกให้ดื่มน้ำเยอะๆ
        ตั๋วราคาห้าสิบบาทต่อคน
        เธอร้องเพลงเก่าให้ทุกคนฟัง
        ไฟฟ้าดับไปสองชั่วโมง
        ฉันลืมกุญแจไว้ที่ทำงาน""",
    "Japanese": """
        今日はとても寒いです。
        妹は毎晩本を読みます。
        子どもたちが公園で遊んでいる。
        駅までどのくらいかかりますか。
        電車が二十分おくれました。
        このパンはまだ温かい。
        祖母の話を聞いて、みんなが笑った。
        窓をあけてください。
        きのうの夜、つよい雨がふった。
        彼は英語とドイツ語を話せる。
        コーヒーにミルクを入れますか。
        川のそばに小さな寺がある。
        先生に質問をしてもいいですか。
        がんばれば、きっとできるよ。
        ギターをひくのが好きだ。
        来月、山へ行くつもりです。
        テレビのプログラムを見た。
        財布をどこかに忘れてしまった。
        ペンと紙を持ってきてね。
        ねこがテーブルの下で眠っている。""",
    "Korean": """
        오늘은 날씨가 아주 춥다.
        동생은 매일 책을 읽는다.
        아이들이 공원에서 놀고 있다.
        역까지 얼마나 걸려요?
        기차가 이십 분 늦게 왔다.
        이 빵은 아직 따뜻하다.
        할머니 이야기에 모두 웃었다.
        창문을 열어 주세요.
        어제 밤에 비가 많이 왔다.
        그는 영어와 한국어를 한다.
        커피에 우유를 넣을까요?
        강가에 작은 절이 있다.
        선생님께 질문을 해도 돼요?
        나는 기타 치는 것을 좋아한다.
        다음 달에 산에 갈 것이다.
        지갑을 집에 두고 왔다.
        고양이가 책상 아래에서 잔다.
        농부가 밭에 씨를 뿌렸다.
        물을 많이 마시는 것이 좋다.
        그 길은 너무 좁고 어둡다.""",
    "Arabic": """
        الطقس بارد جدا هذا الصباح.
        أختي تقرأ كتابا كل مساء.
        يلعب الأطفال في الحديقة.
        كم يستغرق الطريق إلى المحطة؟
        تأخر القطار عشرين دقيقة.
        هذا الخبز ما زال ساخنا.
        حكت جدتي قصة فضحك الجميع.
        افتح النافذة من فضلك، الهواء لطيف.
        هطل المطر بغزارة ليلة أمس.
        هو يتكلم العربية والإنجليزية.
        هل تريد سكرا في القهوة؟
        يوجد مسجد صغير قرب النهر.
        سأل الطلاب أسئلة كثيرة.
        سنسافر إلى الجبال في الشهر القادم.
        نسيت المفتاح في المكتب.
        القطة نائمة تحت الطاولة.
        زرع الفلاح القمح في حقله.
        قال الطبيب إن الراحة ضرورية.
        آخر رسالة وصلت قبل ثلاثة أيام.
        هؤلاء أصدقائي منذ الطفولة، شُكرًا لهم.""",
    "Russian": """
        Сегодня утром очень холодно.
        Моя сестра каждый вечер читает книгу.
        Дети играют в парке у реки.
        Сколько ехать до вокзала?
        Поезд опоздал на двадцать минут.
        Этот хлеб ещё тёплый.
        Бабушка рассказала историю, и все засмеялись.
        Открой, пожалуйста, окно.
        Вчера ночью шёл сильный дождь.
        Он говорит по-русски и по-немецки.
        Положить сахар в чай?
        На том берегу стоит маленький храм.
        Ученики задали много вопросов.
        В следующем месяце мы поедем в горы.
        Я забыл ключ в офисе.
        Кошка спит под столом.
        Крестьянин посеял пшеницу.
        Врач сказал, что нужен отдых.
        Йогурт стоит в холодильнике.
        Её объявление видел каждый третий прохожий.""",
}
KINDS = {"wordpiece": train_wordpiece, "word_level": train_word_level}


def quietly(train, *args, **kwargs) -> PreTrainedTokenizerFast:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train(*args, **kwargs)


@pytest.fixture(scope="module")
def wordpiece() -> PreTrainedTokenizerFast:
    return train_wordpiece(CORPUS, vocab_size=130)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request) -> PreTrainedTokenizerFast:
    return quietly(KINDS[request.param], CORPUS, vocab_size=130, model_max_length=32)


def test_special_tokens_come_first_and_every_id_is_used_once(tokenizer):
    assert tokenizer.convert_ids_to_tokens(range(5)) == list(SPECIAL_TOKENS)
    named = (tokenizer.pad_token, tokenizer.unk_token, tokenizer.cls_token, tokenizer.sep_token, tokenizer.mask_token)
    assert named == SPECIAL_TOKENS
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert tokenizer.model_max_length == 32


def test_pairs_have_two_segments(tokenizer):
    pair = tokenizer("the encoder", "reads a sentence")
    tokens = tokenizer.convert_ids_to_tokens(pair["input_ids"])
    assert (tokens[0], tokens[-1], tokens.count("[SEP]")) == ("[CLS]", "[SEP]", 2)
    second = tokens.index("[SEP]") + 1
    assert pair["token_type_ids"] == [0] * second + [1] * (len(tokens) - second)
    assert set(pair) == {"input_ids", "token_type_ids", "attention_mask"}
    assert set(tokenizer("the encoder")["token_type_ids"]) == {0}


def test_padding_and_truncation(tokenizer):
    batch = tokenizer(["a vector", "a sentence and a vector " * 20], padding=True, truncation=True, return_tensors="pt")
    assert batch["input_ids"].shape == (2, 32)
    real = int(batch["attention_mask"][0].sum())
    assert real < 32 and set(batch["input_ids"][0, real:].tolist()) == {0}
    assert batch["input_ids"][1, -1] == tokenizer.sep_token_id


@pytest.mark.parametrize(("side", "kept"), [("right", "one two"), ("left", "three four")])
def test_the_side_where_long_texts_are_cut_is_saved(tmp_path, side, kept):
    train_word_level(["one two three four"], vocab_size=9, truncation_side=side).save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    ids = reloaded("one two three four", truncation=True, max_length=4)["input_ids"]
    assert reloaded.decode(ids) == f"[CLS] {kept} [SEP]"


@pytest.mark.slow
def test_reloads_without_our_code(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "saved")
    assert {path.suffix for path in (tmp_path / "saved").iterdir()} == {".json"}
    script = (
        "import json, sys; from transformers import AutoTokenizer\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False)\n"
        "assert not any(name.split('.')[0] == 'minibert' for name in sys.modules)\n"
        "print(json.dumps([dict(tokenizer(*json.loads(sys.argv[2]))), tokenizer.model_max_length, tokenizer.mask_token_id]))"
    )
    texts = ["Encoders read ünseen [MASK] sentences", "and 中文, e.g. zebras"]
    printed = run_python(script, tmp_path / "saved", json.dumps(texts), cwd=tmp_path)
    assert json.loads(printed) == [dict(tokenizer(*texts)), 32, 4]


def test_wordpiece_agrees_with_berts_tokenizer_on_the_same_vocabulary(wordpiece):
    theirs = BertTokenizer(vocab=wordpiece.get_vocab())
    for text in [*CORPUS, "Ångström [MASK] don't", "tabs\tand\x00controls\u200b", "e\u0301", "中文字", "", "x" * 300, "a##b"]:
        assert wordpiece(text)["input_ids"] == theirs(text)["input_ids"], text
        assert wordpiece.decode(wordpiece(text)["input_ids"]) == theirs.decode(theirs(text)["input_ids"]), text


def test_wordpiece_builds_unseen_words_from_pieces(wordpiece):
    tokens = wordpiece.tokenize("encoding")
    assert len(tokens) > 1 and "[UNK]" not in tokens
    assert not tokens[0].startswith("##") and all(token.startswith("##") for token in tokens[1:])
    assert "".join(token.removeprefix("##") for token in tokens) == "encoding"


@settings(max_examples=50, deadline=None)
@given(words=st.lists(st.text("acdeginorstw", min_size=1, max_size=20), max_size=10))
def test_wordpiece_round_trip(words):
    tokenizer = _round_trip_tokenizer()
    ids = tokenizer(" ".join(words))["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == " ".join(words)


@functools.cache
def _round_trip_tokenizer() -> PreTrainedTokenizerFast:
    letters = "acdeginorstw"
    return quietly(train_wordpiece, [*CORPUS, " ".join(a + b for a in letters for b in letters)], vocab_size=250)


def test_round_trip_of_known_text(tokenizer):
    known = "the encoder reads a sentence and writes a vector."
    assert tokenizer.decode(tokenizer(known.upper())["input_ids"], skip_special_tokens=True) == known


def test_unknown_words(tokenizer):
    tokens = tokenizer.tokenize("the 🜁 vector")
    assert tokens.count("[UNK]") == 1 and tokens[0] == "the"
    assert tokenizer("🜁")["input_ids"] == [2, 1, 3]


def test_word_level_knows_whole_words_only():
    tokenizer = quietly(train_word_level, ["red red red green green blue", "(red)"], vocab_size=8)
    assert tokenizer.get_vocab() == {**{token: i for i, token in enumerate(SPECIAL_TOKENS)}, "red": 5, "green": 6, "(": 7}
    assert tokenizer.tokenize("Red greens blue") == ["red", "[UNK]", "[UNK]"]
    assert len(quietly(train_word_level, ["red red green"], min_frequency=2)) == 6


def test_case_and_accents_are_kept_on_request():
    for train in KINDS.values():
        assert quietly(train, ["Étude Étude étude"], lowercase=False).tokenize("Étude") == ["Étude"]
        assert quietly(train, ["Étude Étude étude"], lowercase=True).tokenize("ÉTUDE") == ["etude"]


def test_unicode_scripts_have_pieces_of_their_own(wordpiece):
    assert wordpiece.tokenize("中文") == ["中", "文"]  # a character each, as BERT has it
    assert "[UNK]" not in wordpiece.tokenize("ελληνικά Ünïcode")
    assert wordpiece.tokenize("Ünïcode") == wordpiece.tokenize("unicode")


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_letter_of_a_language_is_lost(tmp_path, caplog, monkeypatch, language):
    texts = [line.strip() for line in LANGUAGES[language].strip().splitlines()]
    assert len(texts) == 20
    with caplog.at_level(logging.INFO, "minibert"):
        made = quietly(train_wordpiece, texts, vocab_size=400)
    assert "Accents are kept: stripping takes letters from" in caplog.text
    made.save_pretrained(tmp_path)
    monkeypatch.setattr(tokenizer_files, "_try", None)  # it is of the usual kind, which no other process has to open first
    tokenizer_files.check_tokenizer(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    assert reloaded.is_fast
    for text in texts:
        expected = unicodedata.normalize("NFC", text)
        for form in ("NFC", "NFD"):  # both spellings of a letter with marks
            ids = made(unicodedata.normalize(form, text))["input_ids"]
            assert made.unk_token_id not in ids and ids == reloaded(unicodedata.normalize(form, text))["input_ids"]
            decoded = made.decode(ids, skip_special_tokens=True)
            assert decoded == reloaded.decode(ids, skip_special_tokens=True)
            assert "".join(decoded.split()) == "".join(expected.lower().split())


def test_accents_are_stripped_where_few_words_lose_letters(caplog):
    """The normalizer and the vocabulary are then those of the plain choice."""
    texts = ["Étude naïve, ελληνικά ❤\ufe0f " * 60 + "й"]
    with caplog.at_level(logging.INFO, "minibert"):
        chosen = quietly(train_wordpiece, texts)
    assert "Accents are stripped" in caplog.text
    told = quietly(train_wordpiece, texts, strip_accents=True)
    assert chosen.get_vocab() == told.get_vocab() and {"etude", "naive", "ελληνικα", "и"} <= chosen.get_vocab().keys()
    saved = json.loads(chosen.backend_tokenizer.to_str())["normalizer"]
    assert (saved["type"], saved["lowercase"], saved["strip_accents"]) == ("BertNormalizer", True, None)


@pytest.mark.parametrize("train", KINDS.values(), ids=KINDS)
def test_case_and_accents_are_separate_choices(train):
    for lowercase, strip, expected in (
        (True, False, "étude"),
        (False, True, "Etude"),
        (False, None, "Étude"),
        (False, False, "Étude"),
    ):
        made = quietly(train, ["Étude"], lowercase=lowercase, strip_accents=strip, min_frequency=1)
        assert made.tokenize("Étude") == [expected]
    stripped = quietly(train, ["йод чай"], strip_accents=True, min_frequency=1)
    assert stripped.tokenize("йод чай") == ["иод", "чаи"]


@pytest.mark.parametrize("empty", ["", "  \n\t ", "\u200b"])
def test_empty_text_is_two_special_tokens(tokenizer, empty):
    assert tokenizer(empty)["input_ids"] == [2, 3]


def test_a_very_long_text(tokenizer):
    text = ("the encoder reads a sentence " * 4000)[:100_000]
    whole = tokenizer(text)["input_ids"]
    assert len(whole) > 15_000
    assert tokenizer(text, truncation=True)["input_ids"] == [*whole[:31], 3]
    assert tokenizer("x" * 100_000)["input_ids"] == [2, 1, 3]


def test_words_split_beforehand(tokenizer):
    words = ["Encoders", "write", "", "vector."]
    split = tokenizer(words, is_split_into_words=True)
    assert split["input_ids"] == tokenizer("Encoders write vector.")["input_ids"]
    numbers = split.word_ids()
    assert (numbers[0], numbers[-1]) == (None, None)
    assert sorted(set(numbers[1:-1])) == [0, 1, 3]  # the full stop belongs to the word it was given with


def test_training_reads_a_stream_once_and_in_bounded_memory(monkeypatch):
    expected = quietly(train_wordpiece, CORPUS, vocab_size=130).get_vocab()
    monkeypatch.setattr(tokenization_minibert, "_MOST_CHUNKS", 3)  # settles the counts after nearly every text
    assert quietly(train_wordpiece, (text for text in CORPUS), vocab_size=130).get_vocab() == expected

    class Counted(Counter):
        longest = 0

        def update(self, words):
            super().update(words)
            Counted.longest = max(Counted.longest, len(self))

    monkeypatch.setattr(tokenization_minibert, "Counter", Counted)
    monkeypatch.setattr(tokenization_minibert, "_MOST_WORDS", 50)
    stream = (f"it is always there {number}" for number in range(2000))
    words = tokenization_minibert._count_words(stream, True, None, False)[0]
    assert len(words) <= 50 and words["always"] == words["there"] == 2000
    assert Counted.longest <= 3 + 5  # the chunks of one more text


def test_words_too_long_to_be_tokens_are_not_learnt():
    words, _ = tokenization_minibert._count_words(["a" * 100, "b" * 101], True, None, False)
    assert words == {"a" * 100: 1}


def test_counts_beyond_32_bits_are_scaled_down(monkeypatch):
    monkeypatch.setattr(tokenization_minibert, "_MOST_TRAINED_WORDS", 100)
    fed = " ".join(tokenization_minibert._repeated({"common": 3000, "less": 1000, "rare": 1})).split()
    assert (fed.count("common"), fed.count("less"), fed.count("rare")) == (74, 25, 1)


def test_long_counts_are_fed_whole():
    fed = list(tokenization_minibert._repeated({"common": 2500, "rare": 2}))
    assert sum(text.split().count("common") for text in fed) == 2500 and fed[-1] == "rare rare"


TRAIN_ELSEWHERE = """
import hashlib, json, sys
from minibert import tokenization_minibert as ours
texts = json.load(open(sys.argv[1], encoding="utf-8"))
tokenizer = getattr(ours, sys.argv[2])(texts, vocab_size=600)
print(hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest())
"""


def many_ties() -> list[str]:
    """Pseudo-words whose pairs tie all the time: the library alone gives another vocabulary in nearly every run."""
    letters = str.maketrans("0123456789", "ghijklmnop")
    return [hashlib.sha256(str(number).encode()).hexdigest().translate(letters) for number in range(400)]


@pytest.mark.slow
def test_the_same_texts_give_the_same_vocabulary_in_another_process(tmp_path):
    texts = [" ".join(word[i : i + 8] for i in range(0, 64, 8)) for word in many_ties()]
    (tmp_path / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    for name, train in (("train_wordpiece", train_wordpiece), ("train_word_level", train_word_level)):
        vocabulary = json.dumps(train(texts, vocab_size=600).get_vocab(), sort_keys=True)
        answers = {hashlib.sha256(vocabulary.encode()).hexdigest()}
        for environment in (
            {"RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "1"},
            {"RAYON_NUM_THREADS": "4", "PYTHONHASHSEED": "2"},
        ):
            printed = run_python(TRAIN_ELSEWHERE, tmp_path / "texts.json", name, env={**os.environ, **environment})
            answers.add(printed.strip())
        assert len(answers) == 1, name


def test_characters_too_rare_to_learn_do_not_eat_the_vocabulary():
    texts = ["common words " * 2000, "".join(map(chr, range(0x0E01, 0x0E03)))]
    vocabulary = quietly(train_wordpiece, texts, vocab_size=100).get_vocab()
    assert "ก" not in vocabulary and "common" in vocabulary


def test_a_vocabulary_larger_than_the_text_supports_says_how_far_it_got():
    for train in KINDS.values():
        with pytest.warns(UserWarning, match="are enough for .* entries, fewer than vocab_size=5000") as caught:
            tokenizer = train(CORPUS, vocab_size=5000)
        assert f"the tokenizer has {len(tokenizer)}" in str(caught[0].message)


def test_a_vocabulary_that_is_filled_has_the_size_asked_for(recwarn):
    assert len(train_wordpiece(CORPUS, vocab_size=130)) == 130
    assert len(train_word_level(CORPUS, vocab_size=20)) == 20
    assert not [warning for warning in recwarn if "vocabulary" in str(warning.message)]


@pytest.mark.parametrize("texts", [[], [""], ["  ", "\n"], iter(())], ids=["none", "empty", "blank", "spent iterator"])
@pytest.mark.parametrize("train", KINDS.values(), ids=KINDS)
def test_an_empty_corpus_is_refused(train, texts):
    with pytest.raises(ValueError, match="cannot be trained on [012] texts without a word"):
        train(texts)


@pytest.mark.parametrize("train", KINDS.values(), ids=KINDS)
def test_texts_of_the_wrong_type_are_refused(train):
    with pytest.raises(ValueError, match="one string was given; put it into a list"):
        train("a text")
    with pytest.raises(ValueError, match="Text 2 of the tokenizer's corpus is None"):
        train(["a text", None])


def test_a_vocabulary_too_small_is_refused_with_the_size_needed():
    with pytest.raises(ValueError, match=r"vocab_size=8 is too small: the 3 characters .* need 10 entries"):
        train_wordpiece(["abc"], vocab_size=8)
    assert len(train_wordpiece(["abc"], vocab_size=10)) == 10
    with pytest.raises(ValueError, match="vocab_size=5 is too small.*at least 6"):
        train_word_level(["abc"], vocab_size=5)
    assert len(train_word_level(["abc"], vocab_size=6)) == 6


def test_progress_is_silent_unless_asked_for(capfd, monkeypatch):
    monkeypatch.setattr(logging.getLogger("minibert"), "handlers", [])  # those of commands that earlier tests ran
    quietly(train_wordpiece, CORPUS, vocab_size=130)
    assert capfd.readouterr() == ("", "")
    quietly(train_wordpiece, CORPUS, vocab_size=130, show_progress=True)
    output = capfd.readouterr()
    assert output.out == "" and "Counting words" in output.err


def test_a_reloaded_tokenizer_is_saved_again_unchanged(tokenizer, tmp_path: Path):
    tokenizer.save_pretrained(tmp_path / "first")
    again = AutoTokenizer.from_pretrained(tmp_path / "first", trust_remote_code=False)
    again.save_pretrained(tmp_path / "second")
    read = [json.loads((tmp_path / name / "tokenizer.json").read_text(encoding="utf-8")) for name in ("first", "second")]
    assert read[0] == read[1]
