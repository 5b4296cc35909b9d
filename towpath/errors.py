"""The one tree of errors that Towpath can explain.

A class says whose fault it is and which code the outside gets; the api/ layer translates once.

    TowpathError
    ├── BadRequest            the caller's input is wrong: amend it
    │   ├── BadEnvironment    CNI 4: a CNI_* variable is missing or malformed
    │   ├── Unreadable        CNI 5: the request did not arrive whole
    │   ├── Undecodable       CNI 6: input is no JSON or has the wrong types
    │   ├── BadConfig         CNI 7: a key has a value that cannot work
    │   ├── UnsupportedField  CNI 2: a key that this plug-in does not serve
    │   ├── BadVersion        CNI 1: a CNI version that is not served
    │   └── BadNetns          CNI 8: the network namespace is not usable
    ├── Conflict              what is asked for belongs to somebody else: the message names the owner
    ├── NotFound              the named thing does not exist
    ├── PoolEmpty             CNI 11: no free address now, try again later
    ├── Unavailable           CNI 50/11: a part that is needed is away (kernel feature, store, delegate)
    ├── DelegateFailed        a delegated CNI plug-in said no: its own code and words are passed on
    ├── CheckFailed           CNI 100: CHECK found the kernel differing from the record
    └── PhaseFailed           the kernel refused a step of a plan
"""

from __future__ import annotations

import errno as errnos
import os
from typing import ClassVar


class TowpathError(Exception):
    """Something we can explain. The API layer turns it into CNI JSON or an HTTP reply.

    `what` says what failed and why in one line, `hint` what to do next (may be empty).
    """

    cni_code: ClassVar[int] = 999
    http_status: ClassVar[int] = 500

    def __init__(self, what: str, *, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint

    @property
    def code(self) -> int:
        """The CNI error code (CNI spec 1.1.0, section 5 "Error")."""
        return self.cni_code


class BadRequest(TowpathError):
    cni_code = 7
    http_status = 400


class BadEnvironment(BadRequest):
    cni_code = 4


class Unreadable(BadRequest):
    cni_code = 5


class Undecodable(BadRequest):
    cni_code = 6


class BadConfig(BadRequest):
    cni_code = 7


class UnsupportedField(BadRequest):
    cni_code = 2


class BadVersion(BadRequest):
    cni_code = 1


class BadNetns(BadRequest):
    cni_code = 8


class Conflict(TowpathError):
    cni_code = 7
    http_status = 409


class NotFound(TowpathError):
    cni_code = 3
    http_status = 404


class PoolEmpty(TowpathError):
    cni_code = 11
    http_status = 503


class Unavailable(TowpathError):
    cni_code = 11
    http_status = 503


class DelegateFailed(TowpathError):
    """A delegated CNI plug-in answered with an error: `code` is the plug-in's own."""

    def __init__(self, what: str, *, code: int = 999, hint: str = "") -> None:
        super().__init__(what, hint=hint)
        self._code = code

    @property
    def code(self) -> int:
        return self._code


class CheckFailed(TowpathError):
    cni_code = 100


class PhaseFailed(TowpathError):
    """The kernel refused one operation of a plan. `errno` as in <errno.h>; 0 where a tool spoke text only."""

    def __init__(self, where: str, op: object, errno: int = 0, text: str = "") -> None:
        reason = text or (os.strerror(errno) if errno else "refused")
        name = errnos.errorcode.get(errno, "")
        super().__init__(f"kernel refused {op} ({where}): {reason}{f' [{name}]' if name else ''}")
        self.where = where
        self.op = op
        self.errno = errno
