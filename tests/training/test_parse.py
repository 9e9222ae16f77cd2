"""YAML and JSON give plain values, or an error of one line."""

import pytest

from leantune.training.parse import parse_json, parse_yaml

GROWING = "\n".join(
    ["a0: &a0 [x,x,x,x,x,x,x,x,x,x]"]
    + [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "expected the node content"),
        ("a: 1\na: 2\n", "key 'a' twice"),
        ("a:\n  b: 1\n  b: 2\n", "key 'b' twice"),
        ("[" * 2_000, "brackets that nest too deep"),
        (GROWING, "more than 10,000 values"),
        ("&a [*a]", "more than 10,000 values"),
        ("!!python/object/apply:os.system ['false']", "could not determine a constructor"),
    ],
)
def test_bad_yaml_is_named_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_yaml(text)
    assert "\n" not in str(caught.value)


def test_an_alias_and_a_merged_key_stay_yaml() -> None:
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, x: 2}\n") == {"a": {"x": 1}, "b": {"x": 2}}


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', "[" * 100_000, '{"a": '])
def test_bad_json_is_named(text: str) -> None:
    with pytest.raises(ValueError):
        parse_json(text)
    assert parse_json('{"a": [1, null]}') == {"a": [1, None]}
