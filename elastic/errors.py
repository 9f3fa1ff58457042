"""The few errors of the runtime, split by whose fault they are and what helps.

Foreign exceptions (gRPC, gloo, SQLite) are translated into these where they enter, and nowhere else. Each message
is one sentence that says what happened, where, and what to do next.
"""

from __future__ import annotations


class ElasticError(Exception):
    """Base of every error that the runtime raises on purpose."""


class ConfigError(ElasticError):
    """The user's input cannot work as it stands (a flag, a file, a model, a loader): change it and start again."""


class CollectiveAborted(ElasticError):
    """A collective of one generation will never complete: regroup, then redo the step. Never reaches user code."""


class BuildCancelled(CollectiveAborted):
    """A process group was not finished because a newer generation replaced it."""


class GroupStuck(ElasticError):
    """A process group that was ended still holds memory: this worker must be replaced."""


class TransferError(ElasticError):
    """State received from peers is not what they sent (checksum, step or shape): ask for it again."""


class CheckpointError(ElasticError):
    """A checkpoint cannot be written or read (disk, damage, another job's): training goes on; the message says the remedy."""


class ProtocolError(ElasticError):
    """A message breaks the protocol's law (wrong job, version, token or order): the sender must be replaced."""


class Unreachable(ElasticError):
    """The other side did not answer within its deadline: retry, or give up with this sentence."""


class LedgerBusy(ElasticError):
    """Another controller holds this ledger: stop that one, or name another ledger."""


class JobFailed(ElasticError):
    """The job ended without success; the message is the reason that the ledger holds."""
