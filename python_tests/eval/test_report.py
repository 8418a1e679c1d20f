"""A report's numbers are those of the model, and its page is whole, self-contained and safe."""

import html.parser
import re

import pytest
import torch

import prunepath
from prunepath.errors import PrunePathError
from prunepath.eval import report
from prunepath.eval.perplexity import evaluate
from prunepath.eval.report import measure, split_pieces, write_report
from prunepath.nn import sparse_ffns
from prunepath.nn.observers import observing_counts

SMALL = {"sequence_length": 64, "partition_tokens": 512, "router_tokens": 1024, "calibration_tokens": 512}
PASSAGE = "Naïve <b>façade</b> & 日本 🎉\n"


@pytest.fixture
def numbers(sparse, tokenizer, texts):
    prunepath.set_threshold(sparse, [0.5, 0.25])
    found = measure(
        sparse, tokenizer, iter([PASSAGE, *texts[:4]]), name="<model>", budgets=[0.25, 0.5], sequence_length=96
    )
    assert prunepath.get_thresholds(sparse) == [0.5, 0.25]
    return found


class Page(html.parser.HTMLParser):
    """The text, the tags and the attributes of a page."""

    def __init__(self, source):
        super().__init__()
        self.attributes, self.open, self.text = [], [], ""
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in ("meta", "img", "input", "polyline", "path"):
            self.open.append(tag)

    handle_startendtag = handle_starttag

    def handle_endtag(self, tag):
        if tag in ("polyline", "path"):
            return
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def page_of(numbers, tmp_path):
    write_report(numbers, tmp_path / "report.html")
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(source)
    assert page.open == []
    return source, page


