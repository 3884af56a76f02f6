"""What became of questions that a harness asks a server."""

_FAILED = "[LMMS_EVAL_"


def checked(reply: str) -> str:
    """
    A reply, which lmms-eval lets stand for one that never came, and would judge as wrong.

    Raises:
        RuntimeError: if it tells of a request that failed, or was not sent.
    """
    if reply.startswith(_FAILED):
        raise RuntimeError(f"A request to the server has failed, so there are no numbers: {reply}")
    return reply
