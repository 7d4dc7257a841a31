"""The page's server asked directly, and the page in a real browser. The model behind it is a fake."""

import http.client
import json
import socket
import time

import pytest
from chat_helpers import FakeOpenAI, serving

from chromium import CHROMIUM, Chromium
from galenic.chat import web
from galenic.chat.config import ChatConfig, Sampling
from galenic.chat.endpoint import Endpoint, Failed
from galenic.runtime import UserError

NASTY = (
    "<img src=x onerror=\"document.title='stolen'\"><script>document.title='stolen'</script>&amp; </script>"
)


@pytest.fixture
def fake():
    with serving(FakeOpenAI(lambda body: ["Warm: ", body["messages"][-1]["content"]])) as server:
        yield server


@pytest.fixture
def page(fake):
    """A page server before the fake model."""
    endpoint = Endpoint(fake.url)
    with serving(web.PageServer(ChatConfig(url=fake.url), endpoint)) as server:
        yield server
    endpoint.close()


def ask(page, path=None, body=None, method="POST", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", page.server_address[1], timeout=20)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, f"/{page.token}/chat" if path is None else path, content, headers)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response, text


def conversation(text="Fever?", **sampling):
    return {"messages": [{"role": "user", "content": text}], "sampling": sampling}


def test_an_answer_comes_as_lines(page, fake):
    response, text = ask(page, body=conversation("发热\u2028<b>", temperature=0, seed=None, max_new_tokens=5))
    assert response.status == 200
    lines = [json.loads(line) for line in text.split("\n") if line]
    assert lines == [{"text": "Warm: "}, {"text": "发热\u2028<b>"}, {"finish": "stop"}]
    assert fake.bodies[0]["temperature"] == 0 and fake.bodies[0]["max_tokens"] == 5
    assert "seed" not in fake.bodies[0]


def test_only_the_page_itself_is_answered(page):
    """Without the token, under another name for this machine, or from a foreign page: nothing."""
    port = page.server_address[1]
    assert ask(page, path="/chat", body=conversation())[0].status == 404
    assert ask(page, path="/", method="GET")[0].status == 404
    assert ask(page, path=f"/{page.token}", method="GET")[0].status == 404
    assert ask(page, path=f"/{page.token}/", method="GET")[0].status == 200
    assert ask(page, path=f"/{page.token}/", method="GET", Host=f"evil.example:{port}")[0].status == 403
    assert ask(page, body=conversation(), Origin="http://evil.example")[0].status == 403
    assert ask(page, body=conversation(), Origin=f"http://127.0.0.1:{port}")[0].status == 200
    with pytest.raises(OSError), socket.create_connection((socket.gethostname(), port), timeout=2) as other:
        other.getpeername()  # it listens on the loopback address only
        if other.getpeername()[0].startswith("127."):
            raise OSError("the machine's name is its loopback address")


def test_the_page_names_all_it_may_do(page):
    response, text = ask(page, path=f"/{page.token}/", method="GET")
    policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe" not in policy
    assert response.headers["Cache-Control"] == "no-store"
    assert "not medical advice" in text and "{{" not in text
    assert "://" not in text  # nothing from elsewhere


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"nonsense", "Expecting value"),
        (b"[]", "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "role and content"),
        (conversation(temperature=-1), "temperature is -1"),
        (conversation(temperature="hot"), "temperature is 'hot'; it must be a number"),
        (conversation(top_k=1.5), "top_k is 1.5; it must be a whole number"),
        (conversation(top_k=True), "top_k is True"),
        (conversation(heat=1), "heat is 1"),
    ],
)
def test_a_request_that_is_none(page, fake, body, says):
    response, text = ask(page, body=body)
    assert response.status == 400 and says in json.loads(text)["error"]
    assert not fake.bodies


def test_a_request_without_end_is_not_read(page):
    response, _ = ask(page, body=b"{}", **{"Content-Length": str(1 << 40)})
    assert response.status == 400


def test_a_server_that_fails_is_said(page, fake):
    fake.status, fake.pieces = 500, lambda body: ["out of memory"]
    _, text = ask(page, body=conversation())
    assert "500: out of memory" in json.loads(text)["error"]


