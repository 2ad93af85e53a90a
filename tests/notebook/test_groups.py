"""Groups of tasks: the rows of a DataFrame as payloads, results beside their rows, and groups that are found again."""

from __future__ import annotations

import asyncio
import operator
import re
import signal
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from html import unescape
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest

import nqnb
from nqnb import Status
from nqnb.notebook.loop import LOOP
from nqnb.notebook.session import Session
from nqnb.notebook.tasks import SessionTask, TaskList, group_list, ids_of
from nqnb.protocol.wire import TaskMessage


@pytest.fixture
def session(settings: nqnb.Settings) -> Iterator[Session]:
    made = nqnb.session(settings.urls[0], ack_wait=1.0, retry_for=5.0)
    yield made
    made.down()


def images(count: int = 6) -> pd.DataFrame:
    """Return a DataFrame with labels for its rows."""
    widths = [256 * (number + 1) for number in range(count)]
    frame: pd.DataFrame = pd.DataFrame(
        {"path": [f"{number}.png" for number in range(count)], "width": widths}, index=_labels(count)
    )
    return frame


def _labels(count: int) -> list[str]:
    return [f"row{number}" for number in range(count)]


def serve(session: Session, broken: set[int] | None = None) -> set[int]:
    """Serve queue ``resize``: a width in the set is an error. The set can be changed."""
    broken = set() if broken is None else broken

    @session.handler("resize", concurrency=4)
    def resize(job: nqnb.Job, payload: dict[str, Any]) -> dict[str, Any]:
        if payload["width"] in broken:
            raise OSError(f"no disk for {payload['path']}")
        return {"bytes": payload["width"] * 2}

    return broken


class TestRows:
    def test_the_rows_of_a_frame_are_payloads_of_json_types(self, session: Session) -> None:
        frame = pd.DataFrame(
            {
                "path": ["a.png", None],
                "width": [512.5, np.nan],
                "count": pd.array([3, None], dtype="Int64"),
                "at": pd.Series([pd.Timestamp("2026-11-29T12:00:00Z"), pd.NaT]),
                "kind": pd.Categorical(["x", None]),
                7: [True, False],
                "more": [{"a": [1]}, np.float32("nan")],
            }
        )
        payloads = [info["payload"] for _, info in session.map("resize", frame).df.iterrows()]
        assert payloads == [
            {
                "path": "a.png",
                "width": 512.5,
                "count": 3,
                "at": "2026-11-29T12:00:00+00:00",
                "kind": "x",
                "7": True,
                "more": {"a": [1]},
            },
            {"path": None, "width": None, "count": None, "at": None, "kind": None, "7": False, "more": None},
        ]

    def test_all_rows_of_a_long_frame_are_submitted_in_its_order(self, session: Session) -> None:
        frame = images(2500)
        tasks = session.map("resize", frame)
        assert tasks.df["payload"].tolist() == frame.to_dict("records")

    @pytest.mark.parametrize(
        ("frame", "why"),
        [
            (pd.DataFrame([[1, 2]], columns=["a", "a"]), "are named 'a'"),
            (pd.DataFrame([[1, 2]], columns=["1", 1]), "are named '1'"),
            (pd.DataFrame([[1, 2]], columns=pd.MultiIndex.from_tuples([("a", "b"), ("a", "c")])), "several levels"),
        ],
    )
    def test_a_frame_whose_rows_would_lose_values_is_refused(
        self, session: Session, frame: pd.DataFrame, why: str
    ) -> None:
        with pytest.raises(nqnb.BadInput, match=why):
            session.map("resize", frame)
        assert session.tasks().empty

    def test_an_infinite_number_is_refused_and_not_null(self, session: Session) -> None:
        with pytest.raises(nqnb.NotSubmitted, match=r"payload\['width'\]"):
            session.map("resize", pd.DataFrame({"width": [1.0, np.inf]}))

    @pytest.mark.anyio
    async def test_a_client_submits_the_rows_of_a_frame_too(self, nq: nqnb.Client) -> None:
        tasks = await nq.submit_many("resize", images(2), group="sweep-7")
        infos = [await task.fetch() for task in tasks]
        assert [info.payload for info in infos] == [b'{"path":"0.png","width":256}', b'{"path":"1.png","width":512}']
        assert [(info.group, info.position, info.label) for info in infos] == [
            ("sweep-7", 0, b'"row0"'),
            ("sweep-7", 1, b'"row1"'),
        ]


