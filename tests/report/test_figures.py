"""What the figures show is what was measured, and the same inputs give the same bytes."""

import io
import itertools
import json
from itertools import chain
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import seaborn as sns
import torch
from matplotlib.colors import to_hex
from PIL import Image
from transformers import AutoTokenizer

from flame.data.datasets import Sample
from flame.data.shards import ShardWriter
from flame.embedding import checkpoints, store
from flame.embedding.attention import facet_mask
from flame.embedding.llm import FrozenLLM
from flame.figure import figure
from flame.report import captions, figures
from flame.report.figures import examples, mask, overhead
from flame.study.schema.figures import kinds, module
from flame.study.settings import FigureSettings
from tests.answers import counted, write

# run -> benchmark -> metric -> hits of so many queries
MEASURED = {
    "one": {"COCO": {"i2t_r@1": (10, 40), "t2i_r@1": (20, 40)}, "food": {"i2t_r@1": (45, 60)}},
    "one.seed1": {
        "COCO": {"i2t_r@1": (20, 40), "t2i_r@1": (10, 40)},
        "food": {"i2t_r@1": (30, 60)},
    },
    "seven": {"COCO": {"i2t_r@1": (30, 40), "t2i_r@1": (36, 40)}, "food": {"i2t_r@1": (15, 60)}},
}
PREFIX = ('Description: "', '". In a word,')
SUFFIXES = {"category": " the category:", "mood": " the mood, or atmosphere:"}
ROUNDS = {
    "separate": [4.0, 8.0, 6.0],
    "one_pass": [2.0, 2.0, 2.0],
    "everything": [1.0, 2.0, 2.0],
    "online": [50.0, 60.0, 70.0],
    "clip": [2.0, 3.0, 4.0],
    "flame": [1.0, 1.0, 1.0],
}


def settings(values, **changes):
    plain = {
        "study": "tiny",
        "name": "figure",
        "figure": {"title": "Figure 4. Languages"} | values,
        "datasets": {"COCO": "scenes-short", "food": "scenes-food"},
        "stand_ins": ("COCO", "food"),
        "runs": {
            "one": {"trainings": ("one", "one.seed1"), "method": "flame", "drawn": True},
            "seven": {"trainings": ("seven",), "method": "flame", "drawn": False},
        },
        "prefix": None,
        "facets": {},
        "version": 1,
    }
    return FigureSettings.model_validate(plain | changes)


def prompts(**changes):
    return settings(
        {
            "kind": "prompts",
            "runs": {7: "seven", 1: "one"},
            "columns": [
                {"benchmark": "COCO", "metric": "i2t_r@1"},
                {"benchmark": "both", "metric": "i2t_r@1", "mean_of": ["COCO", "food"]},
            ],
        }
        | changes
    )


def radar(**changes):
    return settings(
        {
            "kind": "radar",
            "runs": {"FLAME": "seven", "CLIP": "one"},
            "languages": {"en": "COCO", "de": "food", "fr": "COCO"},
            "metrics": ["i2t_r@1"],
        }
        | changes
    )


def drawn(inputs, chosen):
    with figures.style():
        return module(chosen.figure.kind).draw(inputs, chosen)


@pytest.fixture
def results(tmp_path):
    """JSON and Parquet files of `MEASURED`."""
    files = []
    for run, benchmarks in MEASURED.items():
        hits = {
            b: {m: counted(*n) for m, n in metrics.items()} for b, metrics in benchmarks.items()
        }
        files += write(tmp_path, run, hits)
    return files


@pytest.fixture(scope="module")
def dots(tmp_path_factory):
    """Six images, each of one grey, with two captions of one kind and one of another."""
    root = tmp_path_factory.mktemp("figures") / "dots"
    writer = ShardWriter(root, samples_per_shard=10)
    for i in range(6):
        data = io.BytesIO()
        Image.new("RGB", (8, 8), (40 * i, 40 * i, 40 * i)).save(data, "PNG")
        captions = {"raw": [f"raw {i}"], "short": [f"text {i}", f"another {i}"]}
        writer.add(Sample(key=f"dot-{i}", image=data.getvalue(), captions=captions))
    writer.close()
    return root


