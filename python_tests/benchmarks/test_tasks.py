"""The quality benchmark's tasks: splits without leaks, and scores that do not depend on how they are computed."""

import csv
import io
import json
import math
import os
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("needs the benchmarks folder of the source tree", allow_module_level=True)
sys.path.append(str(BENCHMARKS))  # where the benchmarks import each other from; prunepath itself is not there

from tasks import TASKS, answers, base, e2e  # noqa: E402
from tasks.base import Example, hidden_states, losses  # noqa: E402
from tasks.language import WINDOW, chat_turn  # noqa: E402

from prunepath.demo.run import model_folder  # noqa: E402
from prunepath.errors import PrunePathError  # noqa: E402
from prunepath.nn import sparse_ffns  # noqa: E402
from prunepath.nn.observers import counting  # noqa: E402

DATA = Path(os.environ.get("PRUNEPATH_DATA", BENCHMARKS.parent.parent / "shared" / "data"))
ZERO_SHOT = ("piqa", "winogrande", "boolq")
HEADED = {"mr": 2, "subj": 2, "banking77": 77}
# Of training (for wikitext and dolly it depends on the tokenizer), validation and test, where duplicates are left out.
SIZES = {
    "gsm8k": (7273, 200, 1319),
    "e2e": (42061, 200, 630),
    "mr": (8530, 1066, 1066),
    "subj": (8000, 1000, 1000),
}


