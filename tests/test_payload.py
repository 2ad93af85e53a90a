"""What becomes JSON, what is refused, and whether the refusal names the part and a remedy."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import math
import numbers
import os
import pathlib
import re
import subprocess
import sys
import uuid
from typing import Any, ClassVar, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest

from nqnb import payload
from nqnb.errors import BadInput, UnencodableValue
from nqnb.json_types import undecodable

NAN = float("nan")


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Point:
    x: float
    y: float = 0.0


@dataclasses.dataclass
class Photo:
    path: pathlib.Path
    taken: pd.Timestamp
    sizes: list[np.int64]


class Label(str):
    """A type that msgspec encodes only with the help of nqnb."""


class Moment(datetime.datetime):
    """Another such type."""


class Span(datetime.timedelta):
    """Another such type."""


class Box(msgspec.Struct):
    corner: Point
    tags: list[Any]


class Unconvertible:
    """A type that nqnb cannot encode either."""


class Unreadable(Protocol):
    """A protocol that cannot be checked at runtime."""


@dataclasses.dataclass
class Tree:
    """A dataclass with fields of its own type."""

    value: int
    parts: list[Tree]


@dataclasses.dataclass
class Sweep:
    """A dataclass with annotations that are not encoded, and a field that may have no value."""

    rows: Any = None
    limit: ClassVar[float] = math.inf
    seed: dataclasses.InitVar[int] = dataclasses.field(kw_only=True)
    count: float = dataclasses.field(init=False)


class TestBytes:
    @pytest.mark.parametrize("value", [b"", b"\x00\xff", bytearray(b"\x00\xff"), memoryview(b"\x00\xff")])
    def test_bytes_are_sent_unchanged(self, value: bytes) -> None:
        data = payload.encode(value)
        assert type(data) is bytes
        assert data == bytes(value)

    def test_a_result_of_bytes_is_base64(self) -> None:
        assert payload.encode_json(b"\x00\xff") == b'"AP8="'


class TestJson:
    @pytest.mark.parametrize(
        ("value", "data"),
        [
            (None, b"null"),
            (True, b"true"),
            (0, b"0"),
            (2**53 + 1, b"9007199254740993"),
            (-1.5, b"-1.5"),
            ("två", '"två"'.encode()),
            ([1, [2], (3,)], b"[1,[2],[3]]"),
            ({"a": {"b": None}}, b'{"a":{"b":null}}'),
            ({1: "one"}, b'{"1":"one"}'),
            (datetime.date(2026, 11, 24), b'"2026-11-24"'),
            (datetime.datetime(2026, 11, 24, 3, 0, tzinfo=datetime.timezone.utc), b'"2026-11-24T03:00:00Z"'),
            (uuid.UUID(int=1), b'"00000000-0000-0000-0000-000000000001"'),
            (decimal.Decimal("0.10"), b'"0.10"'),
            (pathlib.PurePosixPath("/a/b"), b'"/a/b"'),
            (Colour.RED, b'"red"'),
            (Point(1.0, 2.0), b'{"x":1.0,"y":2.0}'),
            (Sweep(None, seed=2), b'{"rows":null}'),
            ([Sweep("null", seed=2)], b'[{"rows":"null"}]'),
            (Box(Point(1.0), ["a", Colour.RED]), b'{"corner":{"x":1.0,"y":0.0},"tags":["a","red"]}'),
            (frozenset([7]), b"[7]"),
            (collections.OrderedDict(b=1, a=2), b'{"b":1,"a":2}'),
        ],
    )
    def test_plain_values(self, value: object, data: bytes) -> None:
        assert payload.encode(value) == data

    @pytest.mark.parametrize(
        ("value", "plain"),
        [
            (np.int64(7), 7),
            (np.uint8(255), 255),
            (np.float64(1.5), 1.5),
            (np.float32(0.5), 0.5),
            (np.bool_(True), True),
            (np.str_("a"), "a"),
            (np.array([1, 2]), [1, 2]),
            (np.array([[1.5], [2.5]]), [[1.5], [2.5]]),
            (np.array(5), 5),
            (np.array(["a", "b"]), ["a", "b"]),
            (np.array([{"a": np.int8(1)}, None], dtype=object), [{"a": 1}, None]),
            ({"a": [np.int32(1), {"b": np.array([], dtype=float)}]}, {"a": [1, {"b": []}]}),
            (np.datetime64("2026-11-24T03:00:00"), "2026-11-24T03:00:00"),
            (pd.Timestamp("2026-11-24 03:00", tz="UTC"), "2026-11-24T03:00:00+00:00"),
            (pd.Timestamp("2026-11-24 03:00"), "2026-11-24T03:00:00"),
            (pd.Timedelta(seconds=90), "PT90S"),
            (datetime.timedelta(seconds=90), "PT90S"),
        ],
    )
    def test_numpy_and_pandas_values(self, value: object, plain: object) -> None:
        assert payload.decode_json(payload.encode(value)) == plain

    def test_a_moment_is_text_at_every_precision_of_numpy(self) -> None:
        # With nanoseconds, which pandas prefers, numpy itself would give a plain number.
        moments = np.array(["2026-11-24T03:00:00"], dtype="datetime64[ns]")
        assert str(payload.decode_json(payload.encode(moments))[0]).startswith("2026-11-24T03:00:00")
        assert str(payload.decode_json(payload.encode(moments[0]))).startswith("2026-11-24T03:00:00")

    def test_records_of_a_frame(self) -> None:
        frame = pd.DataFrame({"path": ["a", "b"], "size": [1, 2]})
        assert payload.decode_json(payload.encode(frame.to_dict("records"))) == [
            {"path": "a", "size": 1},
            {"path": "b", "size": 2},
        ]

    def test_none_becomes_null(self) -> None:
        assert payload.decode_json(payload.encode({"a": None, "b": "null"})) == {"a": None, "b": "null"}


class TestNoSuchNumber:
    @pytest.mark.parametrize(
        ("value", "part"),
        [
            (NAN, "payload"),
            (math.inf, "payload"),
            ([1, -math.inf], "payload[1]"),
            ({"rows": [1, {"x": NAN}]}, "payload['rows'][1]['x']"),
            ({1: NAN}, "payload[1]"),
            ((0, NAN), "payload[1]"),
            ({NAN}, "payload[0]"),
            (Point(1.0, NAN), "payload.y"),
            (Box(Point(NAN), []), "payload.corner.x"),
            ([None, "null", NAN], "payload[2]"),
            (np.float64("nan"), "payload"),
            (np.float32("inf"), "payload"),
            (np.array([1.0, NAN]), "payload[1]"),
            ({"a": np.array([[1.0], [NAN]])}, "payload['a'][1][0]"),
            (pd.NaT, "payload"),
            (pd.NA, "payload"),
            ([pd.Timestamp("2026-11-24"), pd.NaT], "payload[1]"),
            ({"a": pd.NA}, "payload['a']"),
            ([np.datetime64("NaT")], "payload[0]"),
            (np.array(["2026-11-24", "NaT"], dtype="datetime64[s]"), "payload[1]"),
            (np.timedelta64("NaT"), "payload"),
        ],
    )
    def test_an_invalid_number_is_refused_with_the_name_of_its_part(self, value: object, part: str) -> None:
        with pytest.raises(UnencodableValue) as caught:
            payload.encode(value)
        assert caught.value.part == part
        assert str(caught.value).startswith(f"{part} cannot be encoded as JSON: it is ")
        assert str(caught.value).endswith("Send None or a string instead.")

    def test_a_deeply_nested_nan_is_refused(self) -> None:
        value: Any = NAN
        for _ in range(150):
            value = [value]
        with pytest.raises(UnencodableValue):
            payload.encode(value)

    def test_a_nan_key_is_refused(self) -> None:
        with pytest.raises(UnencodableValue):
            payload.encode({NAN: 1})

    def test_a_nan_in_a_field_that_was_set_later_is_refused(self) -> None:
        value = Sweep(seed=2)
        value.count = NAN
        with pytest.raises(UnencodableValue, match=r"payload\.count cannot be encoded as JSON: it is nan"):
            payload.encode(value)

    def test_a_nan_in_an_attrs_object_is_refused(self) -> None:
        attrs = pytest.importorskip("attrs")
        made = attrs.make_class("Made", ["x", "y"])
        assert payload.encode(made(1.5, None)) == b'{"x":1.5,"y":null}'
        with pytest.raises(UnencodableValue, match=r"payload\.y cannot be encoded as JSON: it is nan"):
            payload.encode(made(1.5, NAN))

    @pytest.mark.parametrize("slots", [True, False])
    def test_only_the_public_attributes_of_an_attrs_object_are_searched_for_nan(self, slots: bool) -> None:
        attrs = pytest.importorskip("attrs")

        class Base:
            __slots__ = ("_hidden", "more")

        made = attrs.make_class("Made", ["x", "_cache"], bases=(Base,), slots=slots)(None, NAN)
        made._hidden = NAN
        assert payload.encode(made) == b'{"x":null}'
        made.more = NAN
        with pytest.raises(UnencodableValue, match=r"payload\.more cannot be encoded as JSON: it is nan"):
            payload.encode(made)
        del made.more
        if not slots:
            made.added = NAN
            with pytest.raises(UnencodableValue, match=r"payload\.added cannot be encoded as JSON: it is nan"):
                payload.encode(made)

    def test_a_nan_in_a_result_is_refused_with_its_name(self) -> None:
        with pytest.raises(UnencodableValue, match=r"^result\['x'\] cannot be encoded as JSON: it is nan"):
            payload.encode_json({"x": NAN}, "result")

    def test_a_nan_as_text_or_decimal_becomes_text(self) -> None:
        assert payload.encode(["NaN", decimal.Decimal("NaN")]) == b'["NaN","NaN"]'


class TestRefused:
    @pytest.mark.parametrize(
        ("value", "part", "kind"),
        [
            (object(), "payload", "object"),
            ([1, object()], "payload[1]", "object"),
            ({"a": {"b": [1j]}}, "payload['a']['b'][0]", "complex"),
            ({"f": print}, "payload['f']", "builtin_function_or_method"),
            (Box(Point(1.0), [object()]), "payload.tags[0]", "object"),
            ([np.array([1j])], "payload[0][0]", "numpy.complex128"),
            (iter([1]), "payload", "list_iterator"),
            (ValueError("x"), "payload", "ValueError"),
            ({"a": re.compile("x")}, "payload['a']", "re.Pattern"),
        ],
    )
    def test_the_part_and_its_type_are_named(self, value: object, part: str, kind: str) -> None:
        with pytest.raises(UnencodableValue) as caught:
            payload.encode(value)
        assert caught.value.part == part
        assert f"{part} cannot be encoded as JSON: it is of type {kind}. " in str(caught.value)
        assert "Convert the value to strings, numbers, lists or dicts" in str(caught.value)

    @pytest.mark.parametrize("key", [("a", 1), None, frozenset()])
    def test_a_key_that_json_cannot_have(self, key: object) -> None:
        with pytest.raises(UnencodableValue, match="a key must be a string or a number") as caught:
            payload.encode({"rows": {key: 1}})
        assert caught.value.part == f"the key {key!r} of payload['rows']"

    @pytest.mark.parametrize("value", [{"x" * 9000: object()}, {"x" * 9000: float("nan")}, {("x" * 9000,): 1}])
    def test_a_long_key_is_cut(self, value: object) -> None:
        with pytest.raises(UnencodableValue, match="x") as caught:
            payload.encode(value)
        assert len(str(caught.value)) < 600

    def test_half_of_a_surrogate_pair_is_refused(self) -> None:
        with pytest.raises(UnencodableValue, match=r"Remove or replace the lone surrogate\.") as caught:
            payload.encode({"name": ["ok", "caf\udce9"]})
        assert caught.value.part == "payload['name'][1]"

    def test_a_frame_gets_its_remedy(self) -> None:
        with pytest.raises(UnencodableValue, match=r'Send the result of \.to_dict\("records"\), or the path') as caught:
            payload.encode({"df": pd.DataFrame({"a": [1]})})
        assert caught.value.part == "payload['df']"
        assert "DataFrame" in str(caught.value)

    def test_a_series_gets_its_remedy(self) -> None:
        with pytest.raises(UnencodableValue, match=r"Send the result of \.to_list\(\)"):
            payload.encode(pd.Series([1, 2]))

    @pytest.mark.parametrize(
        "make",
        [
            "a = []; a.append(a)",
            "a = {}; a['self'] = a",
            "a = []; b = [a]; a.append({'b': b})",
            "a = []; a.extend([a, a])",
            "a = {}; a.update(x=a, y=[a], z=(a, a))",
        ],
    )
    def test_a_value_that_contains_itself_is_refused(self, make: str) -> None:
        # In a process of its own, for a walk that never ends cannot be stopped from outside.
        program = f"""if True:
            from nqnb import payload
            {make}
            try:
                payload.encode(a)
            except payload.UnencodableValue as error:
                print(error)
        """
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert re.match(r"payload\S* cannot be encoded as JSON: it contains itself", done.stdout)
        assert "\n" not in done.stdout.strip()

    def test_an_error_raised_by_the_value_is_reported(self) -> None:
        class Broken:
            def __fspath__(self) -> str:
                raise RuntimeError("no path today")

        with pytest.raises(UnencodableValue, match="payload"):
            payload.encode([Broken()])


class TestDecode:
    def test_no_bytes_are_none(self) -> None:
        assert payload.decode_json(b"") is None
        assert payload.decode_json(None) is None

    def test_a_decoded_value_is_validated(self) -> None:
        assert payload.decode_json(b'{"corner":{"x":1},"tags":[]}', Box) == Box(Point(1.0), [])
        with pytest.raises(BadInput, match=r"Expected `float`, got `str` - at `\$\.corner\.x`"):
            payload.decode_json(b'{"corner":{"x":"one"},"tags":[]}', Box)

    @pytest.mark.parametrize("data", [b"{", b"nope", b"\xff", b'"\xff"', b"1 2"])
    def test_invalid_json_is_refused(self, data: bytes) -> None:
        with pytest.raises(BadInput):
            payload.decode_json(data)

    def test_json_that_is_nested_too_deep_is_refused(self) -> None:
        with pytest.raises(BadInput):
            payload.decode_json(b"[" * 100_000)

    @pytest.mark.parametrize(
        ("kind", "value"),
        [
            (pathlib.Path, pathlib.Path("a.png")),
            (pathlib.PurePosixPath, pathlib.PurePosixPath("/a")),
            (os.PathLike, pathlib.Path("a.png")),
            (list[pathlib.Path], [pathlib.Path("a.png")]),
            (np.bool_, np.bool_(True)),
            (np.int8, np.int8(-3)),
            (np.float32, np.float32(0.1)),
            (np.str_, np.str_("a")),
            (np.datetime64, np.datetime64("2026-11-24T03:00:00")),
            (np.timedelta64, np.timedelta64(90, "s")),
            (pd.Timestamp, pd.Timestamp("2026-11-24T03:00:00.123456789")),
            (pd.Timestamp, pd.Timestamp("2026-11-24 03:00", tz="UTC")),
            (pd.Timedelta, pd.Timedelta(seconds=90)),
            (Label, Label("a")),
            (Moment, Moment(2026, 11, 24, tzinfo=datetime.timezone.utc)),
            (Span, Span(days=-1)),
            (Photo, Photo(pathlib.Path("a.png"), pd.Timestamp("2026-11-24"), [np.int64(5)])),
            (Photo | None, None),
            (numbers.Number, 1.5),
        ],
    )
    def test_a_value_is_decoded_as_the_annotated_type_that_was_encoded(self, kind: Any, value: Any) -> None:
        decoded = payload.decode_json(payload.encode(value), kind)
        assert (type(decoded), decoded) == (type(value), value)
        assert undecodable(kind) is None

    @pytest.mark.parametrize(
        ("kind", "value"),
        [
            (np.ndarray, np.array([[1, 2], [3, 4]])),
            (npt.NDArray[Any], np.array([1.5])),
            (npt.NDArray[np.float32], np.array([0.1], dtype="float32")),
            (npt.NDArray[np.datetime64], np.array(["2026-11-24"], dtype="datetime64[s]")),
        ],
    )
    def test_an_array_is_decoded_as_an_array(self, kind: Any, value: Any) -> None:
        decoded = payload.decode_json(payload.encode(value), kind)
        assert decoded.dtype == value.dtype
        assert np.array_equal(decoded, value)
        assert undecodable(kind) is None

    @pytest.mark.parametrize(
        ("kind", "data", "error"),
        [
            (list[pathlib.Path], b"[5]", r"Expected `str`, got `int` - at `\$\[0\]`"),
            (np.int8, b"1.5", "Expected `int`, got `float`"),
            (np.int8, b"300", "int8 cannot be created from 300: OverflowError"),
            (np.ndarray, b"[[1], [1, 2]]", "ndarray cannot be created from"),
            (np.datetime64, b'"2026-11-24T03:00:00Z"', "Expected `datetime` with no timezone component"),
            (pd.Timestamp, b'"today"', "Invalid RFC3339 encoded datetime"),
            (Unconvertible, b"{}", "Expected `Unconvertible`, got `dict`"),
        ],
    )
    def test_a_value_that_does_not_match_such_a_type_is_refused(self, kind: Any, data: bytes, error: str) -> None:
        with pytest.raises(BadInput, match=error):
            payload.decode_json(data, kind)

    @pytest.mark.parametrize(
        "kind",
        [
            Unconvertible,
            list[Unconvertible],
            dict[str, tuple[int, Unconvertible]],
            dataclasses.make_dataclass("Within", [("part", Unconvertible)]),
            Unreadable,
            complex,
        ],
    )
    def test_a_type_that_no_json_matches_is_detected(self, kind: Any) -> None:
        assert undecodable(kind) in (Unconvertible, Unreadable, complex)

    @pytest.mark.parametrize(
        "kind",
        [
            dataclasses.make_dataclass("Within", [("part", Unconvertible, None)]),
            Unconvertible | None,
            Tree,
            int,
            Any,
            object,
        ],
    )
    def test_a_type_that_some_json_matches_is_accepted(self, kind: Any) -> None:
        assert undecodable(kind) is None

    @pytest.mark.parametrize("value", [{"a": [1, 2.5, "x", None, True]}, [], "", 0])
    def test_decoding_is_the_inverse_of_encoding(self, value: object) -> None:
        assert payload.decode_json(payload.encode(value)) == value
