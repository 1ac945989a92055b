"""Requests and replies of each engine, and its errors.

vLLM needs a GPU: a stand-in module shows what it is handed, and nothing of what it does.
"""

import base64
import io
import json
import sys
import time
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from flame.captioning import engines
from flame.study.schema.data import Sampling, ServerCaptioner, TransformersCaptioner, VllmCaptioner
from tests import tiny_vlm
from tests.loopback import Loopback, Reply, html, slow, status, wrong

PATH = "/v1/chat/completions"
TOKEN = "sk-neverprinted"
COMMIT = "a" * 40
GREEDY = Sampling(temperature=0, top_p=1, top_k=None, repetition_penalty=1)
KINDS = {"prompts": {"long": "?"}, "max_tokens": {"long": 8}}


@pytest.fixture
def server():
    with Loopback() as server:
        yield server


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(engines, "PAUSE", 0.01)


def image(seed=0, size=(40, 32)):
    pixels = torch.randint(
        256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed)
    )
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def request(prompt="What is this?", *, seed=0, sampling=GREEDY, max_tokens=8, shown=None):
    return engines.Request(shown or image(seed), prompt, sampling, max_tokens, seed)


# --- a server ---------------------------------------------------------------------------------


def engine_of(server, **keys):
    url = f"{server.url}/v1"
    return engines.create(
        ServerCaptioner(engine="server", url=url, model="owner/mllm", **KINDS | keys)
    )


def completion(text, finish="stop"):
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return json.dumps({"choices": [choice]}).encode()


def question(asked):
    """The text of a request, as the server reads it."""
    return json.loads(asked.body)["messages"][0]["content"][1]["text"]


def echo(asked):
    return Reply(200, completion(f"about {question(asked)}"))


def test_the_server_is_asked_what_the_request_says(server):
    server.route(PATH, echo)
    sampling = Sampling(temperature=0.5, top_p=0.9, top_k=20, repetition_penalty=1.1)
    engine_of(server).describe([request("Why?", seed=7, sampling=sampling, max_tokens=33)])
    body = json.loads(server.requests[0].body)
    [message] = body.pop("messages")
    assert body == {
        "model": "owner/mllm",
        "max_tokens": 33,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 7,
        "top_k": 20,
        "repetition_penalty": 1.1,
    }
    shown, asked = message["content"]
    assert (message["role"], asked) == ("user", {"type": "text", "text": "Why?"})
    head, _, data = shown["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as seen:
        assert (seen.format, seen.mode, seen.size) == ("PNG", "RGB", (40, 32))
        assert seen.tobytes() == image(7).tobytes()


def test_what_openai_does_not_know_is_sent_only_where_it_says_something(server):
    server.route(PATH, echo)
    engine_of(server).describe([request(sampling=GREEDY)])
    assert {"top_k", "repetition_penalty"}.isdisjoint(json.loads(server.requests[0].body))


def test_replies_keep_the_order_of_their_requests(server):
    answered = []

    def answer(asked):
        time.sleep(0.1 * (3 - int(question(asked))))
        answered.append(question(asked))
        return echo(asked)

    server.route(PATH, answer)
    replies = engine_of(server, concurrency=4).describe([request(str(i)) for i in range(4)])
    assert replies == [engines.Reply(f"about {i}", "stop") for i in range(4)]
    assert answered != sorted(answered)


def test_no_more_requests_are_under_way_than_the_study_allows(server):
    under_way, most = set(), []

    def answer(asked):
        under_way.add(question(asked))
        most.append(len(under_way))
        time.sleep(0.05)
        under_way.discard(question(asked))
        return echo(asked)

    server.route(PATH, answer)
    engine_of(server, concurrency=2).describe([request(str(i)) for i in range(6)])
    assert max(most) == 2


@pytest.mark.parametrize("code", [408, 425, 429, 500, 503])
def test_a_server_that_stumbles_is_asked_again(server, code):
    server.route(PATH, echo, faults=[status(code, times=2)])
    replies = engine_of(server, attempts=3).describe([request("it")])
    assert replies == [engines.Reply("about it", "stop")]
    first, *others = [asked.body for asked in server.requests]
    assert others == [first, first]


def test_a_server_that_never_answers_well_ends_as_an_error(server):
    server.route(PATH, echo, faults=[status(503)])
    [reply] = engine_of(server, attempts=3).describe([request()])
    assert reply == engines.Reply("HTTP 503: status 503", "error")
    assert len(server.requests) == 3


def test_the_server_says_how_long_to_wait(server, monkeypatch):
    server.route(PATH, echo, faults=[status(429, times=1, retry_after=1)])
    start = time.monotonic()
    assert engine_of(server).describe([request("it")])[0].text == "about it"
    assert time.monotonic() - start >= 1
    server.fault(PATH, status(429, times=1, retry_after=3600))
    monkeypatch.setattr(engines, "LONGEST_PAUSE", 0.01)
    start = time.monotonic()
    assert engine_of(server).describe([request("it")])[0].text == "about it"
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(
    ("said", "least", "most"),
    [
        ("7", 7, 7),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0),
        ("Wed, 21 Oct 2099 07:28:00 GMT", 1e6, 1e10),
        ("", 0.5, 0.5),
        ("soon", 0.5, 0.5),
        ("1.5", 0.5, 0.5),
        ("-3", 0.5, 0.5),
        ("\u00b2", 0.5, 0.5),
    ],
)
def test_a_time_to_wait_is_a_number_or_a_date(said, least, most):
    assert least <= engines._retry_after({"Retry-After": said}, 0.5) <= most


