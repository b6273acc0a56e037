"""What can go wrong, each with the exit code of the run: found, wanted, what to type next."""

EXIT_DONE = 0
EXIT_INTERRUPTED = 75  # saved; start the same command again


class HarnessError(Exception):
    """A problem that its reader can mend; the message says how."""

    exit_code = 1
    is_of_one_rank = False
    """Whether the other ranks cannot know of it, so that it is said by the one that does."""

    def __str__(self) -> str:
        return f"{type(self).__name__}: {super().__str__()}"


class ConfigError(HarnessError):
    """The configuration cannot be used."""

    exit_code = 2


class DataError(HarnessError):
    """The data are missing, unreadable, or not what the task needs."""

    exit_code = 3


class RowError(DataError):
    """A row could not be had, on one rank."""

    is_of_one_rank = True


class CheckpointError(HarnessError):
    """No checkpoint can be used although there are some."""

    exit_code = 4


class StorageError(HarnessError):
    """The run directory cannot be written."""

    exit_code = 5


class NonFiniteError(HarnessError):
    """Losses or gradients were NaN or infinite in too many updates in a row; none of these was applied."""

    exit_code = 6


class PeerError(HarnessError):
    """Another rank died or did not answer in time."""

    exit_code = 7


class RunInUseError(HarnessError):
    """Another process trains in this run directory."""

    exit_code = 8


class TrackingError(HarnessError):
    """The server of a tracker was not reached, refused, or did not take everything; of `harness track sync` only."""

    exit_code = 9