def test_who_leaves_ends_the_request(page, fake):
    def endless(body):
        while True:
            yield "on "

    fake.pieces, fake.pause = endless, 0.02
    connection = http.client.HTTPConnection("127.0.0.1", page.server_address[1], timeout=20)
    connection.request("POST", f"/{page.token}/chat", json.dumps(conversation(max_new_tokens=10**6)).encode())
    response = connection.getresponse()
    assert response.fp.readline()
    response.close()
    connection.close()
    assert fake.left.wait(20)


def test_a_folders_conversation_is_shortened(model_folder, fake):
    """What its context has no room for is dropped before it is asked, and the page is told."""
    endpoint, shorten = Endpoint(fake.url), web.Shorten(str(model_folder))
    turns = [{"role": role, "content": "blood pressure"} for role in ("user", "assistant")] * 12
    sampling, dropped = shorten(turns := [*turns, {"role": "user", "content": "Fever?"}], Sampling())
    assert sampling.max_new_tokens == 48 and dropped > 0 and len(turns) == 25 - 2 * dropped
    with pytest.raises(Failed, match="too long: the model reads at most 48 tokens"):
        shorten([{"role": "user", "content": "blood " * 100}], Sampling())
    with serving(web.PageServer(ChatConfig(url=fake.url), endpoint, shorten)) as page:
        long = {"messages": [*turns * 3, {"role": "user", "content": "Why?"}][-25:]}
        long["messages"] = [{"role": r, "content": "blood pressure"} for r in ("user", "assistant")] * 12
        _, text = ask(page, body={"messages": [*long["messages"], {"role": "user", "content": "Why?"}]})
        first = json.loads(text.split("\n")[0])
        assert len(fake.bodies[0]["messages"]) == 25 - 2 * first["dropped"]
    endpoint.close()


def test_what_is_missing_is_named(model_folder, llama_folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="is not a model folder"):
        web.run(ChatConfig(model=str(tmp_path), web=True))
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    with pytest.raises(UserError, match=r"pip install 'galenic\[serve\]'"):
        web.run(ChatConfig(model=str(model_folder), web=True))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port: {port} cannot be used"):
            web.run(ChatConfig(url="http://127.0.0.1:9", model="x", web=True, port=port))


def test_a_child_that_does_not_start_is_explained(model_folder, monkeypatch):
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: True)
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(UserError, match="`transformers serve` ended at its start; its last words: nothing"):
        web.run(ChatConfig(model=str(model_folder), web=True))


# ---------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with Chromium(tmp_path_factory.mktemp("browser")) as browser:
        browser.size(1280, 800)
        yield browser


def at(name):
    return f"document.getElementById('{name}')"


def visit(browser, page):
    """Opens the page; the focus comes with its first frame, and what is typed before is lost."""
    browser.open(page.address)
    browser.wait(f"document.activeElement === {at('question')}")


def said(browser):
    script = "[...document.querySelectorAll('#talk .said')].map((one) => one.textContent)"
    return browser.run(script)


def test_a_conversation_on_the_page(browser, page, fake):
    """Typed and sent by keys; the history goes along; markup is shown, never understood; nothing complains."""
    visit(browser, page)
    browser.run(f"{at('system')}.value = 'Be brief.'; {at('temperature')}.value = '0'")
    browser.type(NASTY)  # the question has the focus
    browser.press("Enter", shift=True)
    browser.type("second line")
    browser.press("Enter")
    browser.wait(f"{at('stop')}.hidden && document.querySelectorAll('#talk .copy').length === 1")
    question = f"{NASTY}\nsecond line"
    assert said(browser) == [question, f"Warm: {question}"]
    browser.type("Why?")
    browser.press("Enter")
    browser.wait("document.querySelectorAll('#talk .copy').length === 2")
    assert [message["role"] for message in fake.bodies[1]["messages"]] == [
        "system",
        "user",
        "assistant",
        "user",
    ]
    assert fake.bodies[1]["messages"][0]["content"] == "Be brief." and fake.bodies[1]["temperature"] == 0
    assert browser.run("document.querySelectorAll('#talk img, #talk script').length") == 0
    assert "stolen" not in browser.run("document.title")
    assert browser.complaints == []
    browser.run(f"{at('new')}.click()")
    assert said(browser) == []
    browser.type("Again?")
    browser.press("Enter")
    browser.wait("document.querySelectorAll('#talk .copy').length === 1")
    assert [message["role"] for message in fake.bodies[2]["messages"]] == ["system", "user"]