class TestResults:
    def test_the_results_of_a_frame_have_its_index(self, session: Session) -> None:
        serve(session, {512})
        tasks = session.map("resize", images())
        results = tasks.results(20, errors="drop")
        assert isinstance(results, pd.Series)
        assert results.to_dict() == {f"row{number}": {"bytes": 512 * (number + 1)} for number in (0, 2, 3, 4, 5)}
        assert isinstance(tasks.results(errors="return")["row1"], nqnb.TaskFailed)
        assert tasks[2:4].results().index.tolist() == ["row2", "row3"]
        assert sorted(tasks, key=lambda task: -task.row)[0].id == tasks[5].id
        with pytest.raises(nqnb.TaskFailed, match="1 of 6 tasks has no result"):
            tasks.results()
        assert (tasks + tasks[:1]).results(errors="drop")[:1] == [{"bytes": 512}]

    def test_results_that_are_text_or_none_stay_as_they_are(self, session: Session) -> None:
        @session.handler("names")
        def name_of(job: nqnb.Job, payload: dict[str, Any]) -> str | None:
            return payload["path"] or None

        results = session.map("names", pd.DataFrame({"path": ["a.png", ""]})).results(20)
        assert (results.tolist(), str(results.dtype)) == (["a.png", None], "object")

    def test_a_frame_is_joined_with_the_states_and_results_while_tasks_run(self, session: Session) -> None:
        frame = images()
        tasks = session.map("resize", frame)
        waiting = tasks.join(frame)
        assert waiting[["path", "width"]].equals(frame)
        assert waiting["status"].tolist() == ["pending"] * 6
        assert waiting["task"].tolist() == tasks.ids
        serve(session, {512})
        tasks.wait(20)
        joined = tasks.join(frame.iloc[::-1].assign(status="mine"), flat=True)
        assert joined.index.tolist() == _labels(6)[::-1]
        assert joined["status"].tolist() == ["mine"] * 6
        assert joined["task_status"].tolist() == ["completed"] * 4 + ["failed", "completed"]
        assert joined["→ bytes"].fillna(0).tolist() == [3072, 2560, 2048, 1536, 0, 512]
        assert joined.loc["row1", "error"] == "OSError: no disk for 1.png"
        more = tasks[:2].join(images(8))
        assert more["task"].notna().tolist() == [True, True] + [False] * 6

    def test_a_frame_that_is_joined_several_times_has_unique_names_and_the_ids_of_each_join(
        self, session: Session
    ) -> None:
        joined, lists = images(2).rename_axis("id"), []
        for queue in ("resize", "check", "publish"):
            lists.append(session.map(queue, joined))
            joined = lists[-1].join(joined)
        assert joined.columns.is_unique
        for name, tasks in zip(("task", "task_task", "task_task_task"), lists, strict=True):
            assert joined[name].tolist() == ids_of(joined[name]) == tasks.ids
        assert joined["task_task_status"].tolist() == ["pending"] * 2

    def test_rows_with_equal_labels_keep_their_own_results(self, session: Session) -> None:
        serve(session)
        frame = images().set_axis(["a", "b", "a", "a", "b", "c"])
        joined = session.map("resize", frame)
        joined.wait(20)
        assert joined.join(frame, flat=True)["→ bytes"].tolist() == (frame["width"] * 2).tolist()
        with pytest.raises(nqnb.BadInput, match="the label 'a' occurs more than once"):
            session.map("resize", frame, group="sweep-7")

    def test_rows_with_equal_labels_are_never_joined_with_the_task_of_another_row(self, session: Session) -> None:
        frame = images(4).set_axis([0, 1, 0, 1])
        tasks = session.map("resize", frame)
        assert tasks[1:3].join(frame)["task"].fillna("").tolist() == ["", *tasks.ids[1:3], ""]
        assert tasks.latest().join(frame.assign(score=1).iloc[:, ::-1])["task"].tolist() == tasks.ids
        others = [frame.iloc[::-1], frame.iloc[:2], frame.iloc[1:], images(4)]
        # The labels of these rows are the original labels, in the original order.
        others += [frame.iloc[[2, 3, 0, 1]], frame.assign(width=1), frame.assign(width=object()), frame[["path"]]]
        others += [pd.concat([frame, frame[["path"]]], axis=1), pd.concat({"a": frame}, axis=1)]
        for other in others:
            with pytest.raises(nqnb.BadInput, match=r"the label 0 occurs more than once\. Join the original"):
                tasks.join(other)

    def test_rows_with_equal_labels_can_have_values_that_are_not_hashable(self, session: Session) -> None:
        frame = pd.DataFrame({"tags": [["a"], ["b"]], "size": [{"x": 1}, None], "at": [pd.NaT, 1.5]}, index=[0, 0])
        tasks = session.map("resize", frame)
        assert tasks.join(frame.copy())["task"].tolist() == tasks.ids
        with pytest.raises(nqnb.BadInput, match="the label 0 occurs more than once"):
            tasks.join(frame.iloc[::-1])

    def test_each_row_of_an_exploded_frame_has_the_task_of_its_label(self, session: Session) -> None:
        frame = images(2).assign(tags=["x,y", "z"])
        tasks = session.map("resize", frame)
        exploded = frame.assign(tags=frame["tags"].str.split(",")).explode("tags")
        assert tasks.join(exploded)["task"].tolist() == [tasks.ids[0], tasks.ids[0], tasks.ids[1]]

    @pytest.mark.parametrize(
        "index",
        [
            pd.interval_range(0, 3),
            pd.IntervalIndex.from_tuples([(0, 2), (1, 3), (2, 4)]),
            pd.period_range("2026-01", periods=3, freq="M"),
            pd.Index([1.0, np.nan, 2.0]),
            pd.DatetimeIndex(["2026-11-29", None, "2026-11-30"], tz="Europe/Berlin"),
            pd.MultiIndex.from_tuples([("a", np.nan), ("a", 1.0), ("b", 1.0)]),
        ],
        ids=lambda index: type(index).__name__ + str(index.dtype),
    )
    def test_labels_that_are_not_json_are_joined_too(self, session: Session, index: pd.Index[Any]) -> None:
        frame = images(3).set_axis(index)
        tasks = session.map("resize", frame)
        joined = tasks.join(frame.iloc[::-1])
        assert joined.index.equals(index[::-1])
        assert joined["task"].tolist() == tasks.ids[::-1]
        assert tasks.join(images(2))["task"].isna().all()

    def test_a_requeued_row_is_joined_with_its_latest_copy(self, session: Session) -> None:
        broken, frame = serve(session, {512, 1024}), images()
        tasks = session.map("resize", frame, group="sweep-7")
        tasks.wait(20)
        broken.remove(512)
        for again in session.requeue([tasks[1], tasks[3]]):
            again.wait(20)
        joined = tasks.join(frame)
        assert joined["status"].tolist() == ["completed"] * 3 + ["failed"] + ["completed"] * 2
        assert joined.loc["row1", "result"] == {"bytes": 1024}
        assert tasks.latest().results(errors="drop").index.tolist() == ["row0", "row1", "row2", "row4", "row5"]
        assert session.group("sweep-7").join(frame).drop(columns="run_time").equals(joined.drop(columns="run_time"))
        assert tasks.ids[0] == tasks.latest().ids[0]
        assert tasks.ids[1] != tasks.latest().ids[1]

    @pytest.mark.parametrize("many", [2000, 1])
    def test_a_completed_row_that_was_requeued_is_joined_with_its_latest_copy(
        self, session: Session, monkeypatch: pytest.MonkeyPatch, many: int
    ) -> None:
        monkeypatch.setattr("nqnb.notebook.tasks.MANY_TASKS", many)
        serve(session)
        frame = images(2)
        tasks = session.map("resize", frame, group="sweep-7")
        tasks.wait(20)
        again = session.requeue(tasks[0])
        again.wait(20)
        assert tasks.latest().ids == [again.id, tasks.ids[1]]
        assert tasks.join(frame)["task"].tolist() == session.group("sweep-7").join(frame)["task"].tolist()

    @pytest.mark.parametrize("wrong", ["frame", None, [1]])
    def test_what_cannot_be_joined_is_refused(self, session: Session, wrong: Any) -> None:
        tasks = session.map("resize", images(1))
        with pytest.raises(nqnb.BadInput, match="expected a DataFrame"):
            tasks.join(wrong)
        with pytest.raises(nqnb.BadInput, match="not the rows of a DataFrame"):
            session.map("resize", [1]).join(images(1))


