"""Text by name: what comes with the package, files, tables; a mistake says what would do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fp4compile import texts
from fp4compile.batches import bundled
from fp4compile.errors import CalibrationDataError, EvaluationError, MissingDependencyError
from fp4compile.tasks import run_tasks
from fp4compile.texts import BUNDLED, read_texts

ROWS = ({"text": "sixteen codes", "label": 1}, {"text": "four bits", "label": 0})


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    datasets = pytest.importorskip("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets"))
        )
        yield


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_texts(name: str) -> None:
    assert read_texts(name) == [bundled(BUNDLED[name])]


def test_a_text_file_is_one_text(tmp_path: Path) -> None:
    path = tmp_path / "notes.md"
    path.write_text("# one\n\ntwo\n")
    assert read_texts(str(path)) == ["# one\n\ntwo\n"]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_table_is_read_in_its_text_column(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        path.write_text("text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in ROWS))
    assert read_texts(str(path)) == [row["text"] for row in ROWS]


def test_a_table_without_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"content": "x"}) + "\n")
    with pytest.raises(CalibrationDataError, match="must be in 'text'"):
        read_texts(str(path))


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.txt"
    path.write_text(" \n")
    with pytest.raises(CalibrationDataError, match="holds no text"):
        read_texts(str(path))


def test_tables_need_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n")
    monkeypatch.setattr(texts, "find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError, match="fp4compile\\[eval\\]"):
        read_texts(str(path))


TASK = """\
task: tiny_facts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


@pytest.mark.slow  # lm-eval reads all its tasks first
def test_a_task_of_ones_own_is_scored(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the eval extra")
    from models import byte_tokenizer, tiny_llama

    rows = tmp_path / "rows.jsonl"
    question = {"question": "Two and two is", "choices": [" four", " a fish"], "answer": 0}
    rows.write_text(2 * (json.dumps(question) + "\n"))
    (tmp_path / "tiny_facts.yaml").write_text(TASK.format(rows=rows))
    model, tokenizer = tiny_llama(layers=1, vocabulary=257), byte_tokenizer()
    scores = run_tasks(model, tokenizer, ["tiny_facts"], task_dir=tmp_path)
    assert scores["tiny_facts"]["acc,none"] in (0.0, 1.0)  # both questions are the same
    with pytest.raises(EvaluationError, match="no task no_such_task"):
        run_tasks(model, tokenizer, ["no_such_task"])