@pytest.fixture(scope="module")
def tokenizer():
    with model_folder() as path:
        return transformers.AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A few rows of each set in its own format, some of them in two splits."""
    folder = tmp_path_factory.mktemp("data")
    write_text(folder, "lm/wikitext2-test-raw.txt", " = Test = \n" + " ".join(f"tést {i} ." for i in range(400)))
    write_text(folder, "lm/wikitext2-valid.txt", " = Valid = \n" + " ".join(f"<unk> {i * i} ," for i in range(300)))
    write_text(folder, "lm/wikitext2-train-1MB.txt", " = Train = \n" + " ".join(f"train {3 * i}" for i in range(900)))
    plain = '<doc id="1" url="x" title="A">\nA\n\n' + " ".join(f"plain {7 * i}" for i in range(400)) + "\n</doc>\n"
    write_text(folder, "lm/wikipedia-plain.txt", plain)
    rows = [{"instruction": f"Do {i % 390}.", "input": "x" * (i % 3), "output": f"Done {i}."} for i in range(400)]
    write_text(folder, "instruct/dolly-2k.json", json.dumps(rows))
    rows = [{"question": f"What is {i} + {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"} for i in range(240)]
    write_lines(folder, "instruct/gsm8k-train.jsonl", rows)
    write_lines(folder, "instruct/gsm8k-test.jsonl", [*rows[:3], {"question": "What is 0?", "answer": "0"}])
    meaning = "name[N{}], area[{}]"
    tables = {
        "trainset": [(meaning.format(i, "riverside"), f"N{i} is by the river.") for i in range(20)],
        "devset": [(meaning.format(i // 2, "city"), f"{'In' if i % 2 else 'At'} the city, N{i}.") for i in range(12)],
        "testset_w_refs": [
            (meaning.format(i // 2, "café"), f"N{i // 2} is {'in' if i % 2 else 'at'} a café, they say.")
            for i in range(9)
        ],
    }
    archive(
        folder / "nlg/e2e-dataset.zip",
        {f"e2e-dataset/{name}.csv": table(("mr", "ref"), rows) for name, rows in tables.items()},
    )
    for task in ("mr", "subj"):
        texts = [[f"{word} number {i % 45} ." for i in range(50)] for word in ("bad", "good")]
        archive(folder / TASKS[task].archive, dict(zip(TASKS[task].files, map("\n".join, texts), strict=True)))
    questions = [(f"Where is card {i % 70}?", ("card_lost", "top_up", "transfer")[i % 70 % 3]) for i in range(90)]
    write_text(folder, "nlu/banking77-train.csv", table(("text", "category"), questions))
    write_text(folder, "nlu/banking77-test.csv", table(("text", "category"), [*questions[:4], ("Top up?", "top_up")]))
    rows = [
        {"query": f"Question: lift {'a box ' * i}\n", "choices": [f"by {i} hands", "with a crane, then"], "gold": i % 2}
        for i in range(6)
    ]
    write_lines(folder, "choice/piqa.jsonl", rows)
    rows = [
        {"context_options": [f"Ann met Bo {i} times as Ann", f"Ann met Bo {i} times as Bo"], "continuation": "was in."}
        | {"gold": i % 2}
        for i in range(5)
    ]
    write_lines(folder, "choice/winogrande.jsonl", rows)
    rows = [
        {"query": f"Passage: {'Water is wet. ' * i}\nQuestion: is it {i}?", "choices": ["no", "yes"], "gold": i % 2}
        for i in range(7)
    ]
    write_lines(folder, "nlu/boolq.jsonl", rows)
    return folder


def write_text(folder, name, text):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")


def write_lines(folder, name, rows):
    write_text(folder, name, "".join(json.dumps(row) + "\n" for row in rows))


def table(header, rows):
    file = io.StringIO(newline="")
    csv.writer(file).writerows([header, *rows])
    return file.getvalue()


def archive(path, files):
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as file:
        for name, text in files.items():
            file.writestr(name, text)


def splits_of(task):
    return task.training_examples(), task.validation_examples(), task.test_examples


def check_splits(task, tokenizer):
    splits = splits_of(task)
    if task.name in ZERO_SHOT:
        assert splits == ([], [], [])
        return
    assert all(splits)
    # Texts, so that two ways to tokenize one text would count as an overlap.
    texts = [{tokenizer.decode(list(example.key)) for example in split} for split in splits]
    assert not texts[0] & texts[1]
    assert not texts[0] & texts[2]
    assert not texts[1] & texts[2]
    for example in (*splits[0], *splits[1], *splits[2]):
        assert 1 <= example.scored_from <= len(example.ids)
        if task.name in HEADED:
            assert example.head == task.name and 0 <= example.label < task.num_classes == HEADED[task.name]
        else:
            assert example.head is None


@pytest.mark.parametrize("name", [name for name in TASKS if name != "answers"])
def test_splits_share_no_text(data, tokenizer, name):
    check_splits(TASKS[name](data, tokenizer), tokenizer)


@pytest.mark.parametrize("name", [name for name in TASKS if name != "answers"])
def test_splits_of_the_whole_sets_share_no_text(tokenizer, name):
    if not DATA.is_dir():
        pytest.skip("needs the data sets: PRUNEPATH_DATA")
    task = TASKS[name](DATA, tokenizer)
    check_splits(task, tokenizer)
    if name in SIZES:
        assert tuple(map(len, splits_of(task))) == SIZES[name]


def test_a_limit_cuts_the_test_split_only(data, tokenizer):
    whole, cut = (TASKS["dolly"](data, tokenizer, limit) for limit in (None, 3))
    assert cut.test_examples == whole.test_examples[:3]
    assert cut.training_examples() == whole.training_examples()


def test_a_missing_file_is_named(tmp_path, tokenizer):
    with pytest.raises(PrunePathError, match=r"gsm8k-test\.jsonl"):
        TASKS["gsm8k"](tmp_path, tokenizer).validation_examples()


@pytest.mark.parametrize("bos", [True, False])
def test_windows_cover_the_text(data, bos):
    with model_folder() as path:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    if not bos:
        tokenizer.bos_token = None
    text = (data / "lm/wikitext2-test-raw.txt").read_text("utf-8")
    examples = TASKS["wikitext"](data, tokenizer).test_examples
    assert len(examples) > 2 and all(len(example.ids) == WINDOW for example in examples[:-1])
    if bos:
        assert {example.ids[0] for example in examples} == {tokenizer.bos_token_id}
        assert tokenizer.decode([token for example in examples for token in example.ids[1:]]) == text
        assert sum(example.size for example in examples) == len(text.encode())
    else:
        assert tokenizer.decode([token for example in examples for token in example.ids]) == text
        spelled = [len(tokenizer.decode(example.ids[1:]).encode()) for example in examples]
        assert sum(example.size for example in examples) == pytest.approx(sum(spelled), abs=2 * len(examples))


def test_tags_of_articles_are_no_text(data, tokenizer):
    texts = [tokenizer.decode(example.ids) for example in TASKS["wikitext"](data, tokenizer).read("train")]
    assert any("plain 7" in text for text in texts) and not any("doc" in text for text in texts)


def test_answers_are_scored_with_the_end_of_their_turn(data, tokenizer):
    task = TASKS["gsm8k"](data, tokenizer)
    example = task.test_examples[-1]
    assert tokenizer.decode(example.ids[: example.scored_from]) == "<|endoftext|>What is 0?\n\n"
    assert example.ids[example.scored_from :] == [*task.encode(["0"], special=False)[0], tokenizer.eos_token_id]
    assert example.size == 1


def test_a_chat_template_makes_prompt_and_answer():
    with model_folder() as path:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    turn = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
    tokenizer.chat_template = turn + "{% if add_generation_prompt %}<assistant>{% endif %}"
    assert chat_turn(tokenizer, "Why?", "So.") == ("<user>Why?</s>\n<assistant>", "So.</s>")
    tokenizer.chat_template = turn.replace("m.content", "m.content | upper")
    with pytest.raises(PrunePathError, match="template"):
        chat_turn(tokenizer, "Why?", "So.")


def sequences(count, vocabulary):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 40, (count,), generator=generator).tolist()
    rows = [torch.randint(0, vocabulary, (length,), generator=generator).tolist() for length in lengths]
    found = [(ids, 1 + i % (len(ids) - 1)) for i, ids in enumerate(rows)]
    return [*found, ([*rows[0][:-1], 5], len(rows[0]) - 1), ([*rows[0][:-1], 6], len(rows[0]) - 1)]


@pytest.mark.parametrize(("tokens", "logits"), [(2048, 2**24), (64, 9000), (1, 1)])
def test_losses_are_those_of_each_sequence_alone(model, monkeypatch, tokens, logits):
    """However sequences are batched, padded and cut in chunks."""
    monkeypatch.setitem(base._BATCH_TOKENS, "cpu", tokens)
    monkeypatch.setitem(base._LOGITS, "cpu", logits)
    found = sequences(20, model.config.vocab_size)
    expected = []
    for ids, scored_from in found:
        with torch.no_grad():
            table = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected.append(-sum(table[place - 1, ids[place]].item() for place in range(scored_from, len(ids))))
    assert losses(model, found) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_padding_is_told_to_sparse_ffns(make_sparse):
    sparse = make_sparse("llama")
    rows = [[1, 2, 3, 4, 5, 6, 7], [8, 9], [10, 11, 12]]
    with counting(sparse_ffns(sparse).values()) as record:
        losses(sparse, [(ids, 1) for ids in rows])
    # The last token of a sequence is only predicted.
    assert {int(counts.sum()) for counts in record.histogram} == {sum(len(ids) - 1 for ids in rows)}


def test_a_model_in_training_stays_so(model):
    model.train()
    try:
        losses(model, [([1, 2, 3], 1)])
        assert model.training
    finally:
        model.eval()


@pytest.mark.parametrize("name", ["wikitext", "dolly", "gsm8k"])
def test_bits_per_byte_are_of_all_bytes(data, tokenizer, model, name):
    task = TASKS[name](data, tokenizer, limit=4)
    result = task.evaluate(model)
    assert len(result["scores"]) == len(result["sizes"]) == 4
    assert result["value"] == pytest.approx(sum(result["scores"]) / math.log(2) / sum(result["sizes"]))
    # Nothing is known of the text by random weights: at least about log2 of the vocabulary for each token.
    tokens = sum(len(example.ids) - example.scored_from for example in task.test_examples)
    assert sum(result["scores"]) > 0.8 * tokens * math.log(model.config.vocab_size)


@pytest.mark.parametrize("name", HEADED)
def test_a_head_reads_the_last_token(data, tokenizer, model, name):
    task = TASKS[name](data, tokenizer)
    head = nn.Linear(32, task.num_classes, dtype=torch.float64)
    result = task.evaluate(model, nn.ModuleDict({name: head}))
    expected = []
    for example in task.test_examples:
        with torch.no_grad():
            state = model.model(torch.tensor([example.ids])).last_hidden_state[0, -1]
            expected.append(float(head(state.double()).argmax().item() == example.label))
    assert result["scores"] == expected
    assert result["value"] == pytest.approx(sum(expected) / len(expected))
    with pytest.raises(PrunePathError, match=f"head for task {name}"):
        task.evaluate(model)


def test_hidden_states_come_for_every_row_once(model):
    rows = [[1] * (1 + i % 7) for i in range(30)]
    found = sorted(number for numbers, _ in hidden_states(model, rows) for number in numbers)
    assert found == list(range(30))


@pytest.mark.parametrize("name", ZERO_SHOT)
def test_log_likelihoods_are_lm_evals(data, tokenizer, model, name):
    HFLM = pytest.importorskip("lm_eval.models.huggingface").HFLM
    Instance = pytest.importorskip("lm_eval.api.instance").Instance
    task = TASKS[name](data, tokenizer)
    pairs = [pair for row in task.rows() for pair in task.requests(row)]
    lm = HFLM(model, tokenizer=tokenizer, batch_size=3)
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    theirs = [value for value, _ in lm.loglikelihood(asked, disable_tqdm=True)]
    ours = [value for values in task.evaluate(model)["log_likelihoods"] for value in values]
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)


def test_prompts_are_lm_evals(data, tokenizer):
    """The templates of lm-eval 0.4's piqa, winogrande and boolq, filled in."""
    asked = {name: TASKS[name](data, tokenizer) for name in ZERO_SHOT}
    first = {name: task.requests(task.rows()[1]) for name, task in asked.items()}
    assert first["piqa"] == [
        ("Question: lift a box \nAnswer:", " by 1 hands"),
        ("Question: lift a box \nAnswer:", " with a crane, then"),
    ]
    assert first["winogrande"][1] == ("Ann met Bo 1 times as Bo", " was in.")
    assert first["boolq"] == [("Water is wet. \nQuestion: is it 1?\nAnswer:", f" {word}") for word in ("no", "yes")]


