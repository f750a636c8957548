"""The PyTorch side of `transfusion bench`: comparison only, nothing of the engine needs it.

    python peer.py        # reads requests from stdin, a JSON object a line, and answers each with one

A request names what to do in `do`, as in {"do": "step.time", "variant": "compiled", "seconds": 2}; whatever it measures is
blocked in a read while the other side is timed. An answer of {"error": ...} is a refusal, and the conversation goes on.
"""

import json
import os
import sys
import traceback


def answers():
    """Where answers go: the real stdout; what libraries print goes to stderr instead."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return out


def handlers():
    import ops
    import sample
    import step

    return {f"{m.__name__}.{name}": f for m in (step, sample, ops) for name, f in m.HANDLERS.items()}


def hello(torch, device, threads):
    torch.set_num_threads(threads)
    told = {"torch": torch.__version__, "python": sys.version.split()[0], "threads": torch.get_num_threads()}
    if device != "cpu":
        if not torch.cuda.is_available():
            raise RuntimeError(f"torch {torch.__version__} sees no GPU; --device cpu compares on the CPU")
        torch.cuda.set_device(device)
        told |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return told


def main():
    out = answers()
    say = lambda answer: out.write(json.dumps(answer) + "\n")
    try:
        import torch
    except ImportError as e:
        return say({"error": str(e), "missing": "torch"})
    known = {"hello": lambda **request: hello(torch, **request)} | handlers()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            say(known[request.pop("do")](**request))
        except Exception as e:
            traceback.print_exc()
            say({"error": f"{type(e).__name__}: {e}".splitlines()[0]})


if __name__ == "__main__":
    main()
