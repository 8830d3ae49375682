"""Files of class names."""

import json
import re

import pytest

from captum_reflected.models import ModelLoadError, load_model, read_class_names


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "cat\ndog\n", ("cat", "dog")),
        ("a.txt", "\ufeff cat \r\ngreat white shark, white shark\r\n\r\n", None),
        ("a.csv", "cat\ncat", ("cat", "cat")),
        ("a.txt", "[cat\n{dog", ("[cat", "{dog")),
        ("a.txt", "1\n", ("1",)),
        ("a.json", '["cat", " dog"]', ("cat", "dog")),
        ("a.txt", '["cat", "dog"]', ("cat", "dog")),
        ("a.json", '{"1": "dog", "0": "cat"}', ("cat", "dog")),
        ("a.JSON", '{"0": ["n02123045", "tabby"], "1": ["n02123159", "tiger_cat"]}', None),
        ("a.json", '[["n02123045", "Katze"], "Stra\u00dfe"]', ("Katze", "Stra\u00dfe")),
        ("a.json", json.dumps({str(i): f"class {i}" for i in range(11)}), None),
    ],
    ids=range(11),
)
def test_forms(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    special = {
        "a.JSON": ("tabby", "tiger_cat"),
        "a.txt": ("cat", "great white shark, white shark"),
        "a.json": tuple(f"class {i}" for i in range(11)),
    }
    assert read_class_names(tmp_path / name) == (expected or special[name])
    assert read_class_names(str(tmp_path / name)) == read_class_names(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "it is empty; wanted: a text file with one name a line, or JSON: a list"),
        ("a.txt", b"  \n\n", "it is empty"),
        ("a.txt", b"cat\n\ndog\n", "it has the blank line 2, so the class has no name"),
        ("a.txt", b"\ncat", "it has the blank line 1"),
        ("a.txt", "caf\u00e9".encode("latin-1"), "it is not a text in UTF-8"),
        ("a.json", b"[", "it is not JSON (Expecting value"),
        ("a.json", b"cat\ndog", "it is not JSON"),
        ("a.json", b'"cat"', 'it holds "cat"'),
        ("a.json", b"[]", "it holds no names"),
        ("a.json", b"{}", "it holds no names"),
        ("a.json", b'["cat", 3]', "it holds 3 in place of the name of class 1"),
        ("a.json", b'["cat", " "]', 'it holds " " in place of the name of class 1'),
        ("a.json", b'[["a", "b", "c"]]', 'it holds ["a", "b", "c"] in place of the name of'),
        ("a.json", b'{"0": null}', "it holds null in place of the name of class 0"),
        ("a.json", b'{"cat": 0}', 'it has the key "cat", which is no class index'),
        ("a.json", b'{"-1": "cat"}', 'it has the key "-1", which is no class index'),
        ("a.json", b'{"0": "a", "0": "b"}', "it holds the class 0 more than once"),
        ("a.json", b'{"0": "a", "00": "b"}', "it holds the class 0 more than once"),
        ("a.json", b'{"1": "a"}', "it goes up to class 1 but has no name for class 0;"),
        (
            "a.json",
            b'{"9": "a"}',
            "it goes up to class 9 but has no name for class 0, 1, 2, 3, 4, ...;",
        ),
    ],
    ids=range(20),
)
def test_wrong_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelLoadError, match=re.escape(f"{tmp_path / name}: {message}")):
        read_class_names(tmp_path / name)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ModelLoadError, match=r"cannot read the class names .*none.txt: No such f"):
        read_class_names(tmp_path / "none.txt")
    with pytest.raises(ModelLoadError, match="Is a directory"):
        read_class_names(tmp_path)


def test_names_for_a_model():
    names = [f"shape {i}" for i in range(10)]
    loaded = load_model("demo", class_names=names)
    assert loaded.class_names == tuple(names)
    assert loaded.class_name(3) == "shape 3"
    with pytest.raises(ModelLoadError, match=r"has 9 name\(s\), but model 'demo' has 10 classes"):
        load_model("demo", class_names=names[1:])
    with pytest.raises(ModelLoadError, match="class names are 'abcdefghij'; wanted: a list"):
        load_model("demo", class_names="abcdefghij")
    with pytest.raises(ModelLoadError, match="class name '' is blank"):
        load_model("demo", class_names=["", *names[1:]])
