"""The client of warm.py: asks for a process, passes signals on to it, and ends as it ends."""

import json
import os
import signal
import socket
import sys

REAL = "REAL_PYTHON"  # replaced where this file is copied


def wanted() -> list[str]:
    """Return the arguments of Python; those that the server does not know are left to a real Python."""
    arguments = sys.argv[1:]
    if os.path.basename(sys.argv[0]) == "torchrun":
        arguments = ["-m", "torch.distributed.run", *arguments]
    name = arguments[arguments[:1] == ["-u"] :][:1]
    if not name or (name[0].startswith("-") and name[0] not in ("-m", "-c")):
        os.execv(REAL, [REAL, *arguments])
    return arguments


def main() -> int:
    """Return how the process ended: its code, or minus the number of a signal."""
    python = os.path.join(os.path.dirname(sys.argv[0]), "python")  # of torchrun too, which starts its ranks by it
    request = {"arguments": wanted(), "environment": dict(os.environ), "folder": os.getcwd(), "python": python}
    text, parent = json.dumps(request).encode(), os.getppid()
    with socket.socket(socket.AF_UNIX) as link:
        os.chdir(os.path.dirname(sys.argv[0]))
        link.connect("socket")  # a short name: sockets have no long ones
        socket.send_fds(link, [len(text).to_bytes(8, "big")], [0, 1, 2])
        link.sendall(text)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, lambda number, _: link.sendall(bytes([number])))
        link.settimeout(1.0)
        answer = b""
        while len(answer) < 4:
            try:
                part = link.recv(4 - len(answer))
            except TimeoutError:
                if os.getppid() != parent:  # of the ranks: torchrun was killed
                    return 1
                continue
            if not part:  # the server has ended, with all of its processes
                return 1
            answer += part
    return int.from_bytes(answer, "big", signed=True)


code = main()
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