def test_an_answer_streams_and_stops(browser, page, fake):
    def endless(body):
        for number in range(10**6):
            yield f"word{number} "

    fake.pieces, fake.pause = endless, 0.03
    visit(browser, page)
    browser.run(f"{at('max_new_tokens')}.value = 100000")
    browser.type("Go on?")
    browser.press("Enter")
    browser.wait("document.querySelector('#talk li:last-child .said')?.textContent.includes('word3')")
    assert browser.run(f"!{at('stop')}.hidden && {at('send')}.hidden")
    browser.press("Escape")
    browser.wait(f"{at('stop')}.hidden")
    assert fake.left.wait(20)
    assert browser.run("document.querySelector('#talk .note').textContent") == "Stopped."
    kept = said(browser)[1]
    assert kept.startswith("word0 word1")
    fake.pieces = lambda body: ["fine"]
    browser.type("And?")
    browser.press("Enter")
    browser.wait("document.querySelectorAll('#talk .copy').length === 2")
    assert fake.bodies[1]["messages"][1] == {"role": "assistant", "content": kept}


def test_failures_and_bad_options_on_the_page(browser, page, fake):
    fake.status, fake.pieces = 500, lambda body: ["out of memory"]
    visit(browser, page)
    browser.type("Fever?")
    browser.press("Enter")
    browser.wait("document.querySelector('#talk .note') !== null")
    assert "500: out of memory" in browser.run("document.querySelector('#talk .note').textContent")
    assert browser.run(f"{at('question')}.value") == "Fever?"  # to be sent again
    fake.status, fake.pieces, fake.finish = 200, lambda body: ["long"], "length"
    browser.press("Enter")
    browser.wait("document.querySelectorAll('#talk .copy').length === 1")
    assert "Cut off" in browser.run("[...document.querySelectorAll('.note')].at(-1).textContent")
    assert [message["role"] for message in fake.bodies[1]["messages"]] == ["user"]
    browser.run(f"{at('top_p')}.value = 2")
    browser.type("More?")
    browser.press("Enter")
    time.sleep(0.3)
    assert len(fake.bodies) == 2 and browser.run(f"{at('question')}.value") == "More?"


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_the_page_fits(browser, page, fake, width, height):
    """Nothing sticks out at either width; options open and close; both themes are readable."""
    fake.pieces = lambda body: ["A word " * 60, "W" * 300]
    browser.size(width, height)
    try:
        visit(browser, page)
        browser.type("How long is a very long question that needs more than one line on a small screen?")
        browser.press("Enter")
        browser.wait("document.querySelectorAll('#talk .copy').length === 1")
        for opened in (True, False):
            if browser.run(f"{at('settings')}.hidden") is opened:
                browser.run(f"{at('toggle')}.click()")
            assert browser.run("document.documentElement.scrollWidth") <= width
            assert browser.run("document.documentElement.scrollHeight") <= height
            assert browser.run(f"{at('toggle')}.getAttribute('aria-expanded')") == str(opened).lower()
            assert browser.run(f"{at('ask')}.getBoundingClientRect().bottom") <= height + 1
        ground = "getComputedStyle(document.body).backgroundColor"
        before = browser.run(ground)
        browser.run(f"{at('theme')}.click()")
        assert browser.run(ground) != before
        browser.run(f"{at('theme')}.click()")
        assert browser.run(ground) == before
    finally:
        browser.size(1280, 800)


def test_the_copy_button_copies(browser, page):
    visit(browser, page)
    browser.type("Fever?")
    browser.press("Enter")
    browser.wait("document.querySelectorAll('#talk .copy').length === 1")
    browser.run(
        "window.copied = ''; document.addEventListener('copy', () => { copied = String(getSelection()); })"
    )
    browser.run("navigator.clipboard.writeText = async (text) => { copied = text; }")
    browser.run("document.querySelector('#talk .copy').click()")
    browser.wait("copied === 'Warm: Fever?'")
    browser.wait("document.querySelector('#talk .copy').textContent === 'Copied'")