def test_piqa_weighs_by_characters(data, tokenizer, model, monkeypatch):
    task = TASKS["piqa"](data, tokenizer, limit=2)
    # By sum the first answer (10 characters) wins, by character the second (18).
    monkeypatch.setattr("tasks.choice.losses", lambda model, found: [10.0, 14.0, 10.0, 14.0])
    result = task.evaluate(model)
    assert result["scores"] == [0.0, 1.0]
    assert result["accuracy_by_sum"] == 0.5 and result["value"] == 0.5


def test_a_perfect_prediction_has_the_best_scores(data, tokenizer, model, monkeypatch):
    pytest.importorskip("rouge_score")
    pytest.importorskip("sacrebleu")
    task = TASKS["e2e"](data, tokenizer)
    references = list(task.references().values())
    assert sorted(map(len, references)) == [1, 2, 2, 2, 2]
    monkeypatch.setattr(task, "generate", lambda model, prompts: [texts[-1] for texts in references])
    result = task.evaluate(model)
    assert result["value"] == 1.0 and result["scores"] == [1.0] * 5
    assert result["bleu"] == pytest.approx(100.0)
    worse = e2e.score(["they say"] * 5, references)
    assert 0.0 < worse["value"] < 0.5 and worse["bleu"] < 50.0


def test_generation_is_that_of_each_prompt_alone(data, tokenizer, model, monkeypatch):
    monkeypatch.setattr(e2e, "NEW_TOKENS", 6)
    task = TASKS["e2e"](data, tokenizer)
    prompts = [[*range(10, 12 + 3 * i)] for i in range(4)]
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        while len(ids) < len(prompt) + 6 and ids[-1] != tokenizer.eos_token_id:
            with torch.no_grad():
                ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        expected.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip())
    assert task.generate(model, prompts) == expected


