"""The version of nqnb."""

from __future__ import annotations

__version__ = "0.2.0"
"""The version of this package.

Examples:
    >>> nqnb.__version__
    '0.2...'
"""
