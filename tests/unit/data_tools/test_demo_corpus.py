"""The demo corpus says nothing wrong, is the same everywhere, and gives the shipped tokenizer back."""

import json
import re
import subprocess
import sys

import pytest

from aquila.tokenizer import load_tokenizer
from data_tools import demo_corpus
from data_tools.demo_corpus import ALL_FACTS, document, draw_prompts, is_correct
from data_tools.make_demo_corpus import write_corpus

SHIPPED = "checkpoints_in/aquila-tiny"


def test_corpus_and_tokenizer_training_give_the_shipped_files(root, tmp_path):
    corpus, folder = tmp_path / "demo.jsonl", tmp_path / "tokenizer"
    for command in (
        ["data_tools.make_demo_corpus", "--output", corpus],
        ["data_tools.train_tokenizer", "--input", corpus, "--output-dir", folder],
    ):
        subprocess.run([sys.executable, "-m", *map(str, command)], cwd=root, check=True)
    assert 2e6 < corpus.stat().st_size < 5e6
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
        assert (folder / name).read_bytes() == (root / SHIPPED / name).read_bytes(), name


def test_shipped_config_fits_the_tokenizer(root):
    config = json.loads((root / SHIPPED / "config.json").read_text())
    assert config["vocab_size"] == load_tokenizer(root / SHIPPED).vocab_size


def test_documents_do_not_depend_on_how_many_there_are(tmp_path):
    write_corpus(tmp_path / "a", 20, 1)
    write_corpus(tmp_path / "b", 30, 1)
    assert (tmp_path / "b").read_bytes().startswith((tmp_path / "a").read_bytes())


def test_every_statement_is_true():
    """Sums, weekdays and number words, read back from the text without the grammar's tables."""
    days = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
    text = "\n".join(document(2023, i) for i in range(400))
    sums = re.findall(r"(\d+) \+ (\d+) = (\d+)\.", text)
    stories = re.findall(r"had (\d+) \w+\. \w+ had (\d+) \w+\. Together they had (\d+)", text)
    assert len(sums) > 100
    assert len(stories) > 10
    assert all(int(a) + int(b) == int(c) for a, b, c in sums + stories)
    after = re.findall(r"The day after (\w+) is (\w+)\.", text)
    assert after
    assert all((days.index(a) + 1) % 7 == days.index(b) for a, b in after)
    assert demo_corpus.number_word(37) == "thirty-seven"
    assert [demo_corpus.number_zh(n) for n in (4, 10, 12, 20, 35)] == ["四", "十", "十二", "二十", "三十五"]


def test_no_prompt_has_two_answers_or_begins_another():
    prompts = [prompt for prompt, _ in ALL_FACTS]
    assert len(set(prompts)) == len(prompts)
    assert not any(a != b and b.startswith(a) for a in prompts for b in prompts)


def test_prompts_have_the_ids_that_they_have_in_the_corpus(root):
    tokenizer = load_tokenizer(root / SHIPPED)
    for prompt, answer in ALL_FACTS:
        alone = tokenizer.encode(prompt)
        assert tokenizer.encode(prompt + answer + "\n")[: len(alone)] == alone


def test_drawn_prompts_are_different_and_repeatable():
    drawn = draw_prompts(50, 7)
    assert len(set(drawn)) == 50
    assert drawn == draw_prompts(50, 7) != draw_prompts(50, 8)
    assert set(drawn) <= set(ALL_FACTS)
    with pytest.raises(ValueError, match="facts"):
        draw_prompts(len(ALL_FACTS) + 1)


def test_an_answer_must_be_whole():
    assert is_correct(" 7.\n8 +", " 7.")
    assert not is_correct(" 70.", " 7.")