def test_answers_are_read_for_their_last_number_and_their_end(data, tokenizer, model, monkeypatch):
    task = TASKS["answers"](data, tokenizer, limit=2)
    right = [example.ids[example.scored_from :] for example in task.test_examples]
    assert len(right) == 4 and not task.training_examples()
    wrong = [*tokenizer("It is 123456789", add_special_tokens=False)["input_ids"], *[7, 8, 9] * 20]
    monkeypatch.setattr(answers, "continuations", lambda model, prompts, *_, **__: [right[0], wrong, *right[2:]])
    result = task.evaluate(model)
    assert result["scores"] == [1.0, 0.0] and result["value"] == 0.5
    assert result["ended"] == 0.75 and result["running"] == 0.25
    assert result["tokens"] == sum(map(len, (right[0], wrong, *right[2:]))) / 4


@pytest.mark.parametrize(
    ("answer", "running"), [([1, 2, 3, 2, 3, 2, 3], True), ([5, 5, 5, 0], False), ([1, 2, 1, 2], False)]
)
def test_answers_that_repeat_themselves_until_they_are_cut_are_running(answer, running):
    assert answers.is_running(answer, end=0) == running


def test_training_pairs_of_e2e_end(data, tokenizer):
    example = TASKS["e2e"](data, tokenizer).training_examples()[0]
    assert tokenizer.decode(example.ids) == (
        f"{tokenizer.bos_token}Data: name[N0], area[riverside]\nText: N0 is by the river.{tokenizer.eos_token}"
    )
    assert Example(example.ids, example.scored_from, len("N0 is by the river.")) == example
