"""Requests and replies of each engine, and its errors.

vLLM needs a GPU: tests/fake_vllm.py shows what it is handed, and little of what it does.
"""

import asyncio
import base64
import io
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from flame.captioning import engines
from flame.captioning.engines import server as server_engine
from flame.captioning.engines import vllm as vllm_engine
from flame.captioning.engines.base import bisected
from flame.data import hub_models
from flame.study.schema.data import Sampling, ServerCaptioner, TransformersCaptioner, VllmCaptioner
from tests import fake_vllm, tiny_vlm
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
    monkeypatch.setattr(server_engine, "PAUSE", 0.01)


def image(seed=0, size=(40, 32)):
    pixels = torch.randint(
        256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed)
    )
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def request(prompt="What is this?", *, seed=0, sampling=GREEDY, max_tokens=8, shown=None):
    return engines.Request(shown or image(seed), prompt, sampling, max_tokens, seed)


class Waiting:
    """An engine whose answers are waited for."""

    def __init__(self, captioner, seed=0):
        self.engine = engines.create(captioner, seed)

    def describe(self, requests):
        return asyncio.run(self.engine.describe(requests))


# --- a server ---------------------------------------------------------------------------------


def engine_of(server, **keys):
    url = f"{server.url}/v1"
    return Waiting(ServerCaptioner(engine="server", url=url, model="owner/mllm", **KINDS | keys))


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


def test_a_server_is_not_asked_to_add_a_bos_to_its_template(server):
    server.route(PATH, echo)
    engine_of(server).describe([request("Why?")])
    body = json.loads(server.requests[0].body)
    assert "add_special_tokens" not in body  # of vLLM's server, which adds none by default
    assert question(server.requests[0]) == "Why?"


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
    monkeypatch.setattr(server_engine, "LONGEST_PAUSE", 0.01)
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
    assert least <= server_engine._retry_after({"Retry-After": said}, 0.5) <= most


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


@pytest.mark.parametrize("code", server_engine.OF_ONE_REQUEST)
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
    return Waiting(TransformersCaptioner(**captioner, **KINDS))


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


@pytest.mark.parametrize("template", ["{{ bos_token }}", ""])
def test_transformers_reads_one_bos(tmp_path, monkeypatch, template):
    fast = tiny_vlm.llama3_tokenizer()
    fast.chat_template = template + tiny_vlm.CHAT
    engine = local(tiny_vlm.save(tmp_path, fast=fast))
    given, model = [], engine.engine._model
    generate = model.generate
    monkeypatch.setattr(
        model, "generate", lambda **inputs: given.append(inputs) or generate(**inputs)
    )
    engine.describe([request("Hi"), request("What is this?")])
    counts = (given[0]["input_ids"] == fast.bos_token_id).sum(1).tolist()
    assert counts == [1, 1]


class Refusing:
    """Answers batches of requests, except those with the question "bad".

    Attributes:
        refused: sizes of the refused batches, in order.
        answered: sizes of the others.
    """

    def __init__(self):
        self.refused, self.answered = [], []

    def answer(self, requests):
        if any(request.prompt == "bad" for request in requests):
            self.refused.append(len(requests))
            raise ValueError("no such image")
        self.answered.append(len(requests))
        return [engines.Reply(f"about {request.prompt}", "stop") for request in requests]


@pytest.mark.parametrize("bad", [0, 300, 511])
def test_a_refused_request_of_512_costs_nine_halvings(bad):
    prompts = ["bad" if i == bad else str(i) for i in range(512)]
    shown, engine = image(), Refusing()
    replies = bisected(engine.answer, [request(prompt, shown=shown) for prompt in prompts])
    good = [engines.Reply(f"about {prompt}", "stop") for prompt in prompts]
    good[bad] = engines.Reply("no such image", "error")
    assert replies == good
    # Nine halvings: each level has a refused half and an answered one.
    assert engine.refused == [512, 256, 128, 64, 32, 16, 8, 4, 2, 1]
    assert sorted(engine.answered) == [1, 2, 4, 8, 16, 32, 64, 128, 256]


def test_a_batch_is_bisected(llava, monkeypatch):
    engine = local(llava, batch_size=8)
    prepare, sizes = engine.engine._prepare, []

    def refuse(requests):
        sizes.append(len(requests))
        if any(request.prompt == "bad" for request in requests):
            raise ValueError("no such image")
        return prepare(requests)

    monkeypatch.setattr(engine.engine, "_prepare", refuse)
    prompts = [*"abcdef", "bad", "g"]
    replies = engine.describe([request(prompt) for prompt in prompts])
    assert [reply.finish == "error" for reply in replies] == [p == "bad" for p in prompts]
    assert sizes == [8, 4, 4, 2, 2, 1, 1]


# --- vLLM ---------------------------------------------------------------------------------------


@pytest.fixture
def vllm(monkeypatch):
    for name, module in fake_vllm.modules(tiny_vlm.llama3_tokenizer()).items():
        monkeypatch.setitem(sys.modules, name, module)

    def cached(repo, revision, *, with_code):
        return Path(repo, revision, "with code" if with_code else "without")

    monkeypatch.setattr(hub_models, "cached", cached)
    return fake_vllm.AsyncLLMEngine


def offline(seed=0, **keys):
    captioner = {"engine": "vllm", "id": "owner/mllm", "revision": COMMIT}
    return Waiting(VllmCaptioner(**captioner | KINDS | keys), seed)


