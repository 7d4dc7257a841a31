from galenic.corpus.tokens.compression import characters_per_token


def test_characters_are_counted_over_all_texts_of_a_domain():
    def words(texts):
        return [list(range(len(text.split()))) for text in texts]

    def letters(texts):
        return [list(range(len(text))) for text in texts]

    def byte(texts):
        return [list(text.encode()) for text in texts]

    domains = {"en": ["a bc", "defgh"], "zh": ["糖尿病"], "none": ["", ""], "nothing": []}
    table = characters_per_token({"words": words, "letters": letters, "bytes": byte}, domains)
    assert table == {
        "en": {"words": 3.0, "letters": 1.0, "bytes": 1.0},
        "zh": {"words": 3.0, "letters": 1.0, "bytes": 1 / 3},
    }