def test_rows_go_from_dense_to_sparse_and_agree_with_an_evaluation(numbers, sparse, tokenizer, texts):
    assert [row["budget"] for row in numbers["rows"]] == [1.0, 0.5, 0.25]
    assert numbers["rows"][0]["active_fraction"] == 1.0
    for row in numbers["rows"]:
        prunepath.set_threshold(sparse, row["thresholds"])
        expected = evaluate(sparse, tokenizer, [PASSAGE, *texts[:4]], sequence_length=96)
        assert row["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-6)
        assert row["active_fraction"] == pytest.approx(expected.active_fraction)


def test_layers_usage_and_histogram_are_of_the_same_tokens(numbers):
    assert numbers["num_experts"] == [8, 8]
    for row in numbers["rows"]:
        assert row["active_fraction"] == pytest.approx(sum(row["per_layer"]) / 2)
        for layer, usage in zip(row["per_layer"], row["usage"], strict=True):
            assert layer == pytest.approx(sum(usage) / 8, abs=1e-4)
            assert usage == sorted(usage, reverse=True)
            assert all(0 <= share <= 1 for share in usage)
        assert len(row["histogram"]) == 8
        assert sum(row["histogram"]) == pytest.approx(1)
        assert sum((i + 1) / 8 * share for i, share in enumerate(row["histogram"])) == pytest.approx(
            row["active_fraction"]
        )
    assert len(set(numbers["rows"][2]["usage"][0])) > 1, "experts differ in how often they run"


def test_bytes_read_count_the_routers(numbers):
    router, ffn = 8 * 32 + 8, 3 * 32 * 64  # at full rank, as the rank of a model so small is
    for row in numbers["rows"]:
        assert row["read_fraction"] == pytest.approx(row["active_fraction"] + router / ffn)


def test_many_experts_are_binned(dense, tokenizer, texts):
    sparse = prunepath.convert(dense, tokenizer, texts, prunepath.PrunePathConfig(**SMALL))
    numbers = measure(sparse, tokenizer, texts[:4], name="m", budgets=[0.25], sequence_length=96)
    for row in numbers["rows"]:
        assert len(row["histogram"]) == 64
        assert [len(usage) for usage in row["usage"]] == [64, 64]
        assert sum(row["usage"][0]) / 64 == pytest.approx(row["per_layer"][0], abs=1e-4)
    shares = torch.rand(3, 1024).tolist()
    binned = [report._from_most_used(torch.tensor(layer)) for layer in shares]
    assert [len(layer) for layer in binned] == [128] * 3
    for layer, bins in zip(shares, binned, strict=True):
        assert bins == sorted(bins, reverse=True)
        assert sum(bins) / 128 == pytest.approx(sum(layer) / 1024, abs=1e-4)
    histogram = report._histogram([torch.tensor([0, *[1] * 1000]), torch.tensor([0, *[1] * 500])])
    assert len(histogram) == 64
    assert sum(histogram) == pytest.approx(1)
    assert max(histogram) < 0.02


def test_the_passage_has_the_active_fractions_of_its_tokens(numbers, sparse, tokenizer):
    pieces = numbers["passage"]["pieces"]
    assert "".join(pieces) == PASSAGE
    sizes = [len(piece.encode()) for piece in pieces]
    assert numbers["passage"]["tokens"] == sizes, "a token is a byte, a piece a character"
    assert set(numbers["passage"]["active"][0][0]) == {1.0}
    prunepath.set_threshold(sparse, numbers["rows"][1]["thresholds"])
    found = {}
    ffns = list(sparse_ffns(sparse).values())
    with observing_counts(ffns, lambda ffn, counts: found.__setitem__(ffn, counts.double() / 8)), torch.no_grad():
        sparse(torch.tensor([[0, *tokenizer(PASSAGE)["input_ids"]]]))
    at = 1
    for size, active in zip(sizes, numbers["passage"]["active"][1], strict=True):
        expected = [found[ffn][at : at + size].mean().item() for ffn in ffns]
        assert active == pytest.approx(expected, abs=1e-4)
        at += size


@pytest.mark.parametrize("sequence_length", [2, 16])
def test_no_call_is_longer_than_the_window(sparse, tokenizer, texts, sequence_length):
    lengths = []
    sparse.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    options = dict(name="m", budgets=[0.5], sequence_length=sequence_length, max_tokens=40)
    numbers = measure(sparse, tokenizer, texts, **options)
    assert max(lengths) == sequence_length
    assert "".join(numbers["passage"]["pieces"]) == texts[0][: sequence_length - 1]


def test_characters_that_take_several_tokens_stay_whole(tokenizer):
    ids = tokenizer("é日🎉a")["input_ids"]
    assert [(text, len(part)) for text, part in split_pieces(tokenizer, ids)] == [
        ("é", 2),
        ("日", 3),
        ("🎉", 4),
        ("a", 1),
    ]
    # A text cut inside a character, and one that has the replacement character itself.
    assert [text for text, _ in split_pieces(tokenizer, ids[:4])] == ["é", "\ufffd"]
    assert "".join(text for text, _ in split_pieces(tokenizer, tokenizer("a\ufffdb")["input_ids"])) == "a\ufffdb"


def test_the_page_is_self_contained_and_shows_text_as_text(numbers, tmp_path):
    source, page = page_of(numbers, tmp_path)
    links = [value for _, name, value in page.attributes if name in ("src", "href", "srcset", "action")]
    assert links and all(value.startswith("data:image/png;base64,") for value in links)
    assert not re.search(r"url\(|@import|https?://", source)
    assert "<model>" in page.text
    assert PASSAGE in page.text
    assert "<b>façade" not in source
    assert not re.search(r"\b(nan|inf|undefined|None)\b", source.split("<body>")[1].split("<script>")[0])


def test_every_budget_has_its_point_picture_and_passage(numbers, tmp_path):
    source, page = page_of(numbers, tmp_path)
    assert sum(name == "data-map" for _, name, _ in page.attributes) == 3
    assert source.count('class="passage"') == 3
    assert sum(value is not None and "bits per byte" in value and "\n" in value for _, _, value in page.attributes) == 3
    checked = [tag for tag, name, _ in page.attributes if name == "checked"]
    assert checked == ["input"]


def test_many_layers_and_experts_make_a_page_of_bounded_size(numbers, tmp_path):
    layers, columns = 80, 128
    for row in numbers["rows"]:
        row.update(per_layer=[0.5] * layers, usage=[[0.5] * columns] * layers, histogram=[1 / 64] * 64)
    passage = {"pieces": ["x"] * 256, "tokens": [1] * 256, "active": [[[0.3125] * layers] * 256] * 3}
    source, page = page_of(numbers | dict(layers=layers, num_experts=[14336] * layers, passage=passage), tmp_path)
    assert len(source) < 1e6
    tips = [value for _, name, value in page.attributes if name == "data-tip"]
    assert len(tips) < 1100
    assert any(value.startswith("50% to 52% of the experts") for value in tips), "bars hold several counts"
    assert "14,336 experts" in page.text


def test_layers_of_different_widths_make_a_page(numbers, tmp_path):
    for row in numbers["rows"]:
        row["usage"] = [[0.5] * 4, [0.5] * 8]
    _, page = page_of(numbers | dict(num_experts=[4, 8]), tmp_path)
    assert "4 to 8 experts" in page.text


def test_one_layer_and_one_budget_make_a_page(numbers, tmp_path):
    rows = numbers["rows"][:2]
    for row in rows:
        row.update(per_layer=row["per_layer"][:1], usage=row["usage"][:1])
    active = [[piece[:1] for piece in of_row] for of_row in numbers["passage"]["active"][:2]]
    page_of(numbers | dict(layers=1, rows=rows, passage=numbers["passage"] | {"active": active}), tmp_path)


def test_the_dense_budget_alone_is_refused(sparse, tokenizer, texts):
    with pytest.raises(PrunePathError, match="at least one budget below 1"):
        measure(sparse, tokenizer, texts, name="m", budgets=[1.0], sequence_length=32)


def test_dense_and_uncalibrated_models_are_refused(dense, sparse, tokenizer, texts):
    options = dict(name="m", budgets=[0.5], sequence_length=32)
    with pytest.raises(PrunePathError, match="sparse checkpoint to report on, got a dense Llama"):
        measure(dense, tokenizer, texts, **options)
    sparse.config.quantization_config["budgets"] = {}
    with pytest.raises(PrunePathError, match="calibrated budgets"):
        measure(sparse, tokenizer, texts, **options)


def test_a_model_that_is_ruined_is_refused_and_has_its_thresholds_again(sparse, tokenizer, texts):
    prunepath.set_threshold(sparse, [0.5, 0.25])
    torch.nn.init.constant_(sparse.lm_head.weight, float("nan"))
    with pytest.raises(PrunePathError, match="finite loss"):
        measure(sparse, tokenizer, texts, name="m", budgets=[0.5], sequence_length=32)
    assert prunepath.get_thresholds(sparse) == [0.5, 0.25]