def list_of(frame: pd.DataFrame) -> TaskList:
    """Return the tasks of a DataFrame without submitting them."""
    session = Session(nqnb.Settings())
    tasks = [SessionTask(session, f"{label}-task", "resize", row) for row, label in enumerate(frame.index)]
    return TaskList(session, tasks, frame.index)


def pending(task_id: str) -> nqnb.TaskInfo:
    """Return the record of a task that has not started."""
    return nqnb.TaskInfo.of(TaskMessage(ID=task_id, Queue="resize", Payload=b"1", Status=Status.PENDING), 1)


class TestChangedLists:
    @pytest.mark.parametrize(
        "change",
        [
            lambda tasks, more: tasks.__iadd__(more),
            lambda tasks, more: tasks.extend(more),
            lambda tasks, more: tasks.append(more[0]),
            lambda tasks, more: tasks.insert(0, more[0]),
            lambda tasks, more: operator.setitem(tasks, 0, more[0]),
            lambda tasks, more: operator.setitem(tasks, slice(1, 2), more),
        ],
        ids=["+=", "extend", "append", "insert", "item", "slice"],
    )
    def test_a_list_with_added_tasks_has_no_index_because_their_rows_are_those_of_another_frame(
        self, change: Callable[[TaskList, TaskList], object]
    ) -> None:
        frame = images(3)
        tasks, more = list_of(frame), list_of(images(5).set_axis([*"pqrst"]))
        change(tasks, more)
        assert {*more.ids} & {*tasks.ids}
        assert tasks._labels() is None
        with pytest.raises(nqnb.BadInput, match="not the rows of a DataFrame"):
            tasks.join(frame)
        assert more._labels().tolist() == [*"pqrst"]

    def test_a_list_with_removed_or_reordered_tasks_keeps_its_index(self) -> None:
        tasks = list_of(images(6))
        tasks.reverse()
        tasks.pop()
        del tasks[:2]
        tasks.remove(tasks[0])
        assert tasks._labels().tolist() == ["row2", "row1"]
        tasks.sort(key=lambda task: task.row)
        assert tasks._labels().tolist() == ["row1", "row2"]


