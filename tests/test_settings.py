"""Where the server is: arguments, then the environment, then this machine; and no secret ever shown."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import pytest

from nqnb import Settings
from nqnb.errors import BadInput
from nqnb.settings import DEFAULT_URL


@pytest.fixture(autouse=True)
def no_contexts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A context of the NATS CLI that a developer has selected must not become the tests'."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))


def shown(settings: Settings) -> str:
    return f"{settings!r} {settings} {settings.url} {settings.urls}"


def test_default_is_this_machine() -> None:
    assert Settings().url == DEFAULT_URL == "nats://127.0.0.1:4222"


class TestEnvironment:
    def test_it_is_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
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
        settings = Settings("nats://given:2", user="bob", password="s3cret")  # noqa: S106
        assert settings.url == "nats://given:2"
        assert (settings.user, settings.password) == ("bob", "s3cret")

    def test_what_is_in_the_address_wins(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NATS_USER", "ann")
        monkeypatch.setenv("NATS_PASSWORD", "other")
        settings = Settings("nats://bob:s3cret@h:1")
        assert (settings.user, settings.password) == ("bob", "s3cret")

    def test_empty_is_not_set(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("URL", "USER", "PASSWORD", "TOKEN"):
            monkeypatch.setenv(f"NATS_{name}", "")
        settings = Settings()
        assert settings.url == DEFAULT_URL
        assert (settings.user, settings.password, settings.token) == (None, None, None)

    def test_secrets_of_its_address_are_taken_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NATS_URL", "nats://ann:s3cret@env:1")
        assert "s3cret" not in shown(Settings())
        assert Settings().password == "s3cret"  # noqa: S105


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
            ("wss://host", "wss://host:4222"),
            ("nats://[::1]:5", "nats://[::1]:5"),
            ("NATS://host:1", "nats://host:1"),
        ],
    )
    def test_taken(self, given: str, url: str) -> None:
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
    def test_refused(self, given: str | list[str]) -> None:
        with pytest.raises(BadInput, match="is not the address of a NATS server: write it like nats://127"):
            Settings(given)

    @pytest.mark.parametrize("given", [5, 5.0, object(), [None], True])
    def test_what_is_no_text(self, given: object) -> None:
        with pytest.raises(BadInput):
            Settings(given)  # type: ignore[arg-type]


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
        settings = Settings("h", **{name: "s3cret"})
        assert "s3cret" not in shown(settings)
        assert getattr(settings, name) == "s3cret"

    def test_of_a_token_beside_another_are_never_shown(self) -> None:
        assert "s3cret" not in shown(Settings("nats://s3cret@h:1", token="other"))  # noqa: S106

    @pytest.mark.parametrize(
        "given",
        [
            "http://ann:s3cret@host",
            "nats://ann:s3cret@host:port",
            "nats://ann:s3cret@",
            "nats://ann:s3@s3cret@:1",
            # A slash that is not written as %2F ends the host, and what follows it is no secret to urllib.
            "nats://ann:12/s3cret@host:1",
            "nats://ann:12#s3cret@host:1",
            "nats://ann:12?s3cret@host:1",
        ],
    )
    def test_in_an_address_that_is_refused_are_not_shown(self, given: str) -> None:
        with pytest.raises(BadInput) as caught:
            Settings(given)
        assert "s3cret" not in str(caught.value)

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
        with pytest.raises(BadInput, match=f"{name}={value!r}: give a number of seconds above 0"):
            Settings("h", **{name: value})  # type: ignore[arg-type]

    @pytest.mark.parametrize("value", [0, 6, -1, "3", None])
    def test_replicas_are_1_to_5(self, value: object) -> None:
        with pytest.raises(BadInput, match=f"replicas={value!r}: NATS keeps 1 to 5 copies"):
            Settings("h", replicas=value)  # type: ignore[arg-type]


class TestOf:
    def test_settings_stay_as_they_are(self) -> None:
        settings = Settings("nats://ann:s3cret@h:1", replicas=3, name="me")
        assert Settings.of(settings) == settings

    def test_options_replace_fields(self) -> None:
        settings = Settings.of(Settings("nats://ann:s3cret@h:1"), replicas=3)
        assert (settings.url, settings.user, settings.password, settings.replicas) == ("nats://h:1", "ann", "s3cret", 3)

    @pytest.mark.parametrize("given", ["a:1,b:2", ["a:1", "b:2"]])
    def test_addresses(self, given: str | list[str]) -> None:
        assert Settings.of(given, ack_wait=2).urls == ("nats://a:1", "nats://b:2")

    def test_nothing_is_the_default(self) -> None:
        assert Settings.of(None) == Settings()

    def test_an_unknown_option_names_the_known_ones(self) -> None:
        with pytest.raises(BadInput, match=r"no setting is called 'ack_wiat'; there are ack_wait, .*url"):
            Settings.of(None, ack_wiat=3)


def test_settings_are_a_frozen_value() -> None:
    settings = Settings("h")
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.url = "other"  # type: ignore[misc]
    assert settings == Settings("nats://h:4222")
    assert hash(Settings(["a", "b"])) == hash(Settings("a,b"))
    assert pickle.loads(pickle.dumps(settings)) == settings  # noqa: S301  our own bytes