def test_a_timeout_is_an_attempt(server):
    server.route(PATH, echo, faults=[slow(1, times=1)])
    engine = engine_of(server, timeout=0.3, attempts=2)
    assert engine.describe([request("it")])[0].text == "about it"
    server.fault(PATH, slow(1))
    [reply] = engine.describe([request("it")])
    assert reply.finish == "error"
    assert "Timeout" in reply.text
    assert len(server.requests) == 4


GARBAGE = {
    "page": html(),
    "empty": wrong(b""),
    "no JSON": wrong(b'{"choices": ['),
    "no object": wrong(b"[]"),
    "no choices": wrong(b'{"object": "chat.completion"}'),
    "empty choices": wrong(b'{"choices": []}'),
    "null choice": wrong(b'{"choices": [null]}'),
    "no message": wrong(b'{"choices": [{}]}'),
    "null message": wrong(b'{"choices": [{"message": null}]}'),
    "null content": wrong(completion(None)),
    "parts": wrong(completion([{"type": "text", "text": "a cat"}])),
    "number": wrong(completion(7)),
    "filtered": wrong(completion("", "content_filter")),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_costs_only_its_own_request_a_caption(server, name):
    fault = GARBAGE[name]

    def answer(asked):
        return fault.change(echo(asked)) if question(asked) == "bad" else echo(asked)

    server.route(PATH, answer)
    replies = engine_of(server, attempts=2).describe([request(p) for p in ("a", "bad", "b")])
    assert [reply.finish for reply in replies] == ["stop", "error", "stop"]
    assert [replies[0].text, replies[2].text] == ["about a", "about b"]
    assert replies[1].text


@pytest.mark.parametrize("code", engines.OF_ONE_REQUEST)
def test_a_request_that_is_refused_is_not_sent_again(server, code):
    def answer(asked):
        return Reply(code, b"no such image") if question(asked) == "bad" else echo(asked)

    server.route(PATH, answer)
    replies = engine_of(server).describe([request(p) for p in ("a", "bad", "b")])
    assert replies == [
        engines.Reply("about a", "stop"),
        engines.Reply(f"HTTP {code}: no such image", "error"),
        engines.Reply("about b", "stop"),
    ]
    assert len(server.requests) == 3


@pytest.mark.parametrize("code", [401, 403, 404])
def test_a_server_that_refuses_everybody_ends_the_job(server, code):
    url = server.route(PATH, echo, faults=[status(code)])
    with pytest.raises(ValueError, match=f"{url} refuses requests: HTTP {code}: status {code}"):
        engine_of(server, concurrency=1).describe([request() for _ in range(3)])


def test_a_server_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    gone = SimpleNamespace(url="http://127.0.0.1:9")
    [reply] = engine_of(gone, attempts=2).describe([request()])
    assert reply.finish == "error"
    assert "ConnectionError" in reply.text


@pytest.mark.parametrize(
    ("said", "finish"), [("length", "length"), ("stop", "stop"), (None, "stop")]
)
def test_a_caption_that_was_cut_is_told_from_one_that_ended(server, said, finish):
    server.route(PATH, lambda _: Reply(200, completion("a cat", said)))
    assert engine_of(server).describe([request()]) == [engines.Reply("a cat", finish)]


def test_the_token_is_sent(server, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", TOKEN)
    server.route(PATH, echo)
    engine_of(server, token="MY_TOKEN").describe([request()])
    engine_of(server).describe([request()])
    assert [asked.token for asked in server.requests] == [TOKEN, None]


def test_a_token_that_is_not_set_is_told_by_name(server, monkeypatch):
    monkeypatch.delenv("MY_TOKEN", raising=False)
    with pytest.raises(ValueError, match="'MY_TOKEN' is not set"):
        engine_of(server, token="MY_TOKEN")
    monkeypatch.setenv("MY_TOKEN", "")
    with pytest.raises(ValueError, match="'MY_TOKEN' is not set"):
        engine_of(server, token="MY_TOKEN")


@pytest.mark.parametrize("code", [200, 400, 401, 500])
@pytest.mark.parametrize("before", [0, 180, 195, 490, 495])
def test_no_error_says_the_token_or_a_part_of_it(server, monkeypatch, code, before):
    monkeypatch.setenv("MY_TOKEN", TOKEN)
    words = "x" * before + TOKEN
    body = json.dumps({"error": words}).encode() if code == 200 else words.encode()
    server.route(PATH, lambda _: Reply(code, body))
    engine = engine_of(server, token="MY_TOKEN", attempts=1)
    try:
        said = engine.describe([request()])[0].text
    except ValueError as error:
        said = str(error)
    assert said
    assert TOKEN[:3] not in said


@pytest.mark.parametrize("token", [f"{TOKEN}\n{TOKEN}", f"{TOKEN}\u20ac"])
def test_a_token_that_no_header_can_hold_is_told_by_the_name_of_its_variable(
    server, monkeypatch, token
):
    monkeypatch.setenv("MY_TOKEN", token)
    server.route(PATH, echo)
    with pytest.raises(ValueError, match="'MY_TOKEN'") as error:
        engine_of(server, token="MY_TOKEN").describe([request()])
    assert TOKEN not in str(error.value)


def test_white_space_around_a_token_is_none_of_it(server, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", f"{TOKEN}\n")
    server.route(PATH, echo)
    engine_of(server, token="MY_TOKEN").describe([request()])
    assert server.requests[0].token == TOKEN


# --- transformers -----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def llava(tmp_path_factory):
    return tiny_vlm.save(tmp_path_factory.mktemp("llava"))


def local(llava, batch_size=8):
    captioner = {"engine": "transformers", "id": str(llava), "batch_size": batch_size}
    return engines.create(TransformersCaptioner(**captioner, **KINDS))


def drawn(seed, prompt="What is this?", **keys):
    return request(prompt, seed=seed, sampling=Sampling(temperature=1.0), **keys)


def test_what_is_drawn_for_an_image_depends_on_no_other_image(llava):
    prompts = ("Hi", "What is this?", "Describe the picture.")
    requests = [drawn(i, prompts[i % 3]) for i in range(7)]
    alone = local(llava, 1).describe(requests)
    together = local(llava, 4).describe(requests)
    assert together == alone
    assert local(llava, 4).describe(requests[::-1]) == alone[::-1]
    assert len({reply.text for reply in alone}) == 7


def test_another_seed_draws_another_caption(llava):
    shown = image()
    replies = local(llava).describe([drawn(seed, shown=shown) for seed in (1, 2, 1)])
    assert replies[0] == replies[2]
    assert replies[0] != replies[1]


def test_temperature_0_is_the_greedy_search_of_transformers(llava):
    asked = request("What is this?", max_tokens=12)
    processor = AutoProcessor.from_pretrained(llava)
    inputs = processor(images=asked.image, text="<image>What is this?:", return_tensors="pt")
    model = AutoModelForImageTextToText.from_pretrained(llava).eval()
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    written = tokens[0, inputs["input_ids"].shape[1] :]
    other = request("What is this?", max_tokens=12, seed=0)
    replies = local(llava).describe([asked, other])
    assert replies[0].text == processor.decode(written, skip_special_tokens=False)
    assert replies[0] == replies[1]


def test_max_tokens_cut_a_caption(llava):
    engine = local(llava)
    [short, long] = engine.describe([drawn(0, max_tokens=3), drawn(0, max_tokens=6)])
    assert (short.finish, long.finish) == ("length", "length")
    assert long.text.startswith(short.text)
    assert 0 < len(short.text) < len(long.text)


def test_a_caption_ends_where_the_model_ends_it(tmp_path):
    # These weights let each word of a caption be followed by its end.
    engine = local(tiny_vlm.save(tmp_path, ["cat", "dog", "bird"]))
    replies = engine.describe([drawn(seed, max_tokens=64) for seed in range(4)])
    ended = [reply for reply in replies if reply.finish == "stop"]
    assert ended
    assert not any("</s>" in reply.text or "<pad>" in reply.text for reply in ended)


def test_mixed_samplings_keep_the_order(llava):
    engine = local(llava, 2)
    requests = [
        [drawn(i), request(seed=i), drawn(i, max_tokens=5)][i % 3]  # sampled, greedy, short
        for i in range(8)
    ]
    alone = [engine.describe([one])[0] for one in requests]
    assert engine.describe(requests) == alone


# --- vLLM ---------------------------------------------------------------------------------------


class StandIn:
    """vllm.LLM as far as the engine uses it; records its arguments and calls."""

    made: ClassVar[list["StandIn"]] = []

    def __init__(self, **arguments):
        self.arguments, self.calls = arguments, []
        StandIn.made.append(self)

    def get_tokenizer(self):
        return SimpleNamespace(get_vocab=lambda: {"<|im_end|>": 5, "<|end|>": 6, "cat": 7})

    def chat(self, chats, params, use_tqdm):
        return self._answer("chat", chats, params)

    def generate(self, prompts, params, use_tqdm):
        return self._answer("generate", prompts, params)

    def _answer(self, *call):
        self.calls.append(call)
        finish = ("stop", "length", "abort")
        return [
            SimpleNamespace(outputs=[SimpleNamespace(text=f"reply {i}", finish_reason=f)])
            for i, f in zip(range(len(call[1])), finish, strict=False)
        ]


@pytest.fixture
def vllm(monkeypatch):
    """Stand-in for vllm, which needs a GPU: shows what the engine passes to it."""
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = StandIn, SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(StandIn, "made", [])
    return StandIn


def offline(**keys):
    captioner = {"engine": "vllm", "id": "owner/mllm", "revision": COMMIT}
    return engines.create(VllmCaptioner(**captioner | KINDS | keys))


def test_vllm_loads_weights_and_code_of_one_revision(vllm):
    offline(trust_remote_code=True, options={"max_model_len": 2048})
    assert vllm.made[0].arguments == {
        "model": "owner/mllm",
        "revision": COMMIT,
        "tokenizer_revision": COMMIT,
        "code_revision": COMMIT,
        "trust_remote_code": True,
        "limit_mm_per_prompt": {"image": 1},
        "enable_prefix_caching": True,
        "max_model_len": 2048,
    }
    offline(revision="main")
    assert vllm.made[1].arguments["trust_remote_code"] is False


def test_vllm_fills_the_template_of_a_model_without_its_own(vllm):
    asked = request("Why {0}?")
    offline(template="<image>{question} A {x}:").describe([asked])
    [(method, prompts, _)] = vllm.made[0].calls
    assert (method, prompts[0]["prompt"]) == ("generate", "<image>Why {0}? A {x}:")
    assert prompts[0]["multi_modal_data"]["image"] is asked.image


def test_vllm_is_shown_the_image_before_the_question(vllm):
    asked = request("Why?")
    offline().describe([asked])
    [(method, [[message]], _)] = vllm.made[0].calls
    assert (method, message["role"]) == ("chat", "user")
    assert message["content"] == [
        {"type": "image_pil", "image_pil": asked.image},
        {"type": "text", "text": "Why?"},
    ]


def test_vllm_samples_as_each_request_says(vllm):
    sampling = Sampling(temperature=0.5, top_p=0.9, top_k=20, repetition_penalty=1.1)
    offline(stop=["<|im_end|>", "<|end|>"]).describe(
        [request(seed=7, sampling=sampling, max_tokens=33), request(seed=8)]
    )
    first, second = (vars(params) for params in vllm.made[0].calls[0][2])
    assert first == {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 20,
        "repetition_penalty": 1.1,
        "max_tokens": 33,
        "stop_token_ids": [5, 6],
        "seed": 7,
    }
    assert (second["temperature"], second["top_k"], second["seed"]) == (0, -1, 8)


def test_vllm_says_how_each_caption_ended(vllm):
    assert offline().describe([request(), request(), request()]) == [
        engines.Reply("reply 0", "stop"),
        engines.Reply("reply 1", "length"),
        engines.Reply("vLLM finished with 'abort'", "error"),
    ]


def test_an_image_that_vllm_cannot_take_costs_no_other_its_caption(vllm, monkeypatch):
    def chat(self, chats, params, use_tqdm):
        if any(chat[0]["content"][1]["text"] == "bad" for chat in chats):
            raise ValueError("absolute aspect ratio must be smaller than 200")
        return self._answer("chat", chats, params)

    monkeypatch.setattr(StandIn, "chat", chat)
    assert offline().describe([request("a"), request("bad"), request("b")]) == [
        engines.Reply("reply 0", "stop"),
        engines.Reply("absolute aspect ratio must be smaller than 200", "error"),
        engines.Reply("reply 0", "stop"),
    ]


def test_a_token_to_stop_at_must_be_one_of_the_model(vllm):
    with pytest.raises(ValueError, match=r"'<\|im_end\|' \(did you mean '<\|im_end\|>'\?\)"):
        offline(stop=["<|im_end|"])


@pytest.mark.parametrize("revision", ["main", "a" * 39, "A" * 40, "v1.0"])
def test_code_of_a_revision_that_moves_is_not_run(monkeypatch, revision):
    monkeypatch.setitem(sys.modules, "vllm", None)  # to import it is an ImportError
    with pytest.raises(ValueError, match=f"must be a commit .*, not '{revision}'"):
        offline(revision=revision, trust_remote_code=True)


@pytest.mark.parametrize("name", engines.IDENTITY)
def test_options_do_not_say_whose_model_is_run(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match=f"options: '{name}' is set by the captioner's own keys"):
        offline(options={name: "another"})
