"""Completions are found, sorted and paged as a plain reading of the files says; long ones come in pieces."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dualign.common.errors import UserError
from dualign.eval.view import completions
from dualign.eval.view.completions import Completions
from dualign.eval.view.metrics import Metrics, points
from dualign.eval.view.query import parse
from serving import serving
from view_runs import LONG, record, write_batch, write_run

K = 4


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "a", steps=3, k=K)
    write_run(folder / "b", steps=3, k=K)
    texts = [LONG + " END", 'says "two words" here', "tab\tline\nnext", "ordinary"] * 2
    write_batch(folder / "a" / "batches" / "000002.parquet", 2, texts, K)
    return folder


@pytest.fixture(scope="module")
def served(root):
    with serving(root) as found:
        yield found


def rows(root, name="a"):
    """Every completion as it is stored, with its batch and place."""
    found = []
    for path in sorted((root / name / "batches").glob("*.parquet")):
        for at, row in enumerate(pq.read_table(path).to_pylist()):
            found.append(row | {"step": int(path.stem), "row": at})
    return found


def found(served, q, sort="order", **more):
    told = served.api("list", run="a", q=q, sort=sort, limit=200, **more)
    return {(item["step"], item["row"]) for item in told["items"]}, told


CASES = [
    ("apples", lambda r: "apples" in r["completion"].lower()),
    ("PEARS", lambda r: "pears" in r["completion"].lower()),
    ("apples 1.3", lambda r: "apples" in r["completion"] and "1.3" in r["completion"]),
    ('"two words"', lambda r: "two words" in r["completion"]),
    ("prompt:batch", lambda r: True),
    ('prompt:"of batch 1"', lambda r: r["step"] == 1),
    ("completion:question", lambda r: False),
    ('note:"words of 3"', lambda r: "words of 3" in (r["note"] or "")),
    ("id:p1", lambda r: r["prompt_id"] == "p1"),
    ("reward>0.5", lambda r: r["reward"] is not None and r["reward"] > 0.5),
    ("reward<=-0.5 apples", lambda r: r["reward"] is not None and r["reward"] <= -0.5 and "apples" in r["completion"]),
    ("weight>2", lambda r: (r["algo.weight"] or 0) > 2),
    ("tokens>=6", lambda r: len(r["completion_ids"]) >= 6),
    ("step=1", lambda r: r["step"] == 1),
    ("step>0 step<2", lambda r: r["step"] == 1),
    ("helpful>0.3", lambda r: (json.loads(r["parts"])["helpful"] or 0) > 0.3),
    ("is:clipped", lambda r: bool(r["algo.clipped"])),
    ("is:cut", lambda r: r["finish"] == "length"),
    ("is:absent", lambda r: r["reward"] is None),
    ("is:note", lambda r: r["note"] is not None),
    ("nobody says this", lambda r: False),
    ("", lambda r: True),
]


@pytest.mark.parametrize(("q", "holds"), CASES, ids=[q or "everything" for q, _ in CASES])
def test_a_search_finds_what_a_plain_reading_finds(served, root, q, holds):
    plain = {(r["step"], r["row"] // K * K) for r in rows(root) if holds(r)}
    assert found(served, q)[0] == plain


def test_conditions_that_cannot_be_meant_are_told(served):
    for q in ("is:wrong",):
        reply = served.get("/api/list", run="a", q=q)
        assert reply.status == 400 and "is:clipped" in reply.json["error"]
    with pytest.raises(UserError):
        parse("is:")
    assert served.get("/api/list", run="a", sort="rewrad").status == 400
    assert served.get("/api/list", run="a", offset="-1").status == 400


def test_sorts_put_the_right_prompt_first_and_what_has_no_number_last(served, root):
    groups = {}
    for row in rows(root):
        groups.setdefault((row["step"], row["row"] // K * K), []).append(row)
    reward = {g: [r["reward"] for r in rs if r["reward"] is not None] for g, rs in groups.items()}
    keys = {
        "best": lambda g: -max(reward[g]),
        "worst": lambda g: min(reward[g]),
        "spread": lambda g: min(reward[g]) - max(reward[g]),
        "weight": lambda g: -max(r["algo.weight"] or 0 for r in groups[g]),
        "tokens": lambda g: -max(len(r["completion_ids"]) for r in groups[g]),
    }
    for sort, key in keys.items():
        items = served.api("list", run="a", sort=sort)["items"]
        order = [key((i["step"], i["row"])) for i in items]
        assert order == pytest.approx(sorted(order)) and len(order) == 6, sort


def test_pages_are_the_whole_in_order(served):
    whole = served.api("list", run="a", sort="spread")["items"]
    pages = [served.api("list", run="a", sort="spread", offset=at, limit=2)["items"] for at in (0, 2, 4, 6)]
    assert [item for page in pages for item in page] == whole and pages[-1] == []
    told = served.api("list", run="a", limit=1)
    assert (told["total"], told["completions"]) == (6, 24)


def test_a_prompt_in_full_has_what_the_file_has(served, root):
    stored = [r for r in rows(root) if r["step"] == 1][K : 2 * K]
    told = served.api("prompt", run="a", step=1, row=K, count=K)
    assert told["messages"][0] == {"role": "user", "content": "Question 1 of batch 1?", "chars": 22}
    for answer, row in zip(told["sides"][0]["answers"], stored, strict=True):
        assert answer["text"] == row["completion"] and answer["row"] == row["row"]
        assert answer["reward"] == row["reward"] and answer.get("absent") == row["absent"]
        assert answer["parts"] == {k: v and pytest.approx(v, rel=1e-3) for k, v in json.loads(row["parts"]).items()}
        assert answer.get("weight") == (row["algo.weight"] and pytest.approx(row["algo.weight"], rel=1e-3))
        assert answer.get("push") == (row["algo.log_w_adv"] and pytest.approx(row["algo.log_w_adv"], rel=1e-3))
        assert answer.get("note") == row["note"] and answer["tokens"] == len(row["completion_ids"])
        assert bool(answer.get("clipped")) == bool(row["algo.clipped"])
    assert served.get("/api/prompt", run="a", step=1, row=99, count=1).status == 404
    assert served.get("/api/prompt", run="a", step=9, row=0, count=1).status == 404
    assert served.get("/api/text", run="a", kind="batches", step=1, row=99).status == 404
    assert served.get("/api/prompt", col="a@0", row=99).status == 404
    assert "from: 'zz'" in served.get("/api/curves", **{"run": "a", "from": "zz"}).json["error"]


def test_a_long_text_comes_in_pieces_that_are_the_whole(served):
    answer = served.api("prompt", run="a", step=2, row=0, count=K)["sides"][0]["answers"][0]
    assert answer["chars"] == len(LONG) + 4 and len(answer["text"]) == completions.LONGEST
    text = answer["text"]
    while len(text) < answer["chars"]:
        text += served.api("text", run="a", kind="batches", step=2, row=0, column="completion", start=len(text))["text"]
    assert text == LONG + " END"


def test_held_out_answers_stand_beside_each_other_by_their_prompt(served, root):
    table = pq.read_table(root / "b" / "evaluations" / "000003.parquet")
    turned = table.take(pa.array([3, 1, 0, 2])).set_column(1, "group", pa.array([0, 1, 2, 3], pa.int32()))
    pq.write_table(turned, root / "b" / "evaluations" / "000003.parquet")  # another order: prompts go by their ids
    columns = ["a@0", "a@3", "b@3"]
    told = served.api("list", col=columns, sort="gain")
    gains = [i["rewards"][-1][0] - i["rewards"][0][0] for i in told["items"]]
    assert gains == sorted(gains, reverse=True) and told["total"] == 4
    for item in told["items"]:
        full = served.api("prompt", col=columns, row=item["row"])
        assert full["id"] == item["id"]
        assert [s["answers"][0]["reward"] for s in full["sides"]] == [r[0] for r in item["rewards"]]
        place = item["id"].removeprefix("p")
        assert [s["answers"][0]["text"] for s in full["sides"]] == [
            f"held out {place} after {done} batches" for done in (0, 3, 3)
        ]
    assert served.api("list", col=columns, q='completion:"held out 2 after 3"')["total"] == 1
    for wrong in ("a", "a@x", "a@1", "none@0"):
        assert served.get("/api/list", col=wrong).status in (400, 404)


def test_only_the_columns_that_are_asked_for_are_read(root, monkeypatch):
    asked = []
    original = pq.ParquetFile.iter_batches

    def spy(self, *arguments, columns=None, **more):
        asked.append(set(columns))
        return original(self, *arguments, columns=columns, **more)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    path = root / "a" / "batches" / "000001.parquet"
    index = Completions()
    index.index(path, parse("reward>0"), "weight")
    assert asked == [{"group", "reward", "algo.weight"}]
    index.index(path, parse("reward>0"), "weight")
    assert len(asked) == 1, "what was read is remembered"


def test_remembered_indices_are_bounded(root, monkeypatch):
    monkeypatch.setattr(completions, "HELD", 60)
    index = Completions()
    path = root / "a" / "batches" / "000001.parquet"
    for i in range(20):
        index.index(path, parse(f"reward>{i}"), "order")
    assert len(index._indices) <= 4 and index._held <= 60


# --- metrics ---


def test_metrics_are_read_as_they_grow_and_anew_when_written_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    metrics.update()
    assert metrics.rows == 0
    path.write_text(json.dumps(record(0)) + "\n" + json.dumps(record(1))[:10])
    metrics.update()
    assert metrics.rows == 1
    with open(path, "a") as file:
        file.write(json.dumps(record(1))[10:] + "\n" + json.dumps(record(2) | {"late": 7, "nan": float("nan")}) + "\n")
    metrics.update()
    assert list(metrics.columns["step"]) == [0, 1, 2] and list(metrics.columns["seconds/update"]) == [2, 2, 2]
    assert (
        np.isnan(metrics.columns["late"][:2]).all() and metrics.columns["late"][2] == 7 and "nan" not in metrics.columns
    )
    aside = tmp_path / "aside"  # a resume replays from batch 1: the file is replaced
    aside.write_text(json.dumps(record(0)) + "\n")
    aside.replace(path)
    metrics.update()
    assert list(metrics.columns["step"]) == [0] and "late" not in metrics.columns


def test_a_thinned_curve_keeps_its_extremes_and_its_ends():
    rng = np.random.default_rng(0)
    y = rng.normal(size=10_000)
    y[5000], y[7000] = 50, -60
    x, thin = points(list(range(10_000)), list(y), 0, 1e9, 500)
    assert len(x) <= 510 and max(thin) == 50 and min(thin) == -60 and (x[0], x[-1]) == (0, 9999)
    assert x == sorted(x)
    assert points([0, 1, 2], [1, float("nan"), 3], 1, 9, 500) == ([2], [3])
