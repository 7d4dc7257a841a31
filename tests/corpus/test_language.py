import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galenic.corpus.cleaning import language
from galenic.corpus.cleaning.measure import measure
from galenic.corpus.texts import buffers, column

SENTENCES = {
    "en": "The patient was admitted with fever and a cough, and a chest film showed pneumonia of the left lung.",
    "zh": "患者因发热、咳嗽三天入院，胸部CT显示左肺下叶肺炎，给予抗感染治疗后好转。",
    "es": "El paciente ingresó en el hospital con fiebre y tos, y la radiografía mostró una neumonía.",
    "pt": "O paciente foi internado com febre e tosse, e a radiografia do tórax mostrou pneumonia à esquerda.",
    "fr": "Le patient a été admis à l'hôpital avec de la fièvre et une toux, et la radiographie montre une pneumonie.",
    "de": "Der Patient wurde mit Fieber und Husten aufgenommen, und das Röntgenbild zeigte eine Lungenentzündung.",
    "it": "Il paziente è stato ricoverato con febbre e tosse, e la radiografia ha mostrato una polmonite a sinistra.",
    "nl": "De patiënt is opgenomen met koorts en hoesten, en in de foto van de borst is een longontsteking te zien.",
    "da": "Patienten blev indlagt med feber og hoste, og røntgenbilledet viste en lungebetændelse i venstre side.",
    "ru": "Пациент поступил с лихорадкой и кашлем, рентгенография показала пневмонию левого лёгкого.",
    "uk": "Пацієнт надійшов з гарячкою та кашлем, рентгенографія виявила пневмонію лівої легені.",
    "ar": "أدخل المريض إلى المستشفى بسبب الحمى والسعال وأظهرت الأشعة التهابا رئويا في الجانب الأيسر",
    "ja": "患者は発熱と咳で入院し、胸部レントゲンで左下葉の肺炎が認められた。",
    "ko": "환자는 발열과 기침으로 입원하였으며 흉부 사진에서 폐렴이 관찰되었다.",
    "th": "ผู้ป่วยเข้ารับการรักษาด้วยอาการไข้และไอ",
    "el": "Ο ασθενής εισήχθη με πυρετό και βήχα και διαγνώστηκε πνευμονία.",
    "hi": "रोगी को बुखार और खांसी के साथ भर्ती किया गया और एक्स-रे में निमोनिया दिखा।",
}


def identify(*texts):
    data, starts = buffers(column(texts))
    return language.identify(data, starts, measure(data, starts))


def test_each_language():
    assert dict(zip(SENTENCES, identify(*SENTENCES.values()), strict=True)) == {
        label: label for label in SENTENCES
    }


def test_both_scripts_of_chinese_and_what_is_mixed():
    assert identify("心肌梗塞是冠狀動脈阻塞引起的疾病。", "心肌梗死是冠状动脉阻塞引起的疾病。") == [
        "zh",
        "zh",
    ]
    assert identify("你好，很高兴认识你。\nHello, nice to meet you.") == ["en-zh"]
    assert identify("患者使用aspirin 100 mg治疗心肌梗死后病情稳定，出院随访。") == ["zh"]
    assert identify("12.5 / 30 !", "") == ["und", "und"]


def test_a_few_han_letters_do_not_make_another_language_chinese():
    assert identify("Пациент поступил с лихорадкой (发热) и кашлем (咳嗽), диагноз пневмония.") == ["ru"]


def test_evident_english_does_not_ask_the_model(monkeypatch):
    text = (
        "The rise of the pressure is to be expected, and that is a sign of failure in patients that have it."
    )
    monkeypatch.setattr(language, "classify", lambda data, starts, which: ["asked"] * len(which))
    assert identify(text, SENTENCES["nl"]) == ["en", "asked"]


def test_shouting_is_heard_in_lower_case():
    assert identify(SENTENCES["de"].upper().replace("Ö", "ö").replace("Ü", "ü")) == ["de"]


@given(st.lists(st.sampled_from(list(SENTENCES.values())) | st.text(max_size=80), min_size=1, max_size=5))
@settings(deadline=None, max_examples=60)
def test_the_loop_says_what_py3langid_says(texts):
    langid = pytest.importorskip("py3langid.langid")
    theirs = _identifier(langid)
    data, starts = buffers(column(texts))
    ours = language.classify(data, starts, np.arange(len(texts)), sample=200)
    for text, label in zip(texts, ours, strict=True):
        start = text.encode()[:200]
        scores = theirs._raw_score(start.lower() if start.isupper() else start)
        if label == "und":
            assert scores.max() == langid.RAW_FLOOR
        else:
            own = max(score for score, name in zip(scores, theirs.nb_classes, strict=True) if name == label)
            assert own >= scores.max() - 1e-3 * abs(scores.max())


def _identifier(langid, known=[]):  # noqa: B006 loaded once
    if not known:
        known.append(langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE))
        known[0].set_languages(language.LANGUAGES)
    return known[0]
