"""A model behind an address: what is asked, what is understood, and what goes wrong."""

import io
import json

import pytest
from chat_helpers import FakeOpenAI, serving

from galenic.chat import chat
from galenic.chat.config import ChatConfig, Sampling
from galenic.chat.endpoint import Endpoint, Failed, Piece, _lines
from galenic.runtime import UserError, read_jsonl

QUESTION = [{"role": "user", "content": "Fever?"}]


@pytest.fixture
def server():
    with serving(FakeOpenAI(lambda body: ["It is ", "warm.\u2028", "发热"])) as server:
        yield server


def answer(server, sampling=None, **options):
    endpoint = Endpoint(server.url, **options)
    try:
        return list(endpoint.stream(QUESTION, sampling or Sampling()))
    finally:
        endpoint.close()


def test_an_answer_comes_in_pieces_and_the_request_is_openais(server):
    pieces = answer(server)
    assert pieces == [
        *map(lambda text: Piece(text=text), ["It is ", "warm.\u2028", "发热"]),
        Piece(finish="stop"),
    ]
    assert server.bodies == [
        {
            "model": "fake-model",
            "messages": QUESTION,
            "stream": True,
            "max_tokens": 200,
            "temperature": 0.7,
            "top_p": 0.9,
            "seed": 0,
        }
    ]
    assert server.keys == [None]


def test_what_is_not_openais_is_sent_only_where_it_matters(server):
    answer(server, Sampling(top_k=5, repetition_penalty=1.2, seed=None), model="mine")
    assert server.bodies[0]["top_k"] == 5 and server.bodies[0]["repetition_penalty"] == 1.2
    assert server.bodies[0]["model"] == "mine" and "seed" not in server.bodies[0]
    answer(server, Sampling(top_k=5), generation_config=True)
    drawn = json.loads(server.bodies[1].pop("generation_config"))
    assert drawn == {
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "repetition_penalty": 1.0,
    }
    assert not {"top_k", "temperature", "top_p"} & server.bodies[1].keys()
    answer(server, Sampling(temperature=0), generation_config=True)
    assert json.loads(server.bodies[2]["generation_config"]) == {
        "do_sample": False,
        "repetition_penalty": 1.0,
    }


def test_a_server_that_does_not_stream_or_tells_no_reason(server):
    server.streams = False
    assert answer(server) == [Piece(text="It is warm.\u2028发热", finish="stop")]
    server.streams, server.pieces, server.finish = True, lambda body: ["a", b"data: [DONE]"], None
    assert answer(server) == [Piece(text="a"), Piece(finish="stop")]


@pytest.mark.parametrize(
    ("pieces", "says"),
    [
        ([b'data: {"error": {"message": "no memory"}}'], "no memory"),
        ([b'data: {"error": "no memory"}'], "no memory"),
        ([b"data: {nonsense"], "no chat completion"),
        ([b'data: {"choices": [{"delta": {"content": 5}}]}'], "no chat completion"),
        ([b"data: []"], "no chat completion"),
        ([b"data: " + b"x" * (3 << 20)], "line without end"),
        (["half"], "ended before the answer did"),
    ],
)
def test_an_answer_that_is_none(server, pieces, says):
    server.pieces, server.finish = lambda body: pieces, None
    with pytest.raises(Failed, match=says):
        answer(server)


def test_a_server_that_never_stops_is_left(server):
    """It ignores max_tokens: the answer is cut, and the request ended."""

    def endless(body):
        while True:
            yield "over and over " * 20

    server.pieces = endless
    pieces = answer(server, Sampling(max_new_tokens=10))
    assert pieces[-1].finish == "length" and sum(len(piece.text) for piece in pieces) < 1000
    assert server.left.wait(10)


def test_refusals_are_told_and_the_key_is_not(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    server.status, server.pieces = 401, lambda body: ['{"error": {"message": "bad key sk-very-secret"}}']
    with pytest.raises(Failed) as caught:
        answer(server, api_key_env="MY_KEY")
    assert server.keys == ["Bearer sk-very-secret"]
    assert "401: bad key ***; is the key in --api_key_env right?" in str(caught.value)
    server.status, server.pieces = 422, lambda body: ['{"detail": "Unexpected fields"}']
    with pytest.raises(Failed, match="422: Unexpected fields"):
        answer(server)
    monkeypatch.setenv("MY_KEY", " ")
    for variable, says in (("MY_KEY", "is not set"), ("NO_KEY", "is not set")):
        with pytest.raises(UserError, match=f"{variable} {says}"):
            Endpoint(server.url, api_key_env=variable)


def test_no_server_or_no_models(server):
    with pytest.raises(UserError, match=r"no server answers at http://127\.0\.0\.1:9/v1"):
        Endpoint("http://127.0.0.1:9")
    with pytest.raises(UserError, match="no server answers"):
        Endpoint("http://[bad/v1")
    server.models = {"data": []}
    with pytest.raises(UserError, match="lists no models"):
        Endpoint(server.url)
    server.models = None
    with pytest.raises(UserError, match="answers 404"):
        Endpoint(server.url)
    with pytest.raises(Failed, match="the connection failed"):
        list(Endpoint("http://127.0.0.1:9", model="x").stream(QUESTION, Sampling()))


def test_lines_end_where_line_feeds_are():
    assert list(_lines(iter([b"a\r\nb", b"c\n\n", "\u2028d".encode()]))) == [
        b"a\r",
        b"bc",
        b"",
        "\u2028d".encode(),
    ]


def test_the_terminal_talks_to_an_address(server, monkeypatch, capsys, tmp_path):
    """A turn that fails leaves the conversation as it was; one that breaks off keeps what came."""
    script = iter([["One."], ["ignored"], ["Two ", b'data: {"error": "tired"}'], ["Three."]])
    server.pieces = lambda body: next(script)
    real, statuses = server.pieces, iter([200, 500, 200, 200])

    def pieces(body):
        server.status = next(statuses)
        return real(body)

    server.pieces = pieces
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("a?\nb?\nc?\nd?\n/save talk.jsonl\n"))
    chat.run(ChatConfig(url=server.url, system="Brief."))
    shown = capsys.readouterr()
    assert shown.out == "One.\nTwo \nThree.\n"
    assert "500: ignored" in shown.err and "tired" in shown.err
    (row,) = read_jsonl(tmp_path / "talk.jsonl")
    said = [message["content"] for message in row["messages"]]
    assert said == ["Brief.", "a?", "One.", "c?", "Two ", "d?", "Three."]
    assert [len(body["messages"]) for body in server.bodies] == [2, 4, 4, 6]


def test_an_interrupt_ends_a_streamed_answer(server, monkeypatch, capsys):
    def interrupted(text):
        if text.startswith("warm"):
            raise KeyboardInterrupt
        print(text, end="")

    monkeypatch.setattr(chat, "_write", interrupted)
    monkeypatch.setattr("sys.stdin", io.StringIO("a?\nb?\n"))
    chat.run(ChatConfig(url=server.url))
    assert capsys.readouterr().out == "It is \nIt is \n"
    assert server.bodies[1]["messages"][1]["content"] == "It is warm.\u2028"
