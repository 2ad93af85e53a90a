"""A demonstration that checks itself: tasks that hash files, are retried, come at their time, and are cancelled."""

from nqnb.demo.play import run_demo
from nqnb.demo.records import DemoRow, DemoState, DemoSummary

__all__ = ["DemoRow", "DemoState", "DemoSummary", "run_demo"]