def test_vllm_loads_weights_and_code_of_one_revision(vllm):
    offline(trust_remote_code=True, options={"max_model_len": 2048}, seed=7)
    assert vllm.made[0].arguments == {
        "model": f"owner/mllm/{COMMIT}/with code",
        "trust_remote_code": True,
        "seed": 7,
        "limit_mm_per_prompt": {"image": 1},
        "enable_prefix_caching": True,
        "max_num_seqs": 256,
        "disable_log_stats": True,
        "max_model_len": 2048,
    }
    offline(revision="main")
    assert vllm.made[1].arguments["model"] == "owner/mllm/main/without"
    assert vllm.made[1].arguments["trust_remote_code"] is False


def test_vllm_is_kept_busy_with_twice_the_captions_that_it_writes_at_once(vllm):
    engine = offline(options={"max_num_seqs": 32}).engine
    assert engine.batch * engine.calls == 32  # images, each of them two captions


TEMPLATES = {
    "template with BOS": {"template": f"{tiny_vlm.BOS}<image>{{question}}:"},
    "template without": {"template": "<image>{question}:"},
    "chat template": {},
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_vllm_reads_one_bos(vllm, case):
    offline(**TEMPLATES[case]).describe([request("Why?")])
    [(prompt, _)] = vllm.made[0].asked
    tokenizer = vllm.made[0].renderer.tokenizer
    assert tokenizer.decode(prompt["prompt_token_ids"]) == f"{tiny_vlm.BOS}<image>Why?:"
    assert prompt["prompt_token_ids"].count(tokenizer.bos_token_id) == 1


def test_vllm_would_add_a_second_bos_to_such_a_template(vllm):
    offline()
    renderer = vllm.made[0].renderer
    text = {"prompt": f"{tiny_vlm.BOS}Why?", "multi_modal_data": {"image": image()}}
    [prompt] = renderer.render_cmpl([text])
    assert prompt["prompt_token_ids"].count(renderer.tokenizer.bos_token_id) == 2


def test_vllm_fills_the_template_of_a_model_without_its_own(vllm):
    asked = request("Why {0}?")
    offline(template="<image>{question} A {x}:").describe([asked])
    [(prompt, _)] = vllm.made[0].asked
    tokenizer = vllm.made[0].renderer.tokenizer
    text = tokenizer.decode(prompt["prompt_token_ids"])
    assert text == f"{tiny_vlm.BOS}<image>Why {{0}}? A {{x}}:"
    assert prompt["image"] is asked.image


def test_both_captions_of_an_image_come_next_to_each_other(vllm):
    engine = offline(template="<image>{question}").engine
    shown = [image(i) for i in range(8)]

    async def ask_all():
        pairs = [[request(q, shown=one) for q in ("Long?", "Short?")] for one in shown]
        await asyncio.gather(*map(engine.describe, pairs))

    asyncio.run(ask_all())
    assert [prompt["image"] for prompt, _ in vllm.made[0].asked] == [s for s in shown for _ in "ab"]


def test_vllm_samples_as_each_request_says(vllm):
    sampling = Sampling(temperature=0.5, top_p=0.9, top_k=20, repetition_penalty=1.1)
    offline(stop=["</s>", "<image>"]).describe(
        [request(seed=7, sampling=sampling, max_tokens=33), request(seed=8)]
    )
    first, second = (vars(params) for _, params in vllm.made[0].asked)
    assert first == {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 20,
        "repetition_penalty": 1.1,
        "max_tokens": 33,
        "stop_token_ids": [1, 3],
        "seed": 7,
        "output_kind": "final",
    }
    # Greedy decoding needs no generator of its own, whatever the study says.
    assert (second["temperature"], second["top_k"], second["seed"]) == (0, -1, None)


def test_vllm_says_how_each_caption_ended(vllm):
    engine = offline()
    vllm.made[0].finish = ["stop", "length", "abort"]
    assert engine.describe([request(), request(), request()]) == [
        engines.Reply("reply 0", "stop"),
        engines.Reply("reply 1", "length"),
        engines.Reply("vLLM finished with 'abort'", "error"),
    ]


def test_an_image_that_vllm_cannot_take_costs_no_other_its_caption(vllm):
    engine = offline()
    vllm.made[0].renderer.refused = {(7, 7)}
    bad = request("bad", shown=image(size=(7, 7)))
    assert engine.describe([request("a"), bad, request("b")]) == [
        engines.Reply("reply 0", "stop"),
        engines.Reply("Failed to apply MiniCPMVProcessor", "error"),
        engines.Reply("reply 1", "stop"),
    ]
    assert len(vllm.made[0].asked) == 2


def test_vllm_ends_with_its_engine(vllm):
    offline().engine.close()
    assert vllm.made[0].is_shut


def test_a_token_to_stop_at_must_be_one_of_the_model(vllm):
    with pytest.raises(ValueError, match=r"did you mean '<\|begin_of_text\|>'\?"):
        offline(stop=["<|begin_of_text|"])


@pytest.mark.parametrize("revision", ["main", "a" * 39, "A" * 40, "v1.0"])
def test_code_of_a_revision_that_moves_is_not_run(monkeypatch, revision):
    monkeypatch.setitem(sys.modules, "vllm", None)  # to import it is an ImportError
    with pytest.raises(ValueError, match=f"must be a commit .*, not '{revision}'"):
        offline(revision=revision, trust_remote_code=True)


@pytest.mark.parametrize("name", vllm_engine.IDENTITY)
def test_options_do_not_say_whose_model_is_run(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match=f"options: '{name}' is set by the captioner's own keys"):
        offline(options={name: "another"})