class TestCard:
    def test_the_card_shows_progress_and_failures_in_groups_and_no_markup_of_a_task(self, session: Session) -> None:
        broken = set(range(256, 7 * 256, 256))
        serve(session, broken)
        frame = images(20).assign(path=lambda rows: "<b>" + rows["path"])
        tasks = session.map("resize", frame)
        tasks.wait(20)
        card = (tasks + session.map("other", [1, 2]))._repr_html_()
        assert "<b>22 tasks</b> in resize, other: 2 pending, 6 failed, 14 completed; " in card
        assert re.search(r"[\d.]+ tasks/s; about [\d.]+ s left; no worker serves queue 'other'", unescape(card))
        assert re.search(r"as of \d{4}-\d\d-\d\d \d\d:\d\d:\d\d; <code>tasks\.watch\(\)", card)
        assert card.count("<li>") == 1
        assert "<li>6 failed: OSError: no disk for " in card
        assert " in resize</li>" in card
        assert card.count("<b>") == 1
        assert "tasks.cancel()" in card
        assert "tasks.cancel()" not in tasks._repr_html_()
        assert "tasks/s" not in tasks._repr_html_()


class TestFrame:
    def test_the_fields_of_payloads_and_results_are_columns_of_a_list_and_of_a_table(self, session: Session) -> None:
        serve(session)
        tasks = session.map("resize", images(3))
        tasks.wait(20)
        assert {"path", "width", "→ bytes"} <= {*tasks.frame(flat=True)}
        assert tasks.frame(flat=True)["→ bytes"].tolist() == [512, 1024, 1536]
        assert tasks.frame().equals(tasks.df)
        assert "payload" in tasks.df
        assert "→ bytes" in tasks.watch().frame(flat=True)
        for frame in (tasks.frame, tasks.watch().frame):
            with pytest.raises(nqnb.BadInput, match="flat="):
                frame(flat="yes")  # type: ignore[arg-type]  # that is what is tested

    def test_a_long_list_is_read_at_once(self, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
        serve(session, {512})
        tasks = session.map("resize", images())
        tasks.wait(20)
        short = TaskList(session, [*tasks, SessionTask(session, "unknown", "resize")])
        counts, frame, failures = short.counts(), short.df, short.failures()
        monkeypatch.setattr("nqnb.notebook.tasks.MANY_TASKS", 3)
        monkeypatch.setattr(session.client, "fetch", None)
        assert short.counts() == counts == {"failed": 1, "completed": 5, "unknown": 1}
        assert short.df.equals(frame)
        assert short.failures().equals(failures)
        assert "1 unknown" in short._repr_html_()
        assert TaskList(session, [SessionTask(session, f"{n}", "nobody") for n in range(4)]).counts() == {"unknown": 4}

    def test_a_record_that_cannot_be_read_is_an_error_and_not_a_missing_task(
        self, session: Session, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        frame = images(3)
        tasks = session.map("nobody", frame)
        fetch = session.client.fetch
        errors: dict[str, nqnb.NqnbError] = {tasks[1].id: nqnb.MalformedMessage("the entry is broken", b"?")}

        async def fetch_or_fail(task_id: str) -> nqnb.TaskInfo:
            if task_id in errors:
                raise errors[task_id]
            return await fetch(task_id)

        monkeypatch.setattr(session.client, "fetch", fetch_or_fail)
        assert [*tasks.df.index] == [tasks[0].id, tasks[2].id], "one broken entry hides no other task"
        assert tasks.counts() == {"pending": 2, "unknown": 1}
        errors[tasks[2].id] = nqnb.Unconfirmed("the answer was lost")
        reads = (tasks.frame, tasks.failures, tasks.counts, tasks.latest)
        for read in (*reads, lambda: tasks.join(frame), lambda: session.timeline(tasks)):
            with pytest.raises(nqnb.Unconfirmed):
                read()
        assert "the answer was lost" in tasks._repr_html_()


class TestCompleted:
    def test_tasks_are_yielded_as_they_end_and_one_failure_hides_no_other(self, session: Session) -> None:
        may_end = [threading.Event() for _ in range(3)]

        @session.handler("held", concurrency=4)
        def held(job: nqnb.Job, number: int) -> None:
            may_end[number].wait(60)
            if number == 2:
                raise ValueError("two")

        tasks = session.map("held", range(3))
        ended = iter(tasks.completed(60))
        for number in (1, 2, 0):
            may_end[number].set()
            assert tasks.index(next(ended)) == number
        assert list(ended) == []
        assert [task.status() for task in tasks] == [Status.COMPLETED, Status.COMPLETED, Status.FAILED]
        assert {*tasks.completed()} == {*tasks}
        assert list(TaskList(session).completed()) == []

    def test_an_iterator_that_is_dropped_after_the_session_starts_no_loop(self, session: Session) -> None:
        tasks = session.map("resize", range(2))
        tasks[0].cancel()
        ended = iter(tasks.completed())
        assert next(ended) == tasks[0]
        session.down()
        assert not LOOP.running
        del ended
        assert not LOOP.running

    @pytest.mark.anyio
    async def test_an_async_for_that_the_end_of_the_session_ends_starts_no_loop(self, session: Session) -> None:
        tasks = session.map("resize", range(2))
        tasks[0].cancel()
        ended = aiter(tasks.completed())
        assert await anext(ended) == tasks[0]
        session.down()
        await ended.aclose()  # type: ignore[attr-defined]  # it is a generator
        assert not LOOP.running

    @pytest.mark.anyio
    async def test_tasks_are_yielded_to_async_for(self, session: Session) -> None:
        serve(session, {512})
        tasks = session.map("resize", images())
        assert {task.id async for task in tasks.completed(20)} == {*tasks.ids}

    def test_a_task_that_does_not_exist_has_ended(self, session: Session) -> None:
        nobody = SessionTask(session, "nobody")
        assert list(TaskList(session, [nobody]).completed(20)) == [nobody]

    def test_the_wait_has_a_limit_and_the_ended_tasks_come_first(self, session: Session) -> None:
        serve(session)
        tasks = session.map("resize", images(2)) + session.map("other", [1])
        tasks[:2].wait(30)
        ended: list[SessionTask] = []
        with pytest.raises(nqnb.WaitTimeout, match="1 of 3 tasks did not end within 1 s"):
            ended.extend(task for task in tasks.completed(1))
        assert {*ended} == {*tasks[:2]}

    @pytest.mark.parametrize("many", [2000, 1])
    def test_the_tasks_that_have_ended_at_the_limit_are_yielded(
        self, session: Session, monkeypatch: pytest.MonkeyPatch, many: int
    ) -> None:
        monkeypatch.setattr("nqnb.notebook.tasks.MANY_TASKS", many)
        serve(session, {512})
        tasks = session.map("resize", images(2))
        tasks.wait(30)
        assert {*tasks.completed(0)} == {*tasks}
        late = [*session.map("other", [1, 2, 3]), SessionTask(session, "nobody", "other")]
        ended: list[SessionTask] = []

        def slow_body(task: SessionTask) -> None:
            ended.append(task)
            if task in tasks:
                session.cancel(late[:2])
                time.sleep(1.2)

        with pytest.raises(nqnb.WaitTimeout, match="1 of 6 tasks did not end within 2 s"):
            deque(map(slow_body, (tasks + late).completed(2)))
        assert {*ended} == {*tasks, *late[:2], late[3]}

    def test_a_limit_without_an_answer_of_the_server_is_a_timeout(
        self, session: Session, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tasks = session.map("other", [1])
        errors = [nqnb.Unconfirmed("the answer was lost"), asyncio.TimeoutError()]

        async def lost(task_id: str) -> nqnb.TaskInfo:
            raise errors.pop()

        monkeypatch.setattr(session.client, "fetch", lost)
        for _ in range(len(errors)):
            with pytest.raises(nqnb.WaitTimeout, match="1 of 1 tasks"):
                list(tasks.completed(0))
        assert errors == []

    @pytest.mark.anyio
    @pytest.mark.parametrize("limit", [None, 60])
    async def test_a_timeout_and_a_cancel_of_an_async_for_raise_their_own_errors(
        self, session: Session, monkeypatch: pytest.MonkeyPatch, limit: float | None
    ) -> None:
        async def idle(backend: object) -> AsyncIterator[nqnb.TaskBatch]:
            await asyncio.sleep(60)
            yield nqnb.TaskBatch()

        async def iterate() -> None:
            async for _ in TaskList(session, [SessionTask(session, "idle", "resize")]).completed(limit):
                pass

        monkeypatch.setattr("nqnb.notebook.tasks.watch", idle)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(iterate(), 0.3)
        iterating = asyncio.create_task(iterate())
        await asyncio.sleep(0.3)
        iterating.cancel()
        with pytest.raises(asyncio.CancelledError):
            await iterating

    def test_an_interrupt_raises_its_own_error_also_if_the_watch_ends_slowly(
        self, session: Session, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        waits = threading.Event()

        async def slow(backend: object) -> AsyncIterator[nqnb.TaskBatch]:
            waits.set()
            try:
                await asyncio.sleep(60)
            finally:
                await asyncio.sleep(1)
            yield nqnb.TaskBatch()

        def interrupt() -> None:
            waits.wait(60)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

        monkeypatch.setattr("nqnb.notebook.tasks.watch", slow)
        interrupting = threading.Thread(target=interrupt)
        interrupting.start()
        with pytest.raises(KeyboardInterrupt):
            list(TaskList(session, [SessionTask(session, "slow", "resize")]).completed())
        interrupting.join()

    def test_tasks_that_are_gone_after_an_outage_have_ended(
        self, session: Session, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A server without a disk was restarted, or the tasks have ended and were pruned during the outage."""
        tasks = TaskList(session, [SessionTask(session, "old", "resize")])
        batches: list[nqnb.TaskBatch] = []

        async def watch(backend: object) -> AsyncIterator[nqnb.TaskBatch]:
            yield nqnb.TaskBatch(tasks=[pending("old")], complete=True)
            for batch in batches:
                yield batch
            await asyncio.sleep(5)
            raise AssertionError("the wait did not end")

        monkeypatch.setattr("nqnb.notebook.tasks.watch", watch)
        for batches in (  # noqa: B007  the watch above yields them
            [nqnb.TaskBatch(anew=True), nqnb.TaskBatch(complete=True)],
            [nqnb.TaskBatch(lost=True, complete=True), nqnb.TaskBatch(complete=True)],
        ):
            assert list(tasks.completed()) == [*tasks]


class TestGroup:
    def test_a_group_is_found_again_in_the_order_of_its_rows(self, session: Session) -> None:
        serve(session)
        frame = images(300)
        tasks = session.map("resize", frame, group="sweep-7")
        session.map("resize", frame[:3], group="sweep-8")
        tasks.wait(30)
        again = session.group("sweep-7")
        assert again.ids == tasks.ids
        assert again.results().equals(tasks.results())
        assert again[:2].join(frame[:3], flat=True)["→ bytes"].fillna(0).tolist() == [512, 1024, 0]

    @pytest.mark.parametrize(
        "index",
        [
            pd.RangeIndex(3),
            pd.Index([2, 1, 0]),
            pd.Index([0.5, 1.0, 2.5]),
            pd.date_range("2026-11-29", periods=3, tz="UTC"),
            pd.MultiIndex.from_tuples([("a", 1), ("a", 2), ("b", 1)]),
        ],
        ids=lambda index: type(index).__name__ + str(index.dtype),
    )
    def test_every_kind_of_index_joins(self, session: Session, index: pd.Index[Any]) -> None:
        serve(session)
        frame = images(3).set_axis(index)
        session.map("resize", frame, group="sweep-7").wait(20)
        joined = session.group("sweep-7", "resize").join(frame, flat=True)
        assert joined.index.equals(index)
        assert joined["→ bytes"].tolist() == [512, 1024, 1536]

    def test_times_in_another_time_zone_are_the_same_labels(self, session: Session) -> None:
        times = pd.date_range("2026-11-29", periods=3, freq="h", tz="UTC") + pd.Timedelta(1, "ns")
        frame = images(3).set_axis(times)
        tasks = session.map("resize", frame, group="times")
        there = frame.tz_convert("Europe/Berlin").iloc[::-1]
        assert session.group("times").join(there)["task"].tolist() == tasks.ids[::-1]
        assert session.group("times").join(frame.set_axis(times + pd.Timedelta(1, "ns")))["task"].isna().all()
        assert session.group("times").join(frame.tz_localize(None))["task"].isna().all()
        levels = images(3).set_axis(pd.MultiIndex.from_arrays([[*"aab"], times]))
        tasks = session.map("resize", levels, group="levels")
        assert session.group("levels").join(levels.tz_convert("Asia/Tokyo", level=1))["task"].tolist() == tasks.ids

    @pytest.mark.parametrize(
        "added",
        [pd.NaT, np.nan, pd.Period("2026-11"), pd.Interval(0, 1), object()],
        ids=["NaT", "NaN", "period", "interval", "object"],
    )
    def test_a_row_whose_label_no_task_can_have_has_no_task(self, session: Session, added: Any) -> None:
        frame = images(2)
        tasks = session.map("resize", frame, group="sweep-7")
        longer = pd.concat([frame, images(1).set_axis(pd.Index([added], dtype=object))])
        assert session.group("sweep-7").join(longer)["task"].fillna("").tolist() == [*tasks.ids, ""]

    @pytest.mark.parametrize(
        ("indexes", "labels"),
        [
            ([pd.MultiIndex.from_arrays([["a", "b"], [(64, 32), (64,)]])], [("a", (64, 32)), ("b", (64,))]),
            ([pd.RangeIndex(2), pd.Index([0.25, 0.5])], [0, 0.25, 1, 0.5]),
            ([pd.Index([None, 7], dtype=object)], [None, 7]),
            (
                [
                    pd.MultiIndex.from_tuples([("<a>", 1), ("b", 2)]),
                    pd.MultiIndex.from_tuples([("a", 1, 1), ("b", 2, 1)]),
                ],
                [("<a>", 1), ("a", 1, 1), ("b", 2), ("b", 2, 1)],
            ),
        ],
        ids=["tuples in a level", "integers and floats", "None", "two and three levels"],
    )
    def test_labels_that_pandas_would_convert_are_joined(
        self, session: Session, indexes: list[pd.Index[Any]], labels: list[Any]
    ) -> None:
        frames = [images(2).set_axis(index) for index in indexes]
        ids = [session.map("resize", frame, group="sweep-7").ids for frame in frames]
        again = session.group("sweep-7")
        assert again._labels().tolist() == labels
        assert [again.join(frame)["task"].tolist() for frame in frames] == ids

    def test_a_label_that_cannot_be_decoded_hides_no_task(self) -> None:
        labels = [b"1e999", b'{"a":1}', b'"c"']
        infos = [
            msgspec.structs.replace(pending(f"{row}"), position=row, label=label) for row, label in enumerate(labels)
        ]
        tasks = group_list(Session(nqnb.Settings()), infos)
        assert tasks.ids == ["0", "1", "2"]
        assert tasks._labels().tolist() == ["1e999", '{"a":1}', "c"]

    def test_a_group_that_was_submitted_again_has_all_its_tasks_and_joins_with_the_last(self, session: Session) -> None:
        frame = images(2)
        first, second = (session.map("resize", frame, group="sweep-7") for _ in range(2))
        again = session.group("sweep-7")
        assert {*again} == {*first, *second}
        assert again.join(frame)["task"].tolist() == second.ids

    @pytest.mark.parametrize("index", [pd.RangeIndex(4), pd.Index(_labels(4))], ids=["numbers", "labels"])
    def test_a_part_of_a_group_that_was_submitted_again_joins_with_the_last_tasks(
        self, session: Session, index: pd.Index[Any]
    ) -> None:
        frame = images(4).set_axis(index)
        first = session.map("resize", frame, group="sweep-7")
        second = session.map("resize", frame.iloc[[2, 3]], group="sweep-7")
        again = session.group("sweep-7")
        for joined in (again.join(frame), again[:].join(frame)):
            assert joined["task"].tolist() == first.ids[:2] + second.ids
        third = again.join(frame.iloc[[3, 3, 0]])["task"]
        assert third.tolist() == [second.ids[1], second.ids[1], first.ids[0]]

    def test_an_unknown_group_suggests_another(self, session: Session) -> None:
        session.map("resize", [1], group="sweep-7")
        with pytest.raises(nqnb.BadInput, match="Did you mean 'sweep-7'"):
            session.group("sweep7")
        for wrong in ("", "a\n", "x" * 201, 7):
            with pytest.raises(nqnb.BadInput, match="group="):
                session.map("resize", [1], group=wrong)  # type: ignore[arg-type]  # that is what is tested

    def test_a_message_without_a_group_has_the_bytes_that_it_had(self, session: Session) -> None:
        task = session.submit("resize", 1)
        entry = session.call(session.client.backend.states.get(task.id))
        assert entry is not None
        assert set(TaskMessage.decode(entry.value).meta.__struct_fields__) > {"group", "position", "label"}
        assert not any(name in entry.value for name in (b"group", b"position", b"label"))
