"""Where the server is: arguments, the environment, a NATS CLI context, this machine; and no secret ever shown."""

from __future__ import annotations

import base64
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from nqnb import Settings
from nqnb.errors import BadInput
from nqnb.settings import DEFAULT_URL

SEED = "SUACSSL3UAHUDXKFSNVUZRF5UHPMWZ6BFDTJ7M6USDXIEDNPPQYYYCU3VY"


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The NATS CLI's folder, which does not exist yet."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / "nats"


def write_context(home: Path, name: str, content: Any, *, select: bool = False) -> Path:
    path = home / "context" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    if select:
        (home / "context.txt").write_text(f"{name}\n")
    return path


@pytest.fixture
def file(tmp_path: Path) -> str:
    """The path of a file; `Settings` only looks whether it can be read."""
    path = tmp_path / "some.file"
    path.write_text("x")
    return str(path)


def shown(settings: Settings) -> str:
    return f"{settings!r} {settings} {settings.url} {settings.urls}"


def test_default_is_this_machine() -> None:
    assert Settings().url == DEFAULT_URL == "nats://127.0.0.1:4222"


class TestEnvironment:
    def test_every_variable_is_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NATS_URL", "nats://env:1")
        monkeypatch.setenv("NATS_USER", "ann")
        monkeypatch.setenv("NATS_PASSWORD", "s3cret")
        monkeypatch.setenv("NATS_TOKEN", "t0ken")
        settings = Settings()
        assert settings.url == "nats://env:1"
        assert (settings.user, settings.password, settings.token) == ("ann", "s3cret", "t0ken")

    def test_arguments_win(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NATS_URL", "nats://env:1")
        monkeypatch.setenv("NATS_USER", "ann")
        monkeypatch.setenv("NATS_PASSWORD", "other")
        settings = Settings("nats://given:2", user="bob", password="s3cret")
        assert settings.url == "nats://given:2"
        assert (settings.user, settings.password) == ("bob", "s3cret")

    def test_a_login_in_the_address_wins(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NATS_USER", "ann")
        monkeypatch.setenv("NATS_PASSWORD", "other")
        settings = Settings("nats://bob:s3cret@h:1")
        assert (settings.user, settings.password) == ("bob", "s3cret")

    def test_an_empty_variable_counts_as_not_set(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("URL", "USER", "PASSWORD", "TOKEN"):
            monkeypatch.setenv(f"NATS_{name}", "")
        settings = Settings()
        assert settings.url == DEFAULT_URL
        assert (settings.user, settings.password, settings.token) == (None, None, None)

    def test_secrets_in_an_address_of_the_environment_are_removed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NATS_URL", "nats://ann:s3cret@env:1")
        assert "s3cret" not in shown(Settings())
        assert Settings().password == "s3cret"

    def test_settings_for_a_server_of_nqnb_ignore_it(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_context(home, "prod", {"url": "nats://c:1", "token": "t0ken"})
        local = Settings.local("nats://h:1")
        for name, value in {"NATS_CREDS": "/no/such", "NATS_CA": __file__, "NATS_URL": "nats://env:1"}.items():
            monkeypatch.setenv(name, value)
        for settings in (local, Settings.of(local, name="guard"), Settings.of(local, url="h2:1")):
            assert (settings.tls_ca, settings.creds) == (None, None)
        monkeypatch.delenv("NATS_CREDS")
        assert Settings.of(local, context="prod").tls_ca == __file__


class TestAddresses:
    @pytest.mark.parametrize(
        ("given", "url"),
        [
            ("10.0.0.5", "nats://10.0.0.5:4222"),
            ("host:4333", "nats://host:4333"),
            ("  nats://host:1 ", "nats://host:1"),
            ("nats://host/", "nats://host:4222"),
            ("tls://host:4443", "tls://host:4443"),
            ("ws://host:80/nats", "ws://host:80/nats"),
            ("wss://host", "wss://host:443"),
            ("ws://host/nats", "ws://host:80/nats"),
            ("nats://[::1]:5", "nats://[::1]:5"),
            ("NATS://host:1", "nats://host:1"),
        ],
    )
    def test_a_valid_address_is_normalized(self, given: str, url: str) -> None:
        settings = Settings(given)
        assert settings.url == url
        assert settings.urls == (url,)

    @pytest.mark.parametrize("given", ["nats://a:1,nats://b:2", "a:1, b:2", ["a:1", "b:2"], ("nats://a:1", "b:2")])
    def test_several_of_one_cluster(self, given: str | list[str]) -> None:
        assert Settings(given).urls == ("nats://a:1", "nats://b:2")

    @pytest.mark.parametrize(
        "given",
        [
            *("http://host", "nats://", "nats://:4222", "nats://host:port", "nats://host:99999", "nats://[::1"),
            *("host:-1", "a,,b", ",", ["a", ""]),
        ],
    )
    def test_an_invalid_address_is_refused(self, given: str | list[str]) -> None:
        with pytest.raises(BadInput, match=r"is invalid: .*\. Use an address like nats://127"):
            Settings(given)

    @pytest.mark.parametrize("given", [[], ()])
    def test_an_empty_list_of_addresses_is_refused(self, given: Any) -> None:
        with pytest.raises(BadInput, match="url is invalid: the list of addresses is empty"):
            Settings(given)

    @pytest.mark.parametrize("given", [5, 5.0, object(), [None], True])
    def test_an_address_of_another_type_is_refused(self, given: object) -> None:
        with pytest.raises(BadInput):
            Settings(given)  # type: ignore[arg-type]


def test_whether_an_address_was_named_outlives_copies(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unnamed = Settings(token="x")
    assert not unnamed.named
    assert not Settings.of(unnamed, replicas=3).named
    assert not Settings.of(Settings.of(unnamed, name="me"), url=None).named
    assert Settings.of(unnamed, url=unnamed.url).named
    assert Settings.of(Settings(unnamed.url), replicas=3).named
    monkeypatch.setenv("NATS_URL", str(unnamed.url))
    assert Settings().named
    assert Settings.of(unnamed, url=None).named
    monkeypatch.delenv("NATS_URL")
    write_context(home, "prod", {"url": unnamed.url})
    assert Settings(context="prod").named
    assert Settings.of(unnamed, context="prod").named
    assert "named" not in repr(unnamed)
    assert not pickle.loads(pickle.dumps(unnamed)).named  # noqa: S301  # bytes of this very line


class TestSecrets:
    @pytest.mark.parametrize(
        "given",
        [
            "nats://ann:s3cret@host:1",
            "ann:s3cret@host:1",
            "nats://s3cret@host:1",
            "nats://ann:s3cret@a:1,nats://ann:s3cret@b:1",
            "nats://s3cret@a:1,nats://s3cret@b:1",
            ["nats://ann:s3cret@a:1", "b:1"],
        ],
    )
    def test_in_an_address_are_never_shown(self, given: str | list[str]) -> None:
        settings = Settings(given)
        assert "s3cret" not in shown(settings)
        assert "s3cret" in (settings.password, settings.token)

    @pytest.mark.parametrize("name", ["password", "token"])
    def test_given_apart_are_never_shown(self, name: str) -> None:
        given: dict[str, Any] = {name: "s3cret"}
        settings = Settings("h", **given)
        assert "s3cret" not in shown(settings)
        assert getattr(settings, name) == "s3cret"

    def test_of_a_token_beside_another_are_never_shown(self) -> None:
        assert "s3cret" not in shown(Settings("nats://s3cret@h:1", token="other"))

    @pytest.mark.parametrize(
        "given",
        [
            "http://ann:s3cret@host",
            "nats://ann:s3cret@host:port",
            "nats://ann:s3cret@",
            "nats://ann:s3@s3cret@:1",
            # A slash that is not written as %2F ends the host, and urllib does not treat the rest as a secret.
            "nats://ann:12/s3cret@host:1",
            "nats://ann:12#s3cret@host:1",
            "nats://ann:12?s3cret@host:1",
            "nats://ann:s3cret",
            "ann:s3cret",
            "nats://ann:s3cret,s3cret@host:1",
            "nats://ann:12,s3cret@host:1",
            "ann:12,s3cret@host:1",
            "s3cret,s3cret@host:1",
            "nats://bob@a:1,nats://ann:s3cret,12@host:1",
            "nats://ann:12,s3cret,34@host:1",
            "nats://ann:s3cret,@host:1",
            "nats://ann:12,s3cret://x@host:1",
            # An @ that is not written as %40, beside a comma, makes a host of what is between them.
            "nats://ann:12@s3cret,34@host:1",
            "ann:12@34,s3cret@host:1",
            "nats://ann:12@s3cret:x",
            "nats://ann:12\ns3cret",
            "nats://ann:12/s3cret",
            "nats://[s3cret",
            "nat://s3cret",
            "s3cret://host",
            ["a:1", "ann:s3cret"],
        ],
    )
    def test_in_an_address_that_is_refused_are_not_shown(
        self, home: Path, monkeypatch: pytest.MonkeyPatch, given: str | list[str]
    ) -> None:
        told = []
        with pytest.raises(BadInput) as caught:
            Settings(given)
        told.append(str(caught.value))
        if isinstance(given, str):
            path = write_context(home, "prod", {"url": given})
            which = r"^(address \d of \d in )?"
            with pytest.raises(BadInput, match=rf"{which}'url' of NATS context 'prod' .{path}") as caught:
                Settings(context="prod")
            told.append(str(caught.value))
            monkeypatch.setenv("NATS_URL", given)
            with pytest.raises(BadInput, match=rf"{which}NATS_URL\b") as caught:
                Settings()
            told.append(str(caught.value))
        assert "s3cret" not in "".join(told)

    def test_a_refused_address_is_told_by_its_number_and_its_fault(self) -> None:
        with pytest.raises(BadInput, match=r"^address 2 of 3 in url is invalid: its port must be a number up to 65535"):
            Settings("a:1,ann:s3cret,b:2")
        with pytest.raises(
            BadInput, match=r"^url is invalid: it must begin with one of nats://, tls://, ws://, wss://\."
        ):
            Settings("http://host")
        with pytest.raises(BadInput, match=r"^url is invalid: its comma .*\. Write commas in passwords as %2C"):
            Settings("nats://ann:12,s3cret@host:1")

    @pytest.mark.parametrize(
        "given",
        [
            "ann:s3cret@a:1,b:2",
            "nats://ann:s3cret@a:1,nats://b:2",
            "ann:s3cret@a:1, ann:s3cret@b:2",
            "nats://ann:s3cret@a:1,ann:s3cret@b:2",
            "a:1,nats://ann:s3cret@b:2",
            "nats://ann:s3cret@a:1,nats://bob:other@b:2",
        ],
    )
    def test_in_addresses_that_can_be_told_apart_are_taken(self, given: str) -> None:
        settings = Settings(given)
        assert settings.urls == ("nats://a:1", "nats://b:2")
        assert (settings.user, settings.password) == ("ann", "s3cret")

    def test_with_percent_signs_are_read(self) -> None:
        settings = Settings("nats://an%40n:p%2Fw%3A%25@host:1")
        assert (settings.user, settings.password) == ("an@n", "p/w:%")
        assert settings.url == "nats://host:1"

    def test_a_lone_name_is_a_token(self) -> None:
        settings = Settings("nats://t%2Fken@host:1")
        assert (settings.user, settings.password, settings.token) == (None, None, "t/ken")

    def test_an_empty_password_is_a_password(self) -> None:
        settings = Settings("nats://ann:@host:1")
        assert (settings.user, settings.password, settings.token) == ("ann", "", None)


class TestNumbers:
    @pytest.mark.parametrize("name", ["ack_wait", "connect_timeout", "request_timeout", "retry_for"])
    @pytest.mark.parametrize("value", [0, -1, float("nan"), "5", None])
    def test_seconds_are_above_zero(self, name: str, value: object) -> None:
        with pytest.raises(BadInput, match=f"{name}={value!r} is invalid: .* Pass seconds or a timedelta"):
            Settings("h", **{name: value})  # type: ignore[arg-type]

    @pytest.mark.parametrize("value", [0, 6, -1, "3", None])
    def test_replicas_are_1_to_5(self, value: object) -> None:
        with pytest.raises(BadInput, match=f"replicas={value!r} is invalid: .*, from 1 to 5"):
            Settings("h", replicas=value)  # type: ignore[arg-type]


class TestOf:
    def test_settings_stay_as_they_are(self) -> None:
        settings = Settings("nats://ann:s3cret@h:1", replicas=3, name="me")
        assert Settings.of(settings) == settings

    def test_options_replace_fields(self) -> None:
        settings = Settings.of(Settings("nats://ann:s3cret@h:1"), replicas=3)
        assert (settings.url, settings.user, settings.password, settings.replicas) == ("nats://h:1", "ann", "s3cret", 3)

    def test_an_option_that_says_who_we_are_replaces_all_that_did(self, file: str) -> None:
        old = Settings("h", creds=file)
        for options in ({"user": "ann", "password": "s3cret"}, {"url": "nats://ann:s3cret@h"}):
            settings = Settings.of(old, **options)
            assert (settings.creds, settings.user, settings.password) == (None, "ann", "s3cret")
        assert Settings.of(old, url="other").creds == file

    @pytest.mark.parametrize("given", ["a:1,b:2", ["a:1", "b:2"]])
    def test_addresses_become_settings(self, given: str | list[str]) -> None:
        assert Settings.of(given, ack_wait=2).urls == ("nats://a:1", "nats://b:2")

    def test_nothing_is_the_default(self) -> None:
        assert Settings.of(None) == Settings()

    def test_an_unknown_option_names_the_known_ones(self) -> None:
        with pytest.raises(
            BadInput,
            match=r"is invalid: there is no such setting\. Did you mean 'ack_wait'\? The settings are ack_wait, .*url",
        ):
            Settings.of(None, ack_wiat=3)


class TestLogins:
    """Who we are comes as a whole from the first source that says so."""

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ({"user": "bob", "password": "x"}, {"user": "bob", "password": "x"}),
            ({"user": "ann"}, {"user": "ann", "password": "s3cret"}),
            ({"password": "x"}, {"user": "ann", "password": "x"}),
            ({"user": "bob"}, {"token": "bob"}),
            ({"user": "bob", "password": ""}, {"user": "bob", "password": ""}),
            ({"token": "x"}, {"token": "x"}),
            ({"nkey": SEED}, {"nkey": SEED}),
            ({}, {"user": "ann", "password": "s3cret"}),
            ({"url": "nats://x@h"}, {"token": "x"}),
            ({"url": "nats://ann@h", "password": "x"}, {"user": "ann", "password": "x"}),
            ({"url": "nats://eve:y@h", "user": "bob", "password": "x"}, {"user": "bob", "password": "x"}),
            ({"url": "nats://eve:y@h", "nkey": SEED}, {"nkey": SEED}),
        ],
    )
    def test_of_the_arguments_win(
        self, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], expected: dict[str, str]
    ) -> None:
        monkeypatch.setenv("NATS_USER", "ann")
        monkeypatch.setenv("NATS_PASSWORD", "s3cret")
        settings = Settings(**given)  # type: ignore[arg-type]
        found = {name: getattr(settings, name) for name in ("user", "password", "token", "creds", "nkey")}
        assert {name: value for name, value in found.items() if value is not None} == expected

    def test_of_the_environment_win_over_the_context(
        self, monkeypatch: pytest.MonkeyPatch, home: Path, file: str
    ) -> None:
        write_context(home, "prod", {"url": "nats://c:1", "user": "ann", "password": "s3cret"}, select=True)
        monkeypatch.setenv("NATS_CREDS", file)
        settings = Settings()
        assert (settings.url, settings.creds, settings.user) == ("nats://c:1", file, None)

    def test_a_lone_user_of_the_environment_is_a_token(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NATS_USER", "t0ken")
        assert (Settings().user, Settings().token) == (None, "t0ken")
        assert "t0ken" not in shown(Settings())

    def test_two_ways_at_once_are_refused(self, file: str) -> None:
        with pytest.raises(
            BadInput, match=r"user and creds cannot be combined: each specifies how to log in\. Pass only one of them"
        ):
            Settings("h", user="ann", password="s3cret", creds=file)

    @pytest.mark.parametrize("given", [{"user": 5}, {"password": b"s3cret"}, {"token": 1.5}, {"name": None}])
    def test_a_login_of_another_type_is_refused_and_not_shown(self, given: dict[str, Any]) -> None:
        with pytest.raises(BadInput, match="expected a string, got") as caught:
            Settings("h", **given)
        assert "s3cret" not in str(caught.value)


class TestFiles:
    @pytest.mark.parametrize("name", ["creds", "tls_ca", "tls_cert"])
    def test_files_are_given_as_paths(self, file: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        for given in (file, Path(file)):
            assert getattr(Settings("h", **{name: given}), name) == file  # type: ignore[arg-type]
        monkeypatch.setenv("HOME", str(Path(file).parent))
        assert getattr(Settings("h", **{name: "~/some.file"}), name) == file  # type: ignore[arg-type]
        with pytest.raises(BadInput, match=f"{name} is invalid: expected a path to a file"):
            Settings("h", **{name: 5})  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("name", "variable"),
        [("creds", "NATS_CREDS"), ("tls_ca", "NATS_CA"), ("tls_cert", "NATS_CERT"), ("tls_key", "NATS_KEY")],
    )
    def test_that_are_missing_are_told_by_name(
        self, name: str, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for path in (tmp_path / "no such file", tmp_path):
            with pytest.raises(
                BadInput, match=rf"^{name} '{path}' is invalid: the file cannot be read \(.*\)\. Check the path"
            ):
                Settings("h", **{name: path})  # type: ignore[arg-type]
        monkeypatch.setenv(variable, "/no/such")
        with pytest.raises(BadInput, match=f"{variable} '/no/such' is invalid: the file cannot be read"):
            Settings("h")

    def test_one_that_is_not_used_may_be_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NATS_CREDS", "/no/such")
        assert Settings("h", token="t0ken").creds is None

    def test_of_the_environment(self, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
        for variable in ("NATS_CA", "NATS_CERT", "NATS_KEY", "NATS_NKEY"):
            monkeypatch.setenv(variable, file)
        settings = Settings("h")
        assert (settings.tls_ca, settings.tls_cert, settings.tls_key, settings.nkey) == (file,) * 4

    def test_a_key_needs_its_certificate(self, file: str) -> None:
        with pytest.raises(BadInput, match="tls_key cannot be used alone: the key requires a certificate"):
            Settings("h", tls_key=file)

    def test_a_seed_is_never_shown(self) -> None:
        assert SEED not in shown(Settings("h", nkey=SEED))
        assert Settings("h", nkey=f" {SEED}\n").nkey == SEED
        for slip in (SEED[:-1], SEED.lower(), SEED.replace("3", "8"), f"{SEED}A"):
            with pytest.raises(BadInput, match="nkey is invalid: it is neither a seed") as caught:
                Settings("h", nkey=slip)
            assert slip[5:20] not in str(caught.value)

    @pytest.mark.parametrize("source", ["argument", "variable", "context"])
    @pytest.mark.parametrize(
        ("name", "variable", "key"),
        [
            ("creds", "NATS_CREDS", "creds"),
            ("nkey", "NATS_NKEY", "nkey"),
            ("tls_ca", "NATS_CA", "ca"),
            ("tls_cert", "NATS_CERT", "cert"),
            ("tls_key", "NATS_KEY", "key"),
        ],
    )
    def test_contents_passed_instead_of_a_path_are_never_shown(
        self, source: str, name: str, variable: str, key: str, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        begin, end = "-----BEGIN USER NKEY SEED-----", "------END USER NKEY SEED------"
        for contents in (
            f"-----BEGIN NATS USER JWT-----\neyJ0./{SEED}\n------END NATS USER JWT------\n\n{begin}\n{SEED}\n{end}\n",
            f"{begin} ./{SEED[:40]} {SEED[40:]} {end}",
            f"./{SEED}",
            f"./{SEED.lower()[:-1]}",
            f"eyJ0eXAi.{SEED[:40]}/{SEED[40:]}",
            base64.b64encode(f"{begin}\n./{SEED}".encode()).decode(),
            f"MII/{SEED[:40]}+/{SEED[40:]}." * 20,
        ):
            arguments: dict[str, Any] = {}
            if source == "argument":
                arguments = {name: contents}
            elif source == "variable":
                monkeypatch.setenv(variable, contents)
            else:
                write_context(home, "prod", {key: contents})
                arguments = {"context": "prod"}
            with pytest.raises(BadInput, match=r"is invalid: (the value looks like|it is neither a seed)") as caught:
                Settings(**arguments)
            assert SEED[5:20].lower() not in str(caught.value).lower()
            assert contents[-8:] not in str(caught.value)

    def test_a_path_of_a_seed_is_shown(self) -> None:
        with pytest.raises(BadInput, match=r"nkey '/no/such\.nk' is invalid: it is neither"):
            Settings("h", nkey="/no/such.nk")


class TestContexts:
    def test_every_field_is_read(self, home: Path, file: str) -> None:
        found = {"url": "tls://a:1,tls://b:2", "ca": file, "cert": file, "key": file, "tls_first": True}
        path = write_context(home, "prod", {**found, "creds": f"file://{file}", "description": "", "nsc": ""})
        settings = Settings(context="prod")
        assert settings.urls == ("tls://a:1", "tls://b:2")
        assert (settings.tls_ca, settings.tls_cert, settings.tls_key, settings.creds) == (file,) * 4
        assert (settings.tls_first, settings.context) == (True, "prod")
        write_context(home, "prod", {"nkey": file})
        assert (Settings(context="prod").nkey, Settings(context="prod").url) == (file, DEFAULT_URL)
        write_context(home, "prod", {"creds": "/no/such"})
        with pytest.raises(BadInput) as caught:
            Settings(context="prod")
        assert f"'creds' of NATS context 'prod' ({path}) '/no/such' is invalid: the file" in str(caught.value)

    @pytest.mark.parametrize("key", ["password", "token"])
    def test_its_secrets_are_never_shown(self, home: Path, key: str) -> None:
        write_context(home, "prod", {"url": "nats://c:1", "user": "ann", key: "s3cret"}, select=True)
        assert getattr(Settings(), key) == "s3cret"
        assert "s3cret" not in shown(Settings())
        write_context(home, "prod", {"url": "nats://ann:s3cret@c:1"})
        assert (Settings().password, Settings().url) == ("s3cret", "nats://c:1")

    def test_arguments_and_environment_choose_the_context(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("selected", "named", "given"):
            write_context(home, name, {"url": f"nats://{name}:1", "token": name}, select=name == "selected")

        def used(*arguments: str, **options: str) -> tuple[object, ...]:
            settings = Settings(*arguments, **options)  # type: ignore[arg-type]
            return settings.url, settings.token, settings.context

        assert used() == ("nats://selected:1", "selected", "selected")
        assert used("h:1") == ("nats://h:1", None, None)
        assert used("h:1", context="given") == ("nats://h:1", "given", "given")
        monkeypatch.setenv("NATS_CONTEXT", "named")
        assert used() == ("nats://named:1", "named", "named")
        assert used(context="given") == ("nats://given:1", "given", "given")
        assert used("h:1") == ("nats://h:1", None, None)
        monkeypatch.setenv("NATS_URL", "nats://env:1")
        assert used() == ("nats://env:1", "named", "named")
        assert used(context="given") == ("nats://given:1", "given", "given")
        monkeypatch.setenv("NATS_TOKEN", "other")
        assert used(context="given") == ("nats://given:1", "given", "given")
        assert Settings.of(Settings("h:1"), context="given").url == "nats://given:1"
        write_context(home, "given", {"token": "given"})
        assert used(context="given") == (DEFAULT_URL, "given", "given")
        monkeypatch.delenv("NATS_TOKEN")
        monkeypatch.delenv("NATS_CONTEXT")
        assert used() == ("nats://env:1", None, None)

    def test_contexts_are_found_in_the_home_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("XDG_CONFIG_HOME")
        monkeypatch.setenv("HOME", str(tmp_path))
        write_context(tmp_path / ".config" / "nats", "prod", {"url": "nats://c:1"}, select=True)
        assert Settings().url == "nats://c:1"

    @pytest.mark.parametrize(
        ("content", "why"),
        [
            ("", "line 1, column 1"),
            ('{"password": "s3cret', "line 1, column 14"),
            ("[]", "it is not a JSON object"),
            ('{"url": 5}', "'url' must be a string"),
            ('{"tls_first": "s3cret"}', "'tls_first' must be true or false"),
            ('{"creds": "op://vault/s3cret"}', "only the NATS CLI can look up"),
            ('{"socks_proxy": "socks5://s3cret"}', "nqnb does not support 'socks_proxy'"),
        ],
    )
    def test_an_unusable_context_is_explained_without_its_secrets(self, home: Path, content: str, why: str) -> None:
        path = write_context(home, "prod", content, select=True)
        for options in ({}, {"context": "prod"}):
            with pytest.raises(BadInput) as caught:
                Settings(**options)  # type: ignore[arg-type]
            text = str(caught.value)
            for part in (str(path), why, "`nats context edit prod`"):
                assert part in text
            assert "s3cret" not in text

    def test_a_missing_context_is_explained(self, home: Path) -> None:
        with pytest.raises(
            BadInput,
            match=r"'prod' \(.*prod\.json\) was not found: the file does not exist\. List your contexts with `nats",
        ):
            Settings(context="prod")
        home.mkdir()
        (home / "context.txt").write_text("gone")
        with pytest.raises(BadInput, match="'gone'"):
            Settings()
        (home / "context.txt").write_text("\n")
        assert Settings().url == DEFAULT_URL
        (home / "context.txt").write_bytes(b"\xff")
        with pytest.raises(BadInput, match=r"cannot read the name of the selected NATS context from .*context\.txt'"):
            Settings()

    @pytest.mark.parametrize("name", ["../prod", "a/b", "..", "x" * 5_000])
    def test_an_invalid_context_name_is_refused(self, name: str) -> None:
        with pytest.raises(BadInput, match=r"NATS context name .* is invalid") as caught:
            Settings(context=name)
        assert len(str(caught.value)) < 500

    def test_one_that_replaces_an_address(self, home: Path, file: str) -> None:
        write_context(home, "prod", {"url": "nats://c:1", "token": "t0ken"})
        settings = Settings.of(Settings("h", user="ann", password="s3cret", tls_ca=file, replicas=3), context="prod")
        assert (settings.url, settings.token, settings.user, settings.tls_ca) == ("nats://c:1", "t0ken", None, None)
        assert settings.replicas == 3


class TestBuckets:
    NAMES = ("state_bucket", "cancel_bucket", "worker_bucket", "result_bucket")

    def test_bucket_names_default_to_those_of_nq(self) -> None:
        settings = Settings("h", state_bucket="mine")
        assert [getattr(settings, name) for name in self.NAMES] == ["mine", "nq-cancel", "nq-workers", "nq-results"]

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("value", ["", "a.b", "a b", "a/b", "ä", "a\n", 5, None, "a" * 201])
    def test_an_invalid_bucket_name_is_refused(self, name: str, value: object) -> None:
        with pytest.raises(BadInput, match=f"{name}=.* is invalid: expected 1 to 200 characters"):
            Settings("h", **{name: value})  # type: ignore[arg-type]

    def test_two_buckets_of_one_name_are_refused(self) -> None:
        with pytest.raises(BadInput, match="result_bucket='nq-store' is invalid: state_bucket has the same value"):
            Settings("h", result_bucket="nq-store")


def test_settings_are_a_frozen_value() -> None:
    settings = Settings("h")
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.url = "other"  # type: ignore[misc]
    assert settings == Settings("nats://h:4222")
    assert hash(Settings(["a", "b"])) == hash(Settings("a,b"))
    assert pickle.loads(pickle.dumps(settings)) == settings  # noqa: S301  # bytes of this very line
