"""Whether the code beside a checkpoint may be run: never, unless this process was told so.

    allow_code(args.trust_remote_code)      # a script, once, before it loads anything
    code_is_allowed()

transformers builds the configs inside a config by itself, and so this is a setting of the process, not an argument. It
is never read from a checkpoint, a file of settings or the environment.
"""

_allowed = False


def allow_code(allowed: bool) -> None:
    """Say whether checkpoints that are opened from now on may run the code beside them."""
    global _allowed
    _allowed = allowed


def code_is_allowed() -> bool:
    """Whether `allow_code(True)` was called."""
    return _allowed
