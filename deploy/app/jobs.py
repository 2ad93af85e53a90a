"""An example of a worker. Replace this file with your own modules."""

import nqnb

worker = nqnb.Worker(concurrency=8)


@worker.handler("resize")
def resize(job: nqnb.Job, payload: dict) -> dict:
    """Report progress for a second, in place of the work."""
    for done in range(10):
        job.progress(done, 10)
        job.wait(0.1)
    return {"path": payload["path"]}
