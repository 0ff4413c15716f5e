"""The page: whole, closed, escaped, and without anything from outside."""

import json
import re
from xml.etree import ElementTree

import pytest
from datasets import Dataset

from rlhf_recipes.tools.certificate import certify, write_certificate
from rlhf_recipes.tools.pages.certificate import page, sections
from rlhf_recipes.tools.pages.html import clean

HOSTILE = "</pre><script>alert('x')</script><img src=http://evil.example/x onerror=1> & \x00 \ud800 ]]> <!-- $x^2$"


def parse(html):
    assert html.startswith("<!DOCTYPE html>\n")
    return ElementTree.fromstring(html.removeprefix("<!DOCTYPE html>\n"))


def elements(root):
    return [element.tag.rpartition("}")[2] for element in root.iter()]


@pytest.fixture(scope="module")
def certificate(rule_scorer, pairs, train_pairs, samples):
    return certify(rule_scorer(), pairs, train=train_pairs, samples=samples, category_column="kind")


def test_the_page_is_well_formed_and_closed(certificate):
    html = page(certificate, "Title")
    root = parse(html)
    tags = elements(root)
    assert tags.count("svg") == 5
    assert {"script", "img", "link", "iframe", "object", "a", "image"}.isdisjoint(tags)
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:url\(#|href="#)([^)"]+)', html)
    assert used
    assert set(used) <= set(ids)
    names = re.sub(r'xmlns(:\w+)?="[^"]*"', "", html)
    assert "http:" not in names
    assert "https:" not in names
    assert "default-src 'none'" in html


def test_the_numbers_stand_on_it(certificate):
    text = " ".join(parse(page(certificate, "Title")).itertext())
    low, high = certificate["accuracy"]["interval"]
    assert f"{certificate['accuracy']['value']:.3f} [{low:.3f}, {high:.3f}]" in text
    for word in (
        "baseline: tfidf",
        "prompt_swap",
        "expected calibration error",
        "Worst errors",
        "fit for PPO",
        "rlhf-recipes verifier",
    ):
        assert word in text


def test_hostile_texts_are_shown_and_not_run(rule_scorer, pairs):
    rows = [{**row, "prompt": f"{row['prompt']} {HOSTILE}", "kind": HOSTILE} for row in pairs.select(range(40))]
    rows = [{**row, "chosen": row["rejected"], "rejected": f"{row['chosen']} {HOSTILE}"} for row in rows]
    scorer = rule_scorer(lambda prompt, completion: len(completion) + len(set(prompt)) / 10)
    measures = certify(scorer, encodable(rows), category_column="kind")
    for example in measures["examples"]:
        example["prompt"] += HOSTILE
    html = page(measures, HOSTILE)
    root = parse(html)
    assert {"script", "img"}.isdisjoint(elements(root))
    assert "alert('x')" in "".join(root.itertext())
    assert not root.findall(".//*[@onerror]")


def encodable(rows):
    """Arrow takes no lone surrogates; everything else stays."""
    return Dataset.from_list(
        [{k: v.replace("\ud800", "") if isinstance(v, str) else v for k, v in r.items()} for r in rows]
    )


def test_clean_leaves_harmless_text():
    assert clean("Grüße, 你好 🎉\n") == "Grüße, 你好 🎉\n"
    assert clean("\x00\x1b\ud800") == "\ufffd" * 3


def test_long_texts_are_cut(certificate):
    example = {"prompt": "p" * 999 + "END", "chosen": "START" + "c" * 999, "rejected": "r"}
    measures = {**certificate, "examples": [{**example, "chosen_score": 0.0, "rejected_score": 1.0}]}
    html = page(measures, "Title")
    assert "pEND" in html
    assert "STARTc" in html
    assert "p" * 401 not in html
    assert "c" * 401 not in html


def test_chats_are_shown_turn_by_turn(certificate):
    chat = [{"role": "user", "content": "Is <it> good?"}, {"role": "assistant", "content": "Yes."}]
    example = {
        "prompt": chat[:1],
        "chosen": chat[1:],
        "rejected": chat[1:],
        "chosen_score": 0.0,
        "rejected_score": 1.0,
    }
    assert "user: Is &lt;it&gt; good?" in page({**certificate, "examples": [example]}, "Title")


@pytest.mark.parametrize("score", [float("nan"), 0.5])
def test_a_broken_reward_model_has_a_page_too(score, rule_scorer, pairs, tmp_path):
    measures = certify(rule_scorer(lambda prompt, completion: score), pairs)
    write_certificate(measures, tmp_path, "Title")
    text = "".join(parse((tmp_path / "certificate.html").read_text()).itertext())
    assert "not fit" in text
    assert json.loads((tmp_path / "certificate.json").read_text())["verdict"]["verdict"] == "not fit"


def test_the_json_has_the_measures_and_no_single_scores(certificate, tmp_path):
    write_certificate(certificate, tmp_path / "new" / "folder", "Title")
    record = json.loads((tmp_path / "new" / "folder" / "certificate.json").read_text())
    assert record["accuracy"] == certificate["accuracy"]
    assert record["title"] == "Title"
    assert "values" not in json.dumps(record)
    assert (tmp_path / "new" / "folder" / "certificate.html").stat().st_size < 500_000


def test_the_same_measures_give_the_same_page(certificate):
    assert page(certificate, "Title") == page(certificate, "Title")


def test_the_json_gives_the_same_sections_without_the_plots_of_single_scores(certificate, tmp_path):
    write_certificate(certificate, tmp_path, "Title")
    from_json = "".join(sections(json.loads((tmp_path / "certificate.json").read_text())))
    whole = "".join(sections(certificate))
    assert (from_json.count("<svg"), whole.count("<svg")) == (3, 5)
    figures = re.compile("<figure>.*?</figure>", re.DOTALL)
    assert figures.sub("", from_json) == figures.sub("", whole)
