"""The table of tasks is whole and consistent, and labels settle what a task leaves open."""

import dataclasses

import pytest

from leantune.errors import ConfigError
from leantune.train.files import FileTable
from leantune.train.metrics import METRICS
from leantune.train.tasks import TASKS, Task, get_task, parse_label, settle_columns, settle_labels

GLUE = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli")


def _table(labels: list, **columns) -> FileTable:
    return FileTable("train.tsv", {**columns, "label": labels}, range(2, len(labels) + 2))


def _message(call, *args) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*args)
    return str(caught.value)


def test_every_glue_task_is_there():
    assert set(TASKS) == {*GLUE, "text", "regression", "causal_lm"}
    for name in GLUE:
        hub = TASKS[name].hub
        assert hub is not None
        assert (hub.path, hub.config) == ("nyu-mll/glue", name)


@pytest.mark.parametrize("name", TASKS)
def test_task_is_consistent(name):
    task = get_task(name)
    assert task.name == name
    assert set(task.metrics) <= set(METRICS)
    if task.kind == "causal_lm":
        assert task.metrics == ()
    else:
        assert task.main_metric in task.metrics
    if task.hub is not None:
        assert (task.label_names is None) == (task.kind == "regression")
        assert (task.hub.columns[1] is None) == (task.columns[1] is None)


def test_single_sentences_and_pairs():
    singles = {name for name in GLUE if TASKS[name].columns[1] is None}
    assert singles == {"cola", "sst2"}
    assert TASKS["mnli"].validation_split == "validation_matched"
    assert [TASKS[n].main_metric for n in ("cola", "mrpc", "stsb")] == ["matthews", "f1", "pearson"]


def test_label_order_is_that_of_glue():
    assert TASKS["rte"].label_names == ("entailment", "not_entailment")
    assert TASKS["wnli"].label_names == ("not_entailment", "entailment")
    assert TASKS["mnli"].label_names == ("entailment", "neutral", "contradiction")


def test_unknown_task_lists_the_names():
    message = _message(get_task, "sst-2")
    assert "got 'sst-2'" in message
    assert all(name in message for name in TASKS)
    assert "'text'" in message


def test_task_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_task("cola").kind = "regression"  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["1", "0", "10", "2"], ("0", "1", "2", "10")),
        ([1, 0, True, 1.0], ("0", "1")),
        (["1.0", "-3"], ("-3", "1")),
        (["pos", "neg", "pos"], ("neg", "pos")),
    ],
)
def test_classes_are_the_sorted_labels(labels, names):
    task, ids = settle_labels(get_task("text"), _table(labels))
    assert (task.kind, task.label_names) == ("classification", names)
    assert sorted(ids.values()) == list(range(len(names)))
    for row, label in enumerate(labels):
        class_id = parse_label(task, _table(labels), row, label, ids)
        spelled = names[int(class_id)]
        assert spelled == label if label in ("pos", "neg") else float(spelled) == float(label)


@pytest.mark.parametrize("labels", [["0.5", "1", "2"], [0.25, 1], ["1e-3", ".5"]])
def test_fractions_make_a_regression(labels):
    task, ids = settle_labels(get_task("text"), _table(labels))
    assert (task.kind, task.label_names, ids) == ("regression", None, {})
    assert task.metrics == ("pearson", "spearman")
    assert parse_label(task, _table(labels), 0, labels[0], ids) == float(labels[0])


def test_whole_numbers_stay_scores_when_asked():
    task, ids = settle_labels(get_task("regression"), _table(["1", "5"]))
    score = parse_label(task, _table(["1", "5"]), 0, "1", ids)
    assert (task.kind, score, type(score)) == ("regression", 1.0, float)


@pytest.mark.parametrize(
    ("labels", "row", "got"),
    [
        (["1", ""], 1, "''"),
        ([None, 1], 0, "None"),
        (["a", " ", "b"], 1, "' '"),
        (["a", ["b"]], 1, r"['b']"),
        ([0.5, float("nan")], 1, "nan"),
        (["1", "inf"], 1, "'inf'"),
        (["1", "2", "N/A"], 2, "'N/A'"),
    ],
)
def test_bad_labels_of_open_tasks(labels, row, got):
    message = _message(settle_labels, get_task("text"), _table(labels))
    assert f"train.tsv line {row + 2}: 'label' must be" in message
    assert f"got {got};" in message
    assert "correct or remove the row" in message


def test_one_class_is_refused():
    message = _message(settle_labels, get_task("text"), _table(["1", "1"]))
    assert "train.tsv: column 'label' must hold at least two classes, got only 1" in message


def test_named_tasks_take_ids_and_names():
    task, ids = settle_labels(get_task("rte"), _table([]))
    table = _table(["not_entailment", "1", 0, "0"])
    assert [parse_label(task, table, i, v, ids) for i, v in enumerate(table.column("label"))] == [
        1,
        1,
        0,
        0,
    ]


@pytest.mark.parametrize("value", ["2", -1, "maybe", "", None, "0.5", float("nan")])
def test_label_outside_the_set(value):
    task, ids = settle_labels(get_task("rte"), _table([]))
    message = _message(parse_label, task, _table([value]), 0, value, ids)
    assert "train.tsv line 2: 'label' must be one of the 2 labels 'entailment', 'not_ent" in message
    assert "integer from 0 to 1" in message
    assert f"got {value!r};" in message


@pytest.mark.parametrize("value", ["nan", "x", "", None, float("inf"), "1,5"])
def test_score_that_is_no_number(value):
    task = get_task("stsb")
    message = _message(parse_label, task, _table([value]), 0, value, {})
    assert f"line 2: 'label' must be a finite number, got {value!r}" in message


def test_columns_of_files_or_of_the_hub():
    cola = get_task("cola")
    assert settle_columns(cola, _table([], sentence1=[])).columns == ("sentence1", None)
    assert settle_columns(cola, _table([], sentence=[])).columns == ("sentence", None)
    qnli = settle_columns(get_task("qnli"), _table([], question=[], sentence=[]))
    assert qnli.columns == ("question", "sentence")


def test_only_open_tasks_drop_the_second_text():
    single = _table([], sentence1=[])
    assert settle_columns(get_task("text"), single).columns == ("sentence1", None)
    assert settle_columns(get_task("rte"), single).columns == ("sentence1", "sentence2")
    own = Task("own", ("a", "b"), None, "classification", ("accuracy",), "accuracy")
    assert settle_columns(own, _table([], a=[])).columns == ("a", "b")
