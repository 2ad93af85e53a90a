"""Submit a delayed batch whose tasks can fail and retry, and read the results as a pandas DataFrame.

This example uses the session, whose calls are synchronous. The session is for notebooks, but also works in scripts.
"""

from datetime import timedelta

import nqnb


def measure(job: nqnb.Job, payload: dict) -> float:
    """Return a number. For one payload, fail in the first attempt; for another payload, fail in every attempt."""
    if payload["sensor"] == "broken" or (payload["sensor"] == "slow" and job.attempt == 1):
        raise TimeoutError(f"no answer from sensor {payload['sensor']}")
    return len(payload["sensor"]) * 1.5


def main() -> None:
    """Run a server and a worker for this example, and submit the batch."""
    with nqnb.DevServer() as server:
        nq = nqnb.session(server.url)
        nq.handler("measure", concurrency=4, backoff=nqnb.Backoff(0.1, 1))(measure)

        sensors = [{"sensor": name} for name in ("north", "south", "slow", "broken")]
        tasks = nq.submit_many("measure", sensors, retry=2, process_at=timedelta(seconds=0.5))
        for task in tasks:
            task.wait(timeout=60)

        frame = nq.tasks("measure")
        frame["sensor"] = [payload["sensor"] for payload in frame["payload"]]
        print(frame.set_index("sensor")[["status", "attempt", "result", "error"]].sort_index().to_string())
        print("mean:", frame["result"].dropna().astype(float).mean())
        nq.down()


if __name__ == "__main__":
    main()
