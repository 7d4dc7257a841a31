import pytest

from galenic.corpus.config import CorpusConfig
from galenic.runtime import UserError


def test_unknown_source_names_the_nearest():
    with pytest.raises(UserError, match=r"limits: unknown source 'wikipedai' \(did you mean 'wikipedia'\?\)"):
        CorpusConfig(out="x", limits={"wikipedai": 3})
    with pytest.raises(UserError, match="weights: unknown source"):
        CorpusConfig(out="x", weights={"nothing": 1.0})


@pytest.mark.parametrize(
    "values",
    [
        {"heldout_share": 0.0},
        {"transfer_share": 0.6},
        {"pair_share": -0.1},
        {"near_duplicate": 1.5},
        {"limits": {"hpo": -1}},
        {"questions": 0},
    ],
)
def test_contradictions_name_the_field(values):
    with pytest.raises(UserError, match=next(iter(values))):
        CorpusConfig(out="x", **values)


def test_reads_are_the_inputs():
    assert CorpusConfig(out="x", wheels="w", requirements="r").reads() == ["r", "w"]