def returned(folder: Path, best: list[int]) -> Path:
    """Answers of a training: number of the image that it returns for every text of `dots`."""
    folder.mkdir()
    rows = pl.DataFrame(
        {
            "benchmark": "COCO",
            "metric": "t2i_r@1",
            "query": range(12),
            "key": [f"dot-{i // 2}" for i in range(12)],
            "hit": [b == i // 2 for i, b in enumerate(best)],
            "best": [f"dot-{b}" for b in best],
        }
    )
    rows.write_parquet(folder / "benchmarks.parquet")
    return folder / "benchmarks.parquet"


def test_every_kind_of_figure_has_a_module_that_draws():
    assert kinds() == [
        *(
            "captions",
            "examples",
            "knowledge",
            "mask",
            "overhead",
            "prompts",
            "radar",
            "variance",
            "words",
        )
    ]
    for kind in kinds():
        assert callable(module(kind).draw)
    with pytest.raises(ValueError, match=r"'radr' \(did you mean 'radar'\?\)"):
        module("radr")


def test_colours_are_those_for_the_colour_blind():
    assert list(figures.PALETTE) == [c.upper() for c in sns.color_palette("colorblind").as_hex()]


@pytest.mark.parametrize("make", [prompts, radar])
def test_same_inputs_give_the_same_bytes(results, tmp_path, make):
    contents = []
    for name in ("a", "b"):
        paths = tmp_path / f"{name}.png", tmp_path / f"{name}.pdf"
        figure(results, *paths, make())
        contents.append([path.read_bytes() for path in paths])
    assert contents[0] == contents[1]
    assert contents[0][0].startswith(b"\x89PNG")
    assert contents[0][1].startswith(b"%PDF")
    assert b"CreationDate" not in contents[0][1]


def test_title_names_the_study(results):
    assert drawn(results, radar()).get_suptitle() == "Figure 4. Languages (tiny study)"


def test_prompts_shows_means_with_intervals_and_every_training(results):
    figure = drawn(results, prompts())
    first, second = figure.axes
    for axes, one, seven, single in (
        (first, (25 + 50) / 2, 75, [25, 50]),
        (second, ((25 + 75) / 2 + 50) / 2, (75 + 25) / 2, [50, 50]),
    ):
        (curve,) = axes.containers
        assert list(curve.lines[0].get_xdata()) == [1, 7]
        assert list(curve.lines[0].get_ydata()) == pytest.approx([one, seven])
        for value, bar in zip((one, seven), curve.lines[2][0].get_segments(), strict=True):
            assert bar[0, 1] < value < bar[1, 1]
        (circles,) = [line for line in axes.lines if line.get_marker() == "o"]
        assert list(circles.get_ydata()) == pytest.approx(single)
    assert first.get_title().startswith("scenes-short\n(for COCO)\n")
    assert first.get_ylim()[1] - first.get_ylim()[0] == second.get_ylim()[1] - second.get_ylim()[0]
    note = " ".join(figure.get_supxlabel().split())
    assert "interval over queries only" in note  # `seven` was trained once
    assert "do not start at 0" in note


def test_prompts_shows_the_papers_curve_below(results, tmp_path):
    table = tmp_path / "table6.csv"
    table.write_text(
        "prompts,scenes-short (for COCO) i2t_r@1,COCO i2t_r@1 paper,food i2t_r@1 paper\n"
        "1,0,30,50\n7,0,40,54\n"
    )
    figure = drawn([*results, table], prompts(table="table6"))
    first, _, paper, mean = figure.axes
    assert (first.get_ylabel(), paper.get_ylabel()) == ("tiny study", "paper")
    assert list(paper.lines[0].get_ydata()) == [30, 40]
    assert list(mean.lines[0].get_ydata()) == [40, 47]  # of COCO and food, as in our panel
    spans = {round(np.ptp(axes.get_ylim()), 6) for axes in figure.axes}
    assert len(spans) == 1
    assert "paper's numbers" in " ".join(figure.get_supxlabel().split())


def test_radar_has_a_value_a_language_the_best_on_each_spoke_and_averages(results):
    (axes,) = drawn(results, radar()).axes
    values = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert values == {"FLAME (58.3)": [75, 25, 75, 75], "CLIP (45.8)": [37.5, 62.5, 37.5, 37.5]}
    spokes = [label.get_text() for label in axes.get_xticklabels()]
    assert spokes == ["en\n\u25cf 75.0", "de\n\u25a0 62.5", "fr\n\u25cf 75.0"]
    colours = [label.get_color() for label in axes.get_xticklabels()]
    owners = [line.get_color() for line in axes.lines]
    assert colours == [owners[0], owners[1], owners[0]]
    styles = {(line.get_linestyle(), line.get_marker()) for line in axes.lines}
    assert len(styles) == 2


def test_runs_that_share_a_best_value_are_all_named(results):
    chosen = radar(runs={"FLAME": "seven", "again": "seven"})
    (axes,) = drawn(results, chosen).axes
    assert axes.get_xticklabels()[0].get_text() == "en\n\u25cf\u25a0 75.0"
    assert axes.get_xticklabels()[0].get_color() == figures.GREY


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_no_text_is_cut_or_overprinted(results, count):
    """Whatever the number of runs: the figure is as wide as its title, note and panels need."""
    runs = {f"FLAME with prompts {n}": "seven" for n in range(count)}
    picture = drawn(results, radar(runs=runs, title="Figure 4. Languages " + "of the world " * 9))
    picture.draw_without_rendering()
    note, title = picture._supxlabel, picture._suptitle
    (axes,) = picture.axes
    boxes = [title.get_window_extent(), axes.get_tightbbox(), note.get_window_extent()]
    for box in boxes:
        assert picture.bbox.x0 <= box.x0 < box.x1 <= picture.bbox.x1
        assert picture.bbox.y0 <= box.y0 < box.y1 <= picture.bbox.y1
    for above, below in itertools.pairwise(boxes):
        assert above.y0 >= below.y1


def test_radar_has_a_plot_a_metric(results):
    chosen = radar(
        languages=dict.fromkeys(("en", "de", "fr"), "COCO"), metrics=["i2t_r@1", "t2i_r@1"]
    )
    titles = [axes.get_title() for axes in drawn(results, chosen).axes]
    assert titles == ["image to text R@1, %", "text to image R@1, %"]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    out = tmp_path_factory.mktemp("mask") / "llama"
    checkpoints.random("llama", out, layers=1)
    return out


def test_mask_is_that_of_the_llm_over_its_real_tokens(llm):
    chosen = settings(
        {
            "kind": "mask",
            "llm": "llama",
            "prompt": "long",
            "facets": list(SUFFIXES),
            "caption": "A $x$ cat.",
        },
        prefix=PREFIX,
        facets=SUFFIXES,
    )
    encoder = FrozenLLM(llm, device="cpu")
    (prefix,) = encoder.prefixes(["A $x$ cat."], PREFIX)
    endings = encoder.endings(PREFIX[1], [*SUFFIXES.values()])
    picture = drawn([llm], chosen)
    axes = picture.axes[0]
    shown = np.asarray(axes.images[0].get_array())
    expected = facet_mask(len(prefix), [len(ids) for ids in endings]).numpy()
    np.testing.assert_array_equal(shown >= 0, expected)
    # The first facet is masked in the second's rows, and every facet has a colour of its own.
    start, stop = len(prefix), len(prefix) + len(endings[0])
    assert (shown[stop:, start:stop] == -1).all()
    assert set(np.unique(shown)) == {-1, 0, 1, 2}
    text = encoder.tokenizer.decode([*chain(prefix, *endings)])
    labels = axes.get_yticklabels()
    assert "".join(t.get_text() for t in labels).replace("\u2423", "") == text.replace(" ", "")
    # The random LLM reads letters; the axis shows the words that they spell.
    assert labels[0].get_text() == "Description"
    assert axes.get_yticks()[0] == (len("Description") - 1) / 2
    bold = [axes.get_yticks()[i] for i, t in enumerate(labels) if t.get_fontweight() == "bold"]
    assert bold == [stop - 1, len(expected) - 1]
    assert max(picture.get_size_inches()) * 200 <= 2400


def test_words_are_put_together_from_tokens(llm):
    tokenizer = FrozenLLM(llm, device="cpu").tokenizer
    ids = tokenizer('an \u00e9migr\u00e9, 12:"', add_special_tokens=False).input_ids
    spelled = mask.words(tokenizer, ids)
    assert sum(length for _, length in spelled) == len(ids)
    texts = [text for text, _ in spelled if text != "\u2423"]
    assert texts == ["an", "\u00e9migr\u00e9", ",", "12", ":", '"']


def test_position_ids_restart_after_the_prefix():
    tokens = mask.Tokens(prefix=[5, 6, 7], facets=[[1, 2], [3]])
    assert mask.positions(tokens) == [0, 1, 2, 3, 4, 3]
    assert mask.blocks(tokens).tolist() == [
        [0, -1, -1, -1, -1, -1],
        [0, 0, -1, -1, -1, -1],
        [0, 0, 0, -1, -1, -1],
        [0, 0, 0, 1, -1, -1],
        [0, 0, 0, 1, 1, -1],
        [0, 0, 0, -1, -1, 2],
    ]


def test_mask_tokens_are_those_of_the_encoder(llm):
    encoder = FrozenLLM(llm, device="cpu")
    before, after = PREFIX
    tokens = mask.tokenize(
        AutoTokenizer.from_pretrained(llm), f"{before}a dog{after}", after, [*SUFFIXES.values()]
    )
    assert [tokens.prefix] == encoder.prefixes(["a dog"], PREFIX)
    assert tokens.facets == encoder.endings(after, [*SUFFIXES.values()])


def test_overhead_shows_the_rounds_ratios(tmp_path):
    path = tmp_path / "overhead.json"
    measured = {"seconds": ROUNDS, "captions": 8, "steps": {"flame": 5}, "device": "CPU, 1 thread"}
    path.write_text(json.dumps(measured))
    left, right = drawn([path], settings({"kind": "overhead"})).axes
    assert overhead.relative(ROUNDS, overhead.EMBEDDING) == {
        "separate": (4.0, 3.0, 4.0),
        "one_pass": (1.0, 1.0, 2.0),
        "everything": (1.0, 1.0, 1.0),
    }
    assert [bar.get_width() for bar in left.patches] == [4.0, 1.0, 1.0]
    texts = [text.get_text() for text in right.texts]
    assert texts == ["60.0x (50.0-70.0)", "3.00x (2.00-4.00)", "1 = 1 s"]
    # On a logarithmic axis the bar of 1 has a length, too.
    assert right.get_xscale() == "log"
    assert right.patches[-1].get_width() == pytest.approx(0.9)
    assert right.get_xlim()[0] == pytest.approx(0.1)
    assert right.get_xscale() == "log"


def test_evenly_takes_the_middles_of_equal_parts():
    assert examples.evenly(10, 5) == [1, 3, 5, 7, 9]
    assert examples.evenly(12, 2) == [3, 9]
    assert examples.evenly(3, 8) == [0, 1, 2]


def frame(axes):
    return to_hex(axes.spines["top"].get_edgecolor()).upper()


def test_examples_show_what_each_run_returns_and_whether_it_is_right(tmp_path, dots):
    # Of twelve texts the shown ones are 3 and 9, of the images 1 and 4.
    right = [i // 2 for i in range(12)]
    wrong = [*right[:9], 2, *right[10:]]
    inputs = [returned(tmp_path / "one", right), returned(tmp_path / "seven", wrong), dots]
    chosen = settings(
        {
            "kind": "examples",
            "runs": {"FLAME": "seven", "CLIP": "one"},
            "benchmark": "COCO",
            "queries": 2,
        },
        datasets={"COCO": "dots"},
    )
    axes = drawn(inputs, chosen).axes
    (text, flame, clip, own), (other, other_flame, *_, other_own) = axes[:4], axes[4:]
    assert text.texts[0].get_text() == "another 1"
    assert other.texts[0].get_text() == "another 4"
    greys = [int(np.asarray(a.images[0].get_array())[0, 0, 0]) for a in (flame, clip, own)]
    assert greys == [40, 40, 40]
    assert int(np.asarray(other_flame.images[0].get_array())[0, 0, 0]) == 80
    assert int(np.asarray(other_own.images[0].get_array())[0, 0, 0]) == 160
    assert frame(flame) == frame(clip) == examples.RIGHT
    assert frame(other_flame) == examples.WRONG
    assert [a.texts[0].get_text() for a in (flame, other_flame)] == ["\u2713", "\u2717"]
    assert flame.get_title() == "FLAME\nR@1 91.7 %"


def test_examples_refuse_queries_that_fit_no_captions(tmp_path, dots):
    answers = pl.DataFrame({"key": ["dot-0", "dot-1"]})
    with pytest.raises(
        ValueError, match=r"match the captions of 0 kinds, not of one \(raw, short\)"
    ):
        examples.query_texts(dots / "captions.parquet", answers)


def test_words_stand_on_their_patches(tmp_path, dots):
    words = tmp_path / "seven" / "COCO.words.json"
    words.parent.mkdir()
    picture = {
        "key": "dot-3",
        "label": "dot",
        "words": [["left", "right"], ["lower", "a$very$long$token"]],
        "probabilities": [[0.5, 0.25], [0.125, 0.0]],
    }
    words.write_text(json.dumps([picture]))
    chosen = settings(
        {"kind": "words", "run": "seven", "benchmark": "COCO"},
        datasets={"COCO": "dots"},
        speaker=("gemma", 0.01),
    )
    figure = drawn([words, dots], chosen)
    note = " ".join(figure.get_supxlabel().split())
    assert "the word whose probability gemma raises most above that for a mean caption" in note
    assert "Images: dots (for COCO)." in note
    (axes,) = figure.axes
    assert int(np.asarray(axes.images[0].get_array())[0, 0, 0]) == 120
    places = {text.get_text(): text.get_position() for text in axes.texts}
    assert places == {
        "left": (0.25, 0.25),
        "right": (0.75, 0.25),
        "lower": (0.25, 0.75),
        "a$very$long$token": (0.75, 0.75),
    }
    alphas = [text.get_alpha() for text in axes.texts]
    assert alphas == sorted(alphas, reverse=True)
    assert alphas[0] == 1
    assert axes.texts[3].get_fontsize() < axes.texts[0].get_fontsize()
    assert axes.get_xlabel() == "dot"


def told(folder: Path, name: str, texts: dict[str, list[str]], vectors: dict[str, list]) -> None:
    """Long captions of some images, and a vector of each in a store of its own."""
    (folder / name).mkdir(parents=True)
    rows = [(key, "long", text, "") for key, found in texts.items() for text in found]
    rows += [(key, "raw", "raw", "") for key in texts]
    table = pl.DataFrame(rows, schema=["key", "kind", "text", "flags"], orient="row")
    table.write_parquet(folder / name / "captions.parquet")
    path, keys = folder / f"{name}.zarr", [row[0] for row in rows if row[1] == "long"]
    store.create(path, {"kind": "long", "facets": SUFFIXES, "part": 0, "parts": 1})
    writer = store.Writer(path, name, keys=keys, facets=[*SUFFIXES], dim=2)
    each = [[vectors[key], vectors[key]] for key in keys]
    writer.write(range(len(keys)), np.array(each, np.float32))


TEXTS = {"a": ["A red, red apple."], "b": ["It's a well-lit room."], "c": ["A cat"]}
VECTORS = {"a": [1, 0], "b": [0, 1], "c": [0, -1]}


def compared(folder: Path) -> list[Path]:
    return [folder / name for name in ("own", "other", "own.zarr", "other.zarr")]


def captions_figure():
    return settings(
        {
            "kind": "captions",
            "datasets": {"ours": "own", "theirs": "other"},
            "kinds": ["long"],
            "llm": "tiny",
        },
        averaged={"long": tuple(SUFFIXES)},
    )


def test_two_captioners_that_write_the_same_are_alike_in_all(tmp_path):
    for name in ("own", "other"):
        told(tmp_path, name, TEXTS, VECTORS)
    picture = drawn(compared(tmp_path), captions_figure())
    lengths, vocabulary, similarity = picture.axes
    heads = [axes.get_legend().get_title().get_text() for axes in picture.axes]
    assert heads[1] == "Vocabulary of long captions: 100 % in common"
    legends = [[t.get_text() for t in axes.get_legend().get_texts()] for axes in picture.axes]
    assert legends == [
        ["ours: median 4", "theirs: median 4"],
        ["ours: 7 words, 100.0 % known", "theirs: 7 words, 100.0 % known"],
        ["same image: median 1.000, nearest in 100.0 %", "other images: median 0.000"],
    ]
    for axes in (lengths, vocabulary):
        first, second = axes.lines
        assert first.get_xydata().tolist() == second.get_xydata().tolist()
    # In all, a hundred percent of the captions and of the pairs are shown.
    for line in (*lengths.lines, *similarity.lines):
        assert sum(line.get_ydata()) / 2 == pytest.approx(100)
    assert vocabulary.lines[0].get_xydata().tolist() == [[0, 0], [4, 3], [8, 6], [10, 7]]
    assert [text for text in picture.texts if "3 images; embeddings by tiny" in text.get_text()]


def test_captions_are_matched_by_key_and_the_first_of_an_image_counts(tmp_path):
    told(tmp_path, "own", TEXTS, VECTORS)
    others = {"c": ["Other cat", "second"], "x": ["Not there"], "a": ["Other apple"]}
    told(tmp_path, "other", others, {"c": [3, 0], "x": [9, 9], "a": [0, 5]})
    own, other, *stores = compared(tmp_path)
    first, second = captions.matched([own, other], stores, "long", [*SUFFIXES])
    assert first.texts == ["A red, red apple.", "A cat"]
    assert second.texts == ["Other apple", "Other cat"]
    assert first.features.tolist() == [[1, 0], [0, -1]]
    assert second.features.tolist() == [[0, 1], [1, 0]]


def test_captions_of_no_common_image_are_refused(tmp_path):
    told(tmp_path, "own", {"a": ["one"]}, {"a": [1, 0]})
    told(tmp_path, "other", {"b": ["two"]}, {"b": [1, 0]})
    with pytest.raises(ValueError, match="0 images have long captions in 'own' and 'other'"):
        drawn(compared(tmp_path), captions_figure())


def test_words_are_counted_and_what_is_shared_of_them():
    own = captions.words_of(["A red, RED apple!", "It's a well-lit room"])
    assert own == [["a", "red", "red", "apple"], ["it's", "a", "well-lit", "room"]]
    assert captions.growth(own) == ([0, 4, 8], [0, 3, 6])
    other = [["a", "room"], ["green"]]
    # Of 7 distinct words 2 are in both; of our 8 words "a", "a", "room"; of their 3 "a", "room".
    assert captions.shared(own, other) == (2 / 7, 3 / 8, 2 / 3)


def test_similarity_is_that_of_the_same_image_beside_that_of_another():
    first = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    second = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, -1.0]])
    found = captions.similarity(first, second)
    np.testing.assert_allclose(found.same, [1, 0.6, -0.8], rtol=1e-6)
    np.testing.assert_allclose(found.other, [0, 0, 0.96], atol=1e-6)
    assert found.nearest == pytest.approx(2 / 3)


def test_inputs_that_are_missing_are_named(tmp_path, dots):
    with pytest.raises(ValueError, match=r"data set 'dot' \(did you mean 'dots'\?\)"):
        figures.dataset_folder([dots], "dot")
    with pytest.raises(ValueError, match="no file of training 'nine'; known: seven"):
        figures.training_file([dots, tmp_path / "seven" / "benchmarks.parquet"], "nine")
